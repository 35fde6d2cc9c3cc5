"""VM.sysprep: removes what makes a guest unique from all disks of a VM that runs nowhere. One job on the VM.

The worker holds the VM's lease, so that nobody can start it, and the data leases of its disks, and works on hidden
overlays (`storage.overlays`). Killed during

    (queued)    nothing has happened
    overlay     the VM's record names the overlays; some are there. Undone: they go, the VM is as it was
    examine     "
    sysprep     "; at its end the disks' records are claimed, so that nobody gets between the commit and its end
    commit      the VM's record says "committing" and lists what each disk becomes: rolled forward from there

An abort, up to the commit, leaves the VM untouched.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from vdsm import storage
from vdsm.jobs import worker
from vdsm.virt import guestfs, wholevm

KIND = "sysprep"
OVERLAY = "overlay"
_OVERLAY_FORMAT = "qcow2"


class _Disk(NamedTuple):
    """One disk of the VM, and what its overlay is called."""

    repo: storage.Repository
    image_id: str
    change: dict[str, str]


@worker.body(KIND)
class Sysprep(wholevm.WholeVm):
    """argument: vm_slot, leases (of the disks and their chains), accelerated, scratch_dir, and disks: [{repository (a
    description), image_id, change}...]."""

    stages = (OVERLAY, guestfs.EXAMINE, guestfs.SYSPREP, wholevm.COMMIT)

    def run(self, ctx: worker.Context) -> None:
        disks = list(_disks(ctx.argument))
        slot = self.entity(ctx.argument)
        vm = {"repo": slot.lockspace, "id": slot.name}
        ctx.stage(OVERLAY)
        for disk in disks:
            storage.overlays.begin(disk.repo, ctx.session, disk.image_id, disk.change, ctx.record["work"], vm)
        with contextlib.ExitStack() as opened:
            changing = [storage.overlays.changing(disk.repo, disk.image_id, disk.change) for disk in disks]
            paths = [opened.enter_context(overlay) for overlay in changing]
            guestfs.sysprep(ctx, [(path, _OVERLAY_FORMAT) for path in paths])
            for disk in disks:
                storage.overlays.claim(disk.repo, ctx.session, disk.image_id, disk.change, ctx.record["work"], vm)
            self.flush(ctx, paths)
        self.decide(ctx)

    def roll_forward(self, ctx: worker.Context) -> None:
        for disk in _disks(ctx.argument):
            storage.overlays.commit(disk.repo, ctx.session, disk.image_id, disk.change)

    def undo(self, ctx: worker.Context) -> None:
        for disk in _disks(ctx.argument):
            storage.overlays.drop(disk.repo, ctx.session, disk.image_id, disk.change)


def names(disks: list[dict[str, Any]]) -> dict[str, Any]:
    """What is being made, for the VM's record: {"disks": {disk id: {"hidden": id, "data": name}}, "repos": {disk id:
    persistent name}}."""
    changes = {disk["image_id"]: disk["change"] for disk in disks}
    return {"disks": changes, "repos": {disk["image_id"]: disk["repository"]["name"] for disk in disks}}


def _disks(argument: worker.Argument) -> Iterator[_Disk]:
    for disk in argument["disks"]:
        yield _Disk(storage.open_repository(disk["repository"]), disk["image_id"], disk["change"])
