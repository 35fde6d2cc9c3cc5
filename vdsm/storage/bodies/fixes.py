"""Fixes of images, as job bodies: cleaning, and finishing what a verb has begun.

Each may be killed anywhere and run again, on any host. What an image shows is right at every moment; one that is broken
is broken until the last write. `fixclaims.begin_fix` has written the work into the record; a clean has no record to
write it to, since that is what goes.

    cleanImage         under the image's lease: looked at again; marked as being cleaned; data, record, slot; then what
                       it was based on, by the same rule
    cleanLeftovers     under the lease of the id that data carries: looked at again; removed
    createVirtualDisk  the data that the record names is made anew; record: complete
    createSnapshot     the disk's new data is made anew; the snapshot's record; the disk's record
    resizeVirtualDisk  the data grows; the record has the new size
    endWork            record: the work has ended. Nothing else was wrong

`merging.py` has those that store images in another way, `vmmending.py` those of jobs on whole VMs.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from vdsm import errors, leases, record
from vdsm.jobs import worker
from vdsm.storage import formats
from vdsm.storage.bodies import copying
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import LEASE_WAIT_S, Repository
from vdsm.storage.rules import chain, findings, models
from vdsm.storage.steps import checking, intents, removal, resizing


class Fix(worker.Body):
    """argument: target (a description), image_id, generation, names (of the work), below (ids of what it is based on,
    the nearest first)."""

    def target(self, argument: worker.Argument) -> Repository:
        return formats.open(argument["target"])

    def entity(self, argument: worker.Argument) -> record.Slot | None:
        return self.target(argument).slot(argument["image_id"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return image_leases(self.target(argument), argument)

    def undo(self, ctx: worker.Context) -> None:
        """Most have nothing to undo: what they did may be done again."""


def image_leases(repo: Repository, argument: worker.Argument) -> list[leases.Lease]:
    """The image's, exclusive, and those of all it is based on, shared."""
    below = [repo.slot(image_id).data_lease(shared=True) for image_id in argument["below"]]
    return [repo.slot(argument["image_id"]).data_lease(), *below]


def claimed_chain(repo: Repository, argument: worker.Argument) -> list[record.Record]:
    """The image and all below it, whose leases are held. Raises `RecordChanged` when the chain is not the one that was
    claimed."""
    images = chain.down(argument["image_id"], repo.find)
    if [image["id"] for image in images[1:]] != argument["below"]:
        raise errors.RecordChanged(entity=argument["image_id"], state="it is based on other images by now")
    return images


def run_tool(ctx: worker.Context, repo: Repository, argv: list[str], size_bytes: int) -> None:
    """qemu-img with its progress as the job's. Raises `ToolFailed`, `RepositoryFull`."""
    try:
        ctx.tool(argv, on_line=qemuimg.teller(ctx.progress), limits=qemuimg.limits(size_bytes))
    except errors.ToolFailed as error:
        raise qemuimg.explain(error, repo.repo_id) from error


# -- clean -----------------------------------------------------------------------------------------------------------


class _Clean(Fix):
    """argument: target, entity, guard."""

    def entity(self, argument: worker.Argument) -> None:
        return None

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return []  # taken one after the other: what may go next is known when one has gone


@worker.body(findings.CLEAN_IMAGE)
class CleanImage(_Clean):
    """argument: also vm (a description of the repository with the VM's record), when the guard names one."""

    def run(self, ctx: worker.Context) -> None:
        repo, image_id = self.target(ctx.argument), ctx.argument["entity"]
        try:
            with repo.owning(ctx.session, exclusive=[image_id]):
                self._check(repo, ctx.argument)
                repo.update(ctx.session, image_id, lambda found: {**found, "deleted": True})
                gone = removal.clean_held(repo, ctx.session, image_id)
        except errors.NoSuchImage:
            return  # somebody was quicker
        if gone is not None:
            removal.clean(repo, ctx.session, *sorted(chain.needs(gone)))

    def _check(self, repo: Repository, argument: worker.Argument) -> None:
        """Nobody can get to need it now: what is found now stays true. Raises `FixOutdated`, `NoSuchImage`."""
        image_id = argument["entity"]
        repo.get(image_id)
        found = findings.find(checking.survey(repo, (), held=[image_id]), findings.CLEAN_IMAGE, image_id)
        if found is None or found.guard != argument["guard"]:
            raise errors.FixOutdated(fix=findings.CLEAN_IMAGE, entity=image_id, reason="it has changed meanwhile")
        where = argument["guard"].get("vm")
        if where is not None:
            vm = formats.open(argument["vm"]).find_vm(where["id"])
            if vm is not None and chain.counts(vm) and image_id in findings.made_for_vm(vm):
                raise errors.FixOutdated(
                    fix=findings.CLEAN_IMAGE, entity=image_id, reason=f"it belongs to {vm['work']['kind']} of a VM"
                )


