"""checksumImage: the sha256 of an image's raw content, as a guest sees it, goes into the image's record.

The argument: {"slot": [lockspace, name, path, offset], "data": path, "format": "raw" | "qcow2", "scratch": path}.
A kill during `convert` or `hash` leaves the scratch file, which `undo` removes; the image is only read.
"""

import hashlib
import re
from pathlib import Path

from vdsm import leases, record
from vdsm.jobs import worker

_PERCENT = re.compile(r"\((\d+)\.\d+/100%\)")
_CHUNK_BYTES = 1 << 20


@worker.body("checksumImage")
class ChecksumImage(worker.Body):
    """The image relies on nobody writing it: a shared lease. `scratch` is a path of this job alone."""

    stages = ("convert", "hash")

    def entity(self, argument: worker.Argument) -> record.Slot:
        return record.Slot(*argument["slot"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return [self.entity(argument).data_lease(shared=True)]

    def run(self, ctx: worker.Context) -> None:
        scratch = Path(ctx.argument["scratch"])

        def show(line: str) -> None:
            if found := _PERCENT.search(line):
                ctx.progress(int(found[1]))

        ctx.stage("convert")
        source = [ctx.argument["format"], "-O", "raw", ctx.argument["data"], str(scratch)]
        ctx.tool(["qemu-img", "convert", "-p", "-f", *source], on_line=show)
        ctx.stage("hash")
        digest, size_bytes, done = hashlib.sha256(), scratch.stat().st_size, 0
        with scratch.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                ctx.progress(done * 100 // size_bytes)
        self._digest = digest.hexdigest()
        scratch.unlink()

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, object]:
        return {"sha256": self._digest}

    def undo(self, ctx: worker.Context) -> None:
        Path(ctx.argument["scratch"]).unlink(missing_ok=True)
