"""importImage: a file of this host becomes a virtual disk.

The file is opened twice, by the request, to refuse it at once, and by the job; each time once: its header is read from
a descriptor, and in the job the same descriptor, not the name, is what qemu-img reads. Where the descriptor leads, not
what the path looks like, decides whether the file may be imported.
"""

import os
from typing import Any

from vdsm import errors, leases
from vdsm.jobs import worker
from vdsm.storage.bodies import copying
from vdsm.storage.files import hostfiles, imageheader, qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import models
from vdsm.storage.steps import copyintents

_LIMITS = imageheader.Limits(virtual_size_bytes=models.MAX_SIZE_BYTES)


def begin_import(repo: Repository, session: leases.Session, argument: dict[str, Any]) -> dict[str, Any]:
    """As `copyintents.begin_copy`, for the file `path` in `format`, which must lie under one of `allowed_dirs`.

    Runs in the I/O child. Raises `BadImageFile`, `PathNotAllowed`; then nothing was made.
    """
    fd, header = _open(argument)
    os.close(fd)
    size_bytes = models.size(header.virtual_size_bytes)
    source = {"path": argument["path"], "format": argument["format"]}
    whole = {**argument, "kind": models.DISK, "size_bytes": size_bytes, "verb": "importImage", "source": source}
    return copyintents.begin_copy(repo, session, whole)


@worker.body("importImage")
class ImportImage(copying.Filling):
    """argument: target, image_id; path, format, allowed_dirs."""

    def run(self, ctx: worker.Context) -> None:
        fd, header = _open(ctx.argument)
        size_bytes = ctx.record["size_bytes"]
        try:
            if size_bytes != models.size(header.virtual_size_bytes):
                raise errors.BadImageFile(path=ctx.argument["path"], reason="it has changed since the request")
            # The tool's own descriptors are its own: it finds this process's one by the process's number.
            path = f"/proc/{os.getpid()}/fd/{fd}"
            layer = qemuimg.Layer(path, ctx.argument["format"], direct=hostfiles.is_direct(path))
            grow = size_bytes > header.virtual_size_bytes
            copying.fill(ctx, self.target(ctx.argument), ctx.record, [layer], grow=grow)
        finally:
            os.close(fd)


def _open(argument: dict[str, Any]) -> tuple[int, imageheader.ImageHeader]:
    """(descriptor, header) of a file that may be imported."""
    path, allowed = argument["path"], argument["allowed_dirs"]
    hostfiles.check_place(os.path.realpath(path), path, allowed)  # nothing is told about files that are elsewhere
    fd, header = imageheader.open_checked(path, argument["format"], _LIMITS)
    try:
        hostfiles.check_place(os.path.realpath(f"/proc/self/fd/{fd}"), path, allowed)
        return fd, header
    except BaseException:
        os.close(fd)
        raise
