"""What is asked about images and VMs. Takes no lease, needs no lockspace; runs in an I/O child."""

from typing import Any

from vdsm import errors, leases
from vdsm.record import Record
from vdsm.storage import chain
from vdsm.storage.repository import Repository

Argument = dict[str, Any]


def find(repo: Repository, argument: Argument) -> Record | None:
    """The record of `image_id` whatever its state, None when there is none."""
    return repo.find(argument["image_id"])


def image(repo: Repository, argument: Argument) -> Record:
    """The record of `image_id` and the space that it takes by itself (`allocated_bytes`). Deleted ones are gone."""
    return _shown(repo, _existing(repo, argument["image_id"]))


def images(repo: Repository, argument: Argument) -> list[Record]:
    """All images as `image` answers them, in the order in which they were made."""
    found = [known for known in repo.images().values() if not known["deleted"]]
    return [_shown(repo, known) for known in sorted(found, key=lambda known: (known["created"], known["id"]))]


def status(repo: Repository, argument: Argument) -> dict[str, Any]:
    """The record of `image_id`, and `owners`: ids of the hosts whose processes hold its data lease, exclusive or not.

    The owners are read first: what ends between the two reads looks finished, never interrupted (trap 22). None when
    sanlock cannot be asked.
    """
    owners = _owners(repo, argument["image_id"])
    return {"record": _existing(repo, argument["image_id"]), "owners": owners}


def _owners(repo: Repository, image_id: str) -> list[int] | None:
    lease = repo.slot(image_id).data_lease()
    try:
        found = {owner["host_id"] for owner in leases.owners(lease)}
    except errors.LeaseFailed:
        return None
    if repo.host_id in found and not leases.local_pids(lease):
        found.discard(repo.host_id)  # on storage from a life before: this host crashed, and nobody took it since
    return sorted(found)


def layers(repo: Repository, argument: Argument) -> dict[str, Any]:
    """{"images": the record of `image_id` and of all it is based on, top first, "holder": who of this host's processes
    holds the top one's data lease, in words, or None}."""
    lease = repo.slot(argument["image_id"]).data_lease()
    holder = leases.holder(lease) if leases.local_pids(lease) else None
    return {"images": chain.down(argument["image_id"], repo.find), "holder": holder}


def vm(repo: Repository, argument: Argument) -> Record | None:
    """The record of `vm_id`, None when there is none."""
    return repo.find_vm(argument["vm_id"])


def _existing(repo: Repository, image_id: str) -> Record:
    found = repo.get(image_id)
    if found["deleted"]:
        raise errors.NoSuchImage(image_id=image_id, where=repo.repo_id)
    return found


def _shown(repo: Repository, found: Record) -> Record:
    return {**found, "allocated_bytes": repo.allocated_bytes(found["data"]["name"])}
