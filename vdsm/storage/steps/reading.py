"""What is asked about images and VMs. Takes no lease, needs no lockspace; runs in an I/O child."""

from collections.abc import Callable
from typing import Any

from vdsm import errors, leases, record
from vdsm.record import Record
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain

Argument = dict[str, Any]

_RESTS = 5  # looks for a record that does not change meanwhile: work writes it at most every few seconds


def find(repo: Repository, argument: Argument) -> Record | None:
    """The record of `image_id` whatever its state, None when there is none."""
    return repo.find(argument["image_id"])


def image(repo: Repository, argument: Argument) -> Record:
    """The record of `image_id` and the space that it takes by itself (`allocated_bytes`). Deleted ones are gone."""
    found = _existing(repo, argument["image_id"])
    return {**found, "allocated_bytes": repo.allocated_bytes(found["data"]["name"])}


def images(repo: Repository, argument: Argument) -> list[Record]:
    """All images as `image` answers them, in the order in which they were made."""
    found = [known for known in repo.images().values() if not known["deleted"]]
    taken = repo.data_sizes()
    return [
        {**known, "allocated_bytes": taken.get(known["data"]["name"], 0)}
        for known in sorted(found, key=lambda known: (known["created"], known["id"]))
    ]


def status(repo: Repository, argument: Argument) -> dict[str, Any]:
    """The `evidence` of `image_id`. Deleted ones are gone."""
    image_id = argument["image_id"]
    return evidence(repo, repo.slot(image_id), lambda: _existing(repo, image_id))


def evidence(repo: Repository, slot: record.Slot, read: Callable[[], Record]) -> dict[str, Any]:
    """All that tells the fate of an entity's last work (`verdicts.judge`): {"record", "owners", "hosts"}.

    owners   [{"host_id", "generation"}] of the hosts whose processes hold its data lease, exclusive or not; None when
             sanlock cannot be asked
    hosts    [{"host_id", "generation", "state"}] of the lockspace; None while this host does not know them

    The record is the same before and after the others were read: what began or ended in between would look dead (trap
    22). Where it never rests, its last state counts, and the owners were read before it.
    """
    known = read()
    for _ in range(_RESTS):
        found, hosts = owners(repo, slot), leases.hosts(slot.lockspace)
        before, known = known, read()
        if known["version"] == before["version"]:
            break
    listed = [{"host_id": host_id, **host._asdict()} for host_id, host in hosts.items()]
    return {"record": known, "owners": found, "hosts": listed or None}


def owners(repo: Repository, slot: record.Slot) -> list[dict[str, int]] | None:
    """As in `evidence`."""
    lease = slot.data_lease()
    try:
        found = leases.owners(lease)
    except errors.LeaseFailed:
        return None
    own = [owner for owner in found if owner["host_id"] == repo.host_id]
    if own and not leases.local_pids(lease):
        # On storage from a life before: this host crashed, and nobody took it since.
        found = [owner for owner in found if owner not in own]
    return [{"host_id": owner["host_id"], "generation": owner["generation"]} for owner in found]


def layers(repo: Repository, argument: Argument) -> dict[str, Any]:
    """`chained`, and "holder": who of this host's processes holds the data lease of `image_id`, in words, or None."""
    lease = repo.slot(argument["image_id"]).data_lease()
    holder = leases.holder(lease) if leases.local_pids(lease) else None
    return {**chained(repo, chain.down(argument["image_id"], repo.find)), "holder": holder}


def chained(repo: Repository, images: list[Record]) -> dict[str, Any]:
    """{"images": records of an image and of all it is based on, top first, "slots": theirs}."""
    return {"images": images, "slots": [list(repo.slot(image["id"])) for image in images]}


def vm(repo: Repository, argument: Argument) -> Record | None:
    """The record of `vm_id`, None when there is none."""
    return repo.find_vm(argument["vm_id"])


def _existing(repo: Repository, image_id: str) -> Record:
    found = repo.get(image_id)
    if found["deleted"]:
        raise errors.NoSuchImage(image_id=image_id, where=repo.repo_id)
    return found