@worker.body(findings.CLEAN_LEFTOVERS)
class CleanLeftovers(_Clean):
    """Data whose slot is gone has no lease. Nobody gets one under the repository lease, and no slot is made for this:
    there may be no room."""

    def run(self, ctx: worker.Context) -> None:
        repo, image_id = self.target(ctx.argument), ctx.argument["entity"]
        if image_id in repo.image_ids():
            slot = repo.allocate(ctx.session, image_id)  # its maker may have died before it had its leases
            with repo.owning(ctx.session, exclusive=[image_id]):
                _remove_unnamed(repo, image_id)
                _free_empty(repo, ctx.session, slot)
        else:
            with ctx.session.holding([repo.lease()], LEASE_WAIT_S, patient=True):
                if image_id in repo.image_ids():
                    raise errors.FixOutdated(fix=findings.CLEAN_LEFTOVERS, entity=image_id, reason="it has a slot now")
                _remove_unnamed(repo, image_id)


def _remove_unnamed(repo: Repository, image_id: str) -> None:
    names = repo.data_names(image_id)  # before the records (trap 37)
    removal.remove_unnamed(repo, names)


@worker.body(findings.CLEAN_VM_SLOT)
class CleanVmSlot(_Clean):
    def run(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        vm_id = ctx.argument["entity"]
        if vm_id in repo.vm_ids():
            slot = repo.allocate_vm(ctx.session, vm_id)  # as for an image
            with ctx.session.holding([slot.data_lease()], LEASE_WAIT_S):
                _free_empty(repo, ctx.session, slot)


def _free_empty(repo: Repository, session: leases.Session, slot: record.Slot) -> None:
    """Takes back a slot without a record. Under the record lease too: a VM's first record is written under that."""
    with session.holding([slot.record_lease()], LEASE_WAIT_S, patient=True):
        try:
            record.read(slot)
        except errors.NoRecord:
            repo.free(session, slot)


# -- mend ------------------------------------------------------------------------------------------------------------


@worker.body("createVirtualDisk")
class CreateVirtualDisk(copying.Filling):
    """Makes the empty data that the record names. Aborted, nothing is left, as of a copy. argument: as `Fix`."""

    stages: ClassVar[Sequence[str]] = ()

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return image_leases(self.target(argument), argument)

    def run(self, ctx: worker.Context) -> None:
        repo, disk = self.target(ctx.argument), ctx.record
        base = repo.get(disk["base"]) if disk["base"] else None
        limits = qemuimg.limits(disk["size_bytes"])
        intents.make_data(repo, disk, base, lambda argv: ctx.tool(argv, limits=limits))


@worker.body("createSnapshot")
class CreateSnapshot(Fix):
    """On the disk. There is no way back from its record's naming the snapshot, so nothing is undone either."""

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        snapshot = self.target(argument).slot(argument["names"]["snapshot"])
        return [*super().leases(argument), snapshot.data_lease()]

    def run(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        intents.make_snapshot(repo, ctx.session, ctx.record, ctx.argument["names"])

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        return intents.on_snapshot(known, ctx.argument["names"])


@worker.body("resizeVirtualDisk")
class ResizeVirtualDisk(Fix):
    """As of a snapshot, there is only the way forward."""

    def run(self, ctx: worker.Context) -> None:
        resizing.set_size(self.target(ctx.argument), ctx.session, ctx.record, ctx.argument["names"]["size_bytes"])

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        return {"size_bytes": ctx.argument["names"]["size_bytes"], "status": models.settled(known)}


@worker.body(findings.END_WORK)
class EndWork(Fix):
    def run(self, ctx: worker.Context) -> None:
        """That the lease could be had says that nobody was at it."""
