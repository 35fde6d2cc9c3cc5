"""Mending a job on a whole VM whose maker is gone: finished when it was committed, else taken back.

    sysprep        committed: the overlays become the disks. Otherwise they go, and the disks are as they were
    makeTemplate   committed: the new images are complete. Otherwise they go

Every step may be done twice. Killed, the VM's record still names all that is left to do.
"""

from typing import Any

from vdsm import leases, record
from vdsm.jobs import worker
from vdsm.storage import formats
from vdsm.storage.bodies import copying, overlays
from vdsm.storage.repository import Repository
from vdsm.storage.rules import findings, models
from vdsm.storage.steps import removal


@worker.body(findings.MEND_VM)
class MendVm(worker.Body):
    """argument: target (a description), entity (the VM), generation, committed, and what the VM's record names:
    disks: [{repository (a description), image_id, change}...], images: [{repository, image_id}...]."""

    job_type = "virt"

    def entity(self, argument: worker.Argument) -> record.Slot:
        return formats.open(argument["target"]).vm_slot(argument["entity"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        """The disks' only when they are going to change: overlays that go leave them alone, and a disk that is switched
        already is its user's, who may run on it or have removed it."""
        changing = argument["disks"] if argument["committed"] else []
        places = [(formats.open(disk["repository"]), disk["image_id"], disk["change"]) for disk in changing]
        disks = [repo.slot(image_id) for repo, image_id, change in places if overlays.awaits(repo, image_id, change)]
        return [self.entity(argument).data_lease(), *(slot.data_lease() for slot in disks)]

    def run(self, ctx: worker.Context) -> None:
        if ctx.argument["committed"]:
            ctx.commit(lambda known: known)
            self.roll_forward(ctx)
        else:
            self._take_back(ctx)

    def roll_forward(self, ctx: worker.Context) -> None:
        for disk in ctx.argument["disks"]:
            overlays.commit(formats.open(disk["repository"]), ctx.session, disk["image_id"], disk["change"])
        for image in ctx.argument["images"]:
            copying.complete(formats.open(image["repository"]), ctx.session, image["image_id"])

    def _take_back(self, ctx: worker.Context) -> None:
        for disk in ctx.argument["disks"]:
            overlays.drop(formats.open(disk["repository"]), ctx.session, disk["image_id"], disk["change"])
        for image in ctx.argument["images"]:
            _discard(formats.open(image["repository"]), ctx.session, image["image_id"], self.entity(ctx.argument))

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        """What was taken back must not look as if it had been done."""
        kind = known["work"]["kind"] if ctx.argument["committed"] else findings.MEND_VM
        return {"work": {**known["work"], "kind": kind}}

    def undo(self, ctx: worker.Context) -> None:
        if ctx.argument["committed"]:
            self.roll_forward(ctx)  # died before it could say so again: there is only this way
        else:
            self._take_back(ctx)


def _discard(repo: Repository, session: leases.Session, image_id: str, vm: record.Slot) -> None:
    """Nothing is left of an image that the VM's job was making; any other image of that id stays."""
    known = repo.find(image_id)
    if known is None:
        removal.discard_held(repo, session, image_id)
    elif known["status"] == models.BROKEN and known["work"]["names"].get("vm", {}).get("id") == vm.name:
        repo.remove_data(known["data"]["name"])
        removal.discard_held(repo, session, image_id)
