"""exportImage: what an image shows becomes a file of this host.

    request     the source is whole and nobody writes it; the place is allowed, free and writable; nothing is made
    measure     the source's records are as planned; there is room
    export      the file is made under a name of its own, whole, and flushed
    (commit)    it gets its name; an abort is refused from here on

The image is only read, so its record knows nothing of the job: a shared lease on the whole chain keeps everybody from
writing it. A file that has its name is whole. After an abort, a failure or the worker's death nothing is left; the
agent's death leaves a hidden file `.JOB.part`, which the same request with the same job's id replaces, or takes away
when it is a second name of the whole file.
"""

import json
from typing import Any

from vdsm import errors, leases
from vdsm.jobs import worker
from vdsm.storage import formats
from vdsm.storage.bodies import copying
from vdsm.storage.files import hostfiles, qemuimg
from vdsm.storage.repository import Repository

MEASURE, EXPORT = "measure", "export"


def check_export(repo: Repository, argument: dict[str, Any]) -> None:
    """Raises what the job would of its place: `PathNotAllowed`, `HostFileExists`, `HostFileFailed`.

    argument: path, overwrite, allowed_dirs, job_id. Runs in the I/O child of the image's repository.
    """
    with hostfiles.new_file(argument["path"], argument["job_id"], argument["allowed_dirs"]) as file:
        file.check_free(overwrite=argument["overwrite"])
        file.check_writable()


@worker.body("exportImage")
class ExportImage(worker.Body):
    """argument: source (a description), layers (records of the chain as planned), path, format, overwrite,
    allowed_dirs, job_id."""

    stages = (MEASURE, EXPORT)

    def entity(self, argument: worker.Argument) -> None:
        return None

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        source = formats.open(argument["source"])
        return [source.slot(layer["id"]).data_lease(shared=True) for layer in argument["layers"]]

    def run(self, ctx: worker.Context) -> None:
        argument = ctx.argument
        source = formats.open(argument["source"])
        copying.check_unchanged(source, argument["layers"])
        layers = copying.layers_of(source, argument["layers"])
        limits = qemuimg.limits(argument["layers"][0]["size_bytes"])
        readable = source.reading(copying.names_of(argument["layers"]))
        with readable, hostfiles.new_file(argument["path"], argument["job_id"], argument["allowed_dirs"]) as file:
            ctx.stage(MEASURE)
            said = ctx.tool(qemuimg.measure(layers, argument["format"]), limits=limits).stdout
            if json.loads(said)["required"] > file.free_bytes():
                raise errors.HostFileFailed(path=argument["path"], reason="there is not enough space")
            ctx.stage(EXPORT)
            with file.making() as made:
                target = qemuimg.Layer(made, argument["format"], direct=hostfiles.is_direct(made))
                self._fill(ctx, qemuimg.convert(layers, target, sparse=True), limits)
            ctx.commit(lambda known: known)
            file.publish(overwrite=argument["overwrite"])

    def _fill(self, ctx: worker.Context, argv: list[str], limits: Any) -> None:
        try:
            ctx.tool(argv, on_line=qemuimg.teller(ctx.progress), limits=limits)
        except errors.ToolFailed as error:
            if qemuimg.is_full(error):
                raise errors.HostFileFailed(path=ctx.argument["path"], reason="no space left") from error
            raise

    def undo(self, ctx: worker.Context) -> None:
        argument = ctx.argument
        with hostfiles.new_file(argument["path"], argument["job_id"], argument["allowed_dirs"]) as file:
            file.discard()
