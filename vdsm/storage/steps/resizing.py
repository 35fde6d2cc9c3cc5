"""resizeVirtualDisk: a disk grows.

    record      broken, the work names the new size                    [C]
    data        grown; right at every moment, to its old size and to its new one; flushed
    record      the new size, optimized or degraded, generation + 1

Killed: before [C] nothing has happened; after it `finish` does the rest, by whoever is next to use the disk. A failure
that is not a kill takes it back. Runs in a repository's I/O child, or in a worker.
"""

import os
import stat
from typing import Any

from vdsm import errors, leases, record, undo
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import models


def resize(repo: Repository, session: leases.Session, argument: dict[str, Any]) -> dict[str, Any]:
    """Grows a disk that nobody uses. Complete at return. argument: image_id, size_bytes, generation (or None).

    Answers {image_id, job_id: None}. Raises `ImageInUse`, `ImageNotUsable`, `WrongKind`, `GenerationMismatch`,
    `InvalidParameters` for a size below the present one, `RepositoryFull`.
    """
    image_id, size_bytes = argument["image_id"], argument["size_bytes"]
    with repo.owning(session, exclusive=[image_id]), undo.Stack() as steps:
        disk = repo.get(image_id)
        models.check_usable(disk, models.DISK)
        models.check_generation(disk, argument["generation"])
        if size_bytes < disk["size_bytes"]:
            reason = f"the disk has {disk['size_bytes']} bytes, and disks only grow"
            raise errors.InvalidParameters(parameter="size", reason=reason)
        if size_bytes > disk["size_bytes"]:
            _check_space(repo, disk, size_bytes)
            repo.update(session, image_id, lambda found: _growing(repo, found, size_bytes))  # [C]
            steps.push("give the disk its old size", lambda: _withdraw(repo, session, disk))
            finish(repo, session, image_id)
    return {"image_id": image_id, "job_id": None}


def finish(repo: Repository, session: leases.Session, image_id: str) -> record.Record:
    """What the disk's open work still lacks; its record as it is then. The data lease is held. May be done twice."""
    disk = repo.get(image_id)
    size_bytes = disk["work"]["names"]["size_bytes"]
    set_size(repo, session, disk, size_bytes)
    return repo.update(session, image_id, lambda found: models.done(found, size_bytes=size_bytes))


def _check_space(repo: Repository, disk: record.Record, size_bytes: int) -> None:
    """Raw data is preallocated: there must be room for all of it."""
    raw = disk["data"]["format"] == models.RAW
    if raw and repo.space().free_bytes < size_bytes - disk["size_bytes"]:
        raise errors.RepositoryFull(repo_id=repo.repo_id)


def _growing(repo: Repository, disk: record.Record, size_bytes: int) -> record.Record:
    work = models.work("resizeVirtualDisk", repo.host_id, {"size_bytes": size_bytes})
    return {**disk, "status": models.BROKEN, "work": work}


def _withdraw(repo: Repository, session: leases.Session, before: record.Record) -> None:
    """The disk as it was, unless its record says that it has grown: what failed may be the end of a step that is on
    disk, as when sanlock dies before the record's lease is given back. What cannot be taken back stays broken, to be
    finished."""
    if repo.get(before["id"])["size_bytes"] != before["size_bytes"]:
        return
    set_size(repo, session, before, before["size_bytes"])
    repo.update(session, before["id"], lambda _: before)


def set_size(repo: Repository, session: leases.Session, disk: record.Record, size_bytes: int) -> None:
    """The disk's data has this size, on stable storage."""
    data, known_bytes = disk["data"], disk["size_bytes"]
    try:
        room_bytes = size_bytes if data["format"] == models.RAW else 0
        with repo.changing(data["name"], room_bytes) as path:
            if size_bytes > known_bytes:
                repo.grow(data, size_bytes, repo.written_bytes(data))  # its tables grow
            layer = repo.layer(data, size_bytes)
            resized = widening(layer, known_bytes, size_bytes)
            for argv in resized if layer.is_raw_volume else [qemuimg.resize(layer, size_bytes)]:
                qemuimg.run(argv, (session.fd, *repo.tool_fds), size_bytes)
            if data["format"] == models.RAW:
                _allocate(path, size_bytes)
    except errors.ToolFailed as error:
        raise qemuimg.explain(error, repo.repo_id) from error


def widening(layer: qemuimg.Layer, known_bytes: int, size_bytes: int) -> list[list[str]]:
    """What a raw volume needs before it is used to a larger size: it holds old bytes there (trap 40). Nothing else
    needs anything."""
    grown_bytes = size_bytes - known_bytes
    return [qemuimg.zero(layer, known_bytes, grown_bytes)] if layer.is_raw_volume and grown_bytes > 0 else []


def _allocate(path: str, size_bytes: int) -> None:
    """Gives raw data its space now, as when it was made: a guest must not run out of it. Holes become zeros.

    qemu-img allocates only while it grows a file, so one that a dead maker has grown already would stay sparse.
    """
    # Where the file system cannot allocate, as NFS in version 3, the C library writes, and reads before what is there.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):  # a device has its space
            os.posix_fallocate(fd, 0, size_bytes)
    finally:
        os.close(fd)
