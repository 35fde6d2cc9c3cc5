"""Taking images away: the deleted flag, and cleaning what nobody needs any more.

Data goes before the record that names it, the record before its slot. Runs in a repository's I/O child or in a worker.
"""

import contextlib
from typing import Any

from vdsm import errors, leases, record
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, findings, models


def remove_image(repo: Repository, session: leases.Session, argument: dict[str, Any]) -> dict[str, Any]:
    """Removes an image for its callers, and from storage what nobody needs then.

    argument: image_id, generation (expected, or None); auto_fix: False only sets the flag. Answers {"cleaned": ids of
    what has left storage}; empty as long as another image is based on it. Removing a deleted image again goes on with
    the cleaning.

    A snapshot is only flagged, so it can go while VMs run on top of it. Anything that somebody may write, a disk or an
    image in the making, needs its data lease.

    Killed: before [C] nothing has happened; after it the record says deleted, and its data goes when somebody cleans.
    """
    image_id = argument["image_id"]
    image = repo.get(image_id)
    if not image["deleted"]:
        mutable = image["kind"] == models.DISK or image["status"] == models.BROKEN
        with repo.owning(session, exclusive=[image_id] if mutable else []):
            record.check_writer(repo.slot(image_id))
            repo.update(session, image_id, lambda found: _deleted(repo, found, argument["generation"]))  # [C]
    return {"cleaned": clean(repo, session, image_id) if argument.get("auto_fix", True) else []}


def _deleted(repo: Repository, image: record.Record, expected: int | None) -> record.Record:
    models.check_generation(image, expected)
    if chain.claim(image) is not None:
        raise models.busy(image)  # the VM's job is finished with all its disks, or taken back
    if image["work"] and image["work"]["state"] == "queued" and image["work"]["host_id"] != repo.host_id:
        raise models.busy(image)  # the other host's worker would take it up any moment (trap 24)
    return {**image, "deleted": True}


def clean(repo: Repository, session: leases.Session, *image_ids: str) -> list[str]:
    """Takes deleted images from storage when nobody needs them, then what they needed by the same rule, and so on.

    Returns the ids of what has gone. What is in use, needed, not deleted or of unknown make stays as it is; nothing is
    raised for it.

    Killed: the image stays deleted and broken, with this work in its record, its data there or not.
    """
    cleaned: list[str] = []
    wanted = list(image_ids)
    while wanted:
        image_id = wanted.pop()
        with contextlib.suppress(errors.ImageBusy, errors.ImageInUse, errors.NoSuchImage, errors.RecordNotOwned):
            with repo.owning(session, exclusive=[image_id]):
                image = clean_held(repo, session, image_id)
            if image is not None:
                cleaned.append(image_id)
                wanted += sorted(chain.needs(image))
    return cleaned


def clean_held(repo: Repository, session: leases.Session, image_id: str) -> record.Record | None:
    """Takes one deleted image from storage, whose lease is held: nobody gets to need it now (trap 36).

    Returns it as it was, or None when it has to stay. Raises `RecordNotOwned`. Killed: as `clean`.
    """
    image = repo.find(image_id)
    if image is None or not image["deleted"]:
        return None
    carried = repo.data_names(image_id) if chain.is_disk_at_rest(image) else None
    others = _who_could_need(repo, image, carried)
    if chain.dependents(image_id, others):
        return None
    record.check_writer(repo.slot(image_id))
    repo.update(session, image_id, lambda found: _being_cleaned(repo, found))
    discard(repo, session, image_id, carried, others)
    return image


def _who_could_need(repo: Repository, image: record.Record, carried: list[str] | None) -> list[record.Record]:
    """The records that could need the image or rely on its data; its lease is held, so no more of them come.

    Of a disk at rest it is those below it: whoever bases anything on a disk splits it first (trap 35). When they do not
    account for all data that was made for it (`carried`), and for anything that is no such disk, all records are read:
    that takes as long as there are images.
    """
    if carried is not None:
        with contextlib.suppress(errors.ImageNotUsable):
            below = chain.down(image["id"], repo.find)[1:]
            if chain.unused_data(image, carried, below) == [image["data"]["name"]]:
                return below
    return entities(repo)


def _being_cleaned(repo: Repository, image: record.Record) -> record.Record:
    """Broken from here on: a copy of the same snapshot must not find it whole and undelete it (trap 38)."""
    names = (image["work"] or {}).get("names", {})
    return {**image, "status": models.BROKEN, "work": models.work("clean", repo.host_id, names)}


def discard(
    repo: Repository,
    session: leases.Session,
    image_id: str,
    carried: list[str] | None = None,
    others: list[record.Record] | None = None,
) -> None:
    """Takes an image from storage whatever its state: data, record, slot. A slot without record goes too.

    The caller holds its data lease inside `owning` and knows that nobody needs it. Read under that lease: `carried`,
    the names of what was made under it, and `others`, the records that could rely on its data; None: they are read
    here.
    """
    image = repo.find(image_id)
    if image is not None:
        if carried is None:
            carried = repo.data_names(image_id)  # before the records are listed (trap 37)
        for name in chain.unused_data(image, carried, entities(repo) if others is None else others):
            repo.remove_data(name)
    repo.free(session, repo.slot(image_id))


def discard_held(repo: Repository, session: leases.Session, image_id: str) -> None:
    """`discard` of what a job was making, by its worker or a later one; nothing to discard is fine.

    The lease is the worker's already, or is taken here; it goes with the slot.
    """
    if image_id in repo.image_ids():
        slot = repo.allocate(session, image_id)  # a dead maker's may lack its leases
        repo.keep(session, image_id)
        discard(repo, session, image_id)
        session.release([slot.data_lease()])


def entities(repo: Repository) -> list[record.Record]:
    """All records of the repository: images and VMs."""
    return [*repo.images().values(), *repo.vms().values()]


def remove_unnamed(repo: Repository, names: list[str]) -> None:
    """Removes those of `names`, all of them data that exists, that no record relies on. The caller holds the lease of
    whoever could get to name them."""
    for name in findings.unnamed_data(names, entities(repo)):
        repo.remove_data(name)
