"""What the verbs that make or change images do in a repository, step by step, in the order that the protocols give.

Runs in a repository's I/O child; a worker may call the same functions. Each takes the repository, the process's own
session with sanlock, and its argument, and returns JSON. "[C]" marks the commit point: killed before it, nothing has
happened; killed after it, the record says what was being done, and the same request again finishes it. A failure that
is not a kill undoes the steps made so far and is raised.

All raise `NoSuchImage`, `ImageInUse` (somebody holds a lease), `ImageBusy` (open work), `ImageNotUsable`, `WrongKind`
and `GenerationMismatch` where they apply, `ImageExists` (the id belongs to another request), `IdTaken` (to a VM),
`RecordNotOwned` (see `vdsm/record.py`) and `RepositoryFull`.
"""

from collections.abc import Callable
from typing import Any

from vdsm import errors, leases, record, undo
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, models
from vdsm.storage.steps import removal, resizing

Argument = dict[str, Any]
Answer = dict[str, Any]


# -- createVirtualDisk -----------------------------------------------------------------------------------------------


def create_virtual_disk(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """An empty disk, or one that shows what the snapshot `base` holds. Complete at return.

    argument: image_id, size_bytes (0: the base's), base (id or None), strategy, user_data, digest; auto_fix: False
    leaves all after [C] to a later fix. Answers {image_id, job_id: None}.

    Killed: before [C] at most a slot without a record; after it a broken image with this work.
    """
    image_id, base_id = argument["image_id"], argument["base"]
    known = same_request(repo, argument)
    if known is not None and known["status"] != models.BROKEN:
        return answer(known)
    # The base is held from before the check until the record that needs it is on disk (trap 36).
    with repo.owning(session, shared=[base_id] if base_id else []):
        size_bytes = argument["size_bytes"]
        if base_id:
            size_bytes = _above(repo.get(base_id), size_bytes)
        slot = repo.allocate(session, image_id)
        with repo.owning(session, exclusive=[image_id]):
            known = same_request(repo, argument)
            with undo.Stack() as steps:
                steps.push("remove the disk", lambda: removal.discard(repo, session, image_id))
                if known is None:
                    known = record.create(slot, _empty_disk(repo, {**argument, "size_bytes": size_bytes}))  # [C]
                if not argument.get("auto_fix", True):
                    return answer(known)
                return answer(_fill_disk(repo, session, image_id))


def _above(base: record.Record, size_bytes: int) -> int:
    """The size of a disk on `base`, which must be usable and not larger."""
    models.check_usable(base, models.SNAPSHOT)
    if 0 < size_bytes < base["size_bytes"]:
        raise errors.InvalidParameters(parameter="size", reason=f"its base has {base['size_bytes']} bytes")
    return size_bytes or int(base["size_bytes"])


def _empty_disk(repo: Repository, argument: Argument) -> record.Record:
    fast = argument["strategy"] == models.PERFORMANCE and argument["base"] is None
    data = {"name": models.data_name(argument["image_id"]), "format": models.RAW if fast else models.QCOW2}
    asked = {name: argument[name] for name in ("size_bytes", "base", "strategy", "user_data", "digest")}
    fields = {"id": argument["image_id"], "kind": models.DISK, "data": data, **asked}
    wanted = not argument.get("auto_fix", True)
    return models.new(fields, repo.host_id, models.work("createVirtualDisk", repo.host_id, {}, wanted=wanted))


def _fill_disk(repo: Repository, session: leases.Session, image_id: str) -> record.Record:
    """Makes the data that the record names, and finishes the record."""
    disk = repo.get(image_id)
    if disk["status"] != models.BROKEN:
        return disk
    base = repo.get(disk["base"]) if disk["base"] else None
    make_data(repo, disk, base, quickly(repo, session, disk))
    return repo.update(session, image_id, lambda found: models.done(found))


Tool = Callable[[list[str]], object]


def quickly(repo: Repository, session: leases.Session, image: record.Record) -> Tool:
    """Runs qemu-img on the image's data within the call."""
    return lambda argv: qemuimg.run(argv, (session.fd, *repo.tool_fds), image["size_bytes"])


def make_data(
    repo: Repository, image: record.Record, base: record.Record | None, tool: Tool, room_bytes: int | None = None
) -> None:
    """The image's data, empty, or an overlay on that of `base`, on stable storage at return. Replaces data of that
    name. There is room for a VM to begin with, or `room_bytes`, for what is not going to be grown while it is written.
    """
    data, size_bytes = image["data"], image["size_bytes"]
    room_bytes = repo.first_room(data["format"], size_bytes) if room_bytes is None else room_bytes
    below = repo.layer(base["data"], base["size_bytes"]) if base else None
    try:
        with repo.making(data["name"], room_bytes):
            tool(qemuimg.create(repo.layer(data, size_bytes), size_bytes, below))
    except errors.ToolFailed as error:
        raise qemuimg.explain(error, repo.repo_id) from error


# -- createSnapshot --------------------------------------------------------------------------------------------------


def create_snapshot(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """A snapshot of a disk that no VM runs on. Complete at return.

    argument: image_id (the snapshot's), disk_id, generation (the disk's, or None), user_data, digest; auto_fix: False
    leaves all after [C] to a later fix. Answers {image_id, job_id: None}. The snapshot takes over the disk's data, the
    disk gets an overlay on it; nothing is renamed and nothing copied (trap 31).

    Killed: before [C] the disk is as it was, and at most a broken snapshot is there, whose record names the disk's data
    too; after it the disk is broken and names the snapshot and its new data, and `roll_forward` finishes both.
    """
    image_id, disk_id = argument["image_id"], argument["disk_id"]
    disk = roll_forward(repo, session, {"image_id": disk_id})
    known = same_request(repo, argument)
    if known is not None and known["status"] != models.BROKEN:
        return answer(known)
    _check_disk(disk, argument)
    repo.allocate(session, image_id)
    with repo.owning(session, exclusive=[disk_id, image_id]):
        disk, known = repo.get(disk_id), same_request(repo, argument)
        if chain.open_snapshot(disk) == image_id:  # the same request has come so far meanwhile, and died
            return answer(_switch(repo, session, disk_id, image_id))
        if known is not None and known["status"] != models.BROKEN:  # or has done it all
            return answer(known)
        return answer(split(repo, session, disk, argument))


def split(repo: Repository, session: leases.Session, disk: record.Record, argument: Argument) -> record.Record:
    """The snapshot `image_id`, which takes over the disk's data, complete; unless `auto_fix` is False. The leases of
    both are held."""
    image_id, disk_id = argument["image_id"], disk["id"]
    wanted = not argument.get("auto_fix", True)
    with undo.Stack() as steps:
        steps.push("withdraw the snapshot", lambda: _withdraw(repo, session, disk, image_id))
        _check_disk(disk, argument)
        snapshot = record.create(repo.slot(image_id), _snapshot_of(repo, disk, argument, wanted))
        repo.update(session, disk_id, lambda found: _snapshotting(repo, found, image_id, wanted))  # [C]
        return snapshot if wanted else _switch(repo, session, disk_id, image_id)


def _check_disk(disk: record.Record, argument: Argument) -> None:
    models.check_usable(disk, models.DISK)
    models.check_generation(disk, argument["generation"])


def _snapshot_of(repo: Repository, disk: record.Record, argument: Argument, wanted: bool) -> record.Record:
    kept = {name: disk[name] for name in ("size_bytes", "data", "base", "strategy")}
    asked = {name: argument[name] for name in ("user_data", "digest")}
    hidden = argument.get("hidden", False)
    fields = {"id": argument["image_id"], "kind": models.SNAPSHOT, "deleted": hidden, **kept, **asked}
    work = models.work("createSnapshot", repo.host_id, {"disk": disk["id"]}, wanted=wanted)
    return models.new(fields, repo.host_id, work)


def _snapshotting(repo: Repository, disk: record.Record, snapshot_id: str, wanted: bool) -> record.Record:
    names = {"snapshot": snapshot_id, "data": models.data_name(disk["id"])}
    work = models.work("createSnapshot", repo.host_id, names, wanted=wanted)
    return {**disk, "status": models.BROKEN, "work": work}


def _withdraw(repo: Repository, session: leases.Session, before: record.Record, snapshot_id: str) -> None:
    """The disk as it was before its intent; then, and only then, the snapshot goes, with what was begun of new data.

    The disk's record decides, not how far the verb came: what failed may be the end of a step that is on disk, as when
    sanlock dies before a record's lease is given back. A disk that lies on the snapshot keeps it.
    """
    disk = repo.get(before["id"])
    if disk["base"] == snapshot_id:
        return
    if chain.open_snapshot(disk) == snapshot_id:
        repo.remove_data(disk["work"]["names"]["data"])
        repo.update(session, before["id"], lambda _: before)
    removal.discard(repo, session, snapshot_id)


def roll_forward(repo: Repository, session: leases.Session, argument: Argument) -> record.Record:
    """Finishes the snapshot or the new size that the disk's open work names, if any; returns the disk's record as it
    then is.

    argument: image_id (the disk's). Every step may be done twice. Raises `ImageBusy` while its maker is at it.
    """
    disk = repo.get(argument["image_id"])
    if disk["status"] == models.BROKEN:
        record.check_writer(repo.slot(disk["id"]))
    if chain.open_resize(disk) is not None:
        with repo.owning(session, exclusive=[disk["id"]]):
            if chain.open_resize(repo.get(disk["id"])) is not None:
                resizing.finish(repo, session, disk["id"])
        return repo.get(disk["id"])
    snapshot_id = chain.open_snapshot(disk)
    if snapshot_id is None:
        return disk
    with repo.owning(session, exclusive=[disk["id"], snapshot_id]):
        if chain.open_snapshot(repo.get(disk["id"])) == snapshot_id:
            _switch(repo, session, disk["id"], snapshot_id)
    return repo.get(disk["id"])


def _switch(repo: Repository, session: leases.Session, disk_id: str, snapshot_id: str) -> record.Record:
    """From the disk's intent to the end: its overlay, the snapshot's record, the disk's. Returns the snapshot."""
    disk = repo.get(disk_id)
    names = disk["work"]["names"]
    snapshot = make_snapshot(repo, session, disk, names)
    repo.update(session, disk_id, lambda found: models.done(found, **_based(names)))
    return snapshot


def make_snapshot(
    repo: Repository, session: leases.Session, disk: record.Record, names: dict[str, str]
) -> record.Record:
    """Makes the disk's overlay, and completes the snapshot's record; returns that. `names` are those of the work."""
    make_data(repo, {**disk, **_based(names)}, disk, quickly(repo, session, disk))
    snapshot = repo.get(names["snapshot"])
    if snapshot["status"] == models.BROKEN:
        snapshot = repo.update(session, snapshot["id"], lambda found: models.done(found))
    return snapshot


def on_snapshot(disk: record.Record, names: dict[str, str]) -> dict[str, Any]:
    """Fields of the disk's record when it is based on its new snapshot."""
    based = _based(names)
    return {**based, "status": models.settled({**disk, **based})}


def _based(names: dict[str, str]) -> dict[str, Any]:
    return {"data": {"name": names["data"], "format": models.QCOW2}, "base": names["snapshot"]}


# -- resizeVirtualDisk -----------------------------------------------------------------------------------------------


def resize_virtual_disk(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """See `resizing.resize`. What is open on the disk is finished first."""
    roll_forward(repo, session, {"image_id": argument["image_id"]})
    return resizing.resize(repo, session, argument)


# -- setImageUserData ------------------------------------------------------------------------------------------------


def set_user_data(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """Replaces an image's userData; also while a VM runs on it. argument: image_id, user_data, generation (or None)."""

    def change(image: record.Record) -> record.Record:
        if image["deleted"]:
            raise errors.NoSuchImage(image_id=image["id"], where=repo.repo_id)
        models.check_generation(image, argument["generation"])
        return {**image, "user_data": argument["user_data"]}

    repo.update(session, argument["image_id"], change)
    return {"image_id": argument["image_id"]}


# -- shared ----------------------------------------------------------------------------------------------------------


def same_request(repo: Repository, argument: Argument) -> record.Record | None:
    """The image that an earlier call of the same request made or began, None when the id is free (trap 25)."""
    known = repo.find(argument["image_id"])
    if known is not None and (known["deleted"] or known["digest"] != argument["digest"]):
        raise errors.ImageExists(image_id=known["id"], repo_id=repo.repo_id)
    return known


def answer(image: record.Record) -> Answer:
    """A job's id only while its work is open: an image that is there needs no waiting."""
    return {"image_id": image["id"], "job_id": image["work"]["job_id"] if models.is_open(image) else None}


Intent = Callable[[Repository, leases.Session, Argument], Any]
