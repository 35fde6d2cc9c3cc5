"""VM.makeTemplate: snapshots, sysprepped, of copies of all disks of a VM that runs nowhere. One job on the VM.

The worker holds the VM's lease, so that nobody can start it, the data leases of its disks and their chains shared, and
those of the new images exclusively. The VM and its disks are only read. Killed during

    (queued)    the VM's record names the images that are to be; nothing of them is there
    measure     some of the new images are there, broken. Undone: they go
    copy        "
    examine     "
    sysprep     "
    commit      the VM's record says "committing": all data is complete, the new images' records follow

The new images are snapshots from the start: complete ones never change.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from vdsm import record, storage
from vdsm.jobs import worker
from vdsm.virt import guestfs, wholevm

KIND = "makeTemplate"


class _Copy(NamedTuple):
    """One new image. `fields` are its record's; `layers` are the files of its source, the top first."""

    repo: storage.Repository
    source: storage.Repository
    chain: list[record.Record]
    fields: dict[str, Any]

    @property
    def image_id(self) -> str:
        return str(self.fields["id"])

    def changing(self) -> contextlib.AbstractContextManager[str]:
        """The path of the whole copy, for a tool that writes it, too."""
        return storage.copying.changing(self.repo, self.fields)


@worker.body(KIND)
class MakeTemplate(wholevm.WholeVm):
    """argument: vm_slot, leases (of the disks and their chains, shared), accelerated, scratch_dir, and copies:
    [{target, source (descriptions), layers (records of the source's chain as planned), fields}...]."""

    stages = (*storage.copying.STAGES, guestfs.EXAMINE, guestfs.SYSPREP, wholevm.COMMIT)

    def run(self, ctx: worker.Context) -> None:
        copies = list(_copies(ctx.argument))
        slot = self.entity(ctx.argument)
        vm = {"repo": slot.lockspace, "id": slot.name}
        for copy in copies:
            storage.copying.check_unchanged(copy.source, copy.chain)
            image = storage.copying.begin(copy.repo, ctx.session, copy.fields, ctx.record["work"], vm)
            layers = storage.copying.layers_of(copy.source, copy.chain)
            with copy.source.reading(storage.copying.names_of(copy.chain)):
                storage.copying.fill(ctx, copy.repo, image, layers)
        with contextlib.ExitStack() as opened:
            paths = [opened.enter_context(copy.changing()) for copy in copies]
            formats = [copy.fields["data"]["format"] for copy in copies]
            guestfs.sysprep(ctx, list(zip(paths, formats, strict=True)))
            self.flush(ctx, paths)
        self.decide(ctx)

    def roll_forward(self, ctx: worker.Context) -> None:
        for copy in _copies(ctx.argument):
            storage.copying.complete(copy.repo, ctx.session, copy.image_id)

    def undo(self, ctx: worker.Context) -> None:
        for copy in _copies(ctx.argument):
            storage.copying.discard(copy.repo, ctx.session, copy.image_id, ctx.job_id)


def names(copies: list[dict[str, Any]]) -> dict[str, Any]:
    """What is being made, for the VM's record: {"images": {image id: data name}, "repo": where, a persistent name}."""
    images = {copy["fields"]["id"]: copy["fields"]["data"]["name"] for copy in copies}
    return {"images": images, "repo": copies[0]["target"]["name"]}


def _copies(argument: worker.Argument) -> Iterator[_Copy]:
    for copy in argument["copies"]:
        target, source = storage.open_repository(copy["target"]), storage.open_repository(copy["source"])
        yield _Copy(target, source, copy["layers"], copy["fields"])
