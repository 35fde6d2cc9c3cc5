"""What jobs on all disks of a VM that runs nowhere have in common: whose record, which leases, one decision for all.

The worker holds the VM's lease, so that nobody can start it, beside those of its images. The images get their data one
by one; what becomes of all of them is decided by a single write of the VM's record, the commit.
"""

from collections.abc import Iterable

from vdsm import leases, record
from vdsm.jobs import worker

COMMIT = "commit"  # stage


class WholeVm(worker.Body):
    """Of the job's argument it reads vm_slot and leases (of images)."""

    job_type = "virt"

    def entity(self, argument: worker.Argument) -> record.Slot:
        return record.Slot(*argument["vm_slot"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return [self.entity(argument).data_lease(), *(leases.Lease(*wanted) for wanted in argument["leases"])]

    def flush(self, ctx: worker.Context, paths: Iterable[str]) -> None:
        """The data in `paths` is complete: onto stable storage with it."""
        for path in paths:
            ctx.flush(path)

    def decide(self, ctx: worker.Context) -> None:
        """The end of `run`. Killed before the commit it is undone, after it rolled forward."""
        ctx.stage(COMMIT)
        ctx.commit(lambda known: known)
        self.roll_forward(ctx)
