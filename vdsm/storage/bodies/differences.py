"""An image's data as the difference to another image: what copyImage stores when the target repository has a base.

    new data --+-- source chain      while it is made: empty at first, it shows what the source does
               +-- base chain        in the end: it holds what the two differ in, and shows the source still

`qemu-img convert -B` is no difference: it takes the source's backing for the base (trap 34). `qemu-img rebase` does,
but opens the new backing by a name, and what lies below that as the headers say. So it is given a stand-in: a chain of
empty images in this process's memory, whose headers, ours, name every file of the base chain with its format
(trap 42). The source chain is told on the command line, as everywhere; no header ever names a file of it.

How large a difference is, is known when it was made. A volume is given a step of room, and twice as much whenever that
was too little; then the data is made anew, so in all no more than twice as much is read and written.

Runs in a worker that holds the leases of all files involved. A crash leaves data that nothing shows rightly: it is
never opened, only made anew. The stand-ins go with the process.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vdsm import errors, record
from vdsm.jobs import context
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import models


class Below(NamedTuple):
    """A file of the base chain, and the size of the image whose data it is."""

    layer: qemuimg.Layer
    size_bytes: int


def make(
    ctx: context.Context,
    target: Repository,
    image: record.Record,
    chain: Sequence[qemuimg.Layer],
    base: Sequence[Below],
) -> None:
    """Makes the data of `image`, which is to lie on the chain `base`, show what `chain` does. On stable storage at
    return. Both chains top first, their data readable. Raises `ToolFailed`, `Aborted`."""
    made = target.layer(image["data"], image["size_bytes"])
    limits = qemuimg.limits(image["size_bytes"])
    room_bytes = target.first_room(made.format, image["size_bytes"])
    with target.making(image["data"]["name"], room_bytes), stand_in(ctx, base) as backing:
        while True:
            ctx.tool(qemuimg.create(made, image["size_bytes"]), limits=limits)
            try:
                told = qemuimg.teller(ctx.progress)
                ctx.tool(qemuimg.rebase(made, chain, backing), on_line=told, limits=limits)
                break
            except errors.ToolFailed as error:
                if target.abilities.thin or not qemuimg.is_full(error):
                    raise
            room_bytes *= 2
            with target.changing(image["data"]["name"], room_bytes):
                pass  # it has the room now
        ctx.tool(qemuimg.name_backing(made, base[0].layer), limits=limits)


@contextlib.contextmanager
def stand_in(ctx: context.Context, chain: Sequence[Below]) -> Iterator[qemuimg.Layer]:
    """A file that shows what `chain` does, to whoever opens it by its name. Empty chains have none."""
    with contextlib.ExitStack() as kept:
        path: str | None = None
        for layer, size_bytes in reversed(chain):
            fd = os.memfd_create("stand-in")
            kept.callback(os.close, fd)
            # Tools have descriptors of their own: they find this one by this process's number.
            path, below = f"/proc/{os.getpid()}/fd/{fd}", path
            ctx.tool(qemuimg.stand_in(path, layer, size_bytes, below))
        assert path is not None
        yield qemuimg.Layer(path, models.QCOW2)
