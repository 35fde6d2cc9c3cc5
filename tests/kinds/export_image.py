"""A complete job kind: writes an image's data into a file, as `docs/jobs.md` explains.

The argument: {"slot": [lockspace, name, path, offset], "data": path, "format": "raw" | "qcow2", "target": path}.
"""

import re
from pathlib import Path

from vdsm import leases, record
from vdsm.jobs import worker

_PERCENT = re.compile(r"\((\d+)\.\d+/100%\)")


@worker.body("exampleExport")
class ExportImage(worker.Body):
    """A crash at any point leaves a target that `undo` removes; the image is only read."""

    stages = ("convert", "compare")

    def entity(self, argument: worker.Argument) -> record.Slot:
        return record.Slot(*argument["slot"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return [self.entity(argument).data_lease()]

    def outputs(self, argument: worker.Argument) -> list[str]:
        return [argument["target"]]

    def run(self, ctx: worker.Context) -> None:
        source, target, source_format = ctx.argument["data"], ctx.argument["target"], ctx.argument["format"]

        def show(line: str) -> None:
            if found := _PERCENT.search(line):
                ctx.progress(int(found[1]))

        ctx.stage("convert")
        ctx.tool(["qemu-img", "convert", "-p", "-f", source_format, "-O", "raw", source, target], on_line=show)
        ctx.stage("compare")
        ctx.tool(["qemu-img", "compare", "-p", "-f", source_format, "-F", "raw", source, target], on_line=show)

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, object]:
        return {"exported": [*known.get("exported", []), ctx.argument["target"]]}

    def undo(self, ctx: worker.Context) -> None:
        Path(ctx.argument["target"]).unlink(missing_ok=True)
