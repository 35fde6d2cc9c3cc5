"""Jobs on whole VMs: the claim in the VM's record that the job's worker takes up.

Runs in a repository's I/O child. The claim is the commit of the request: from then on no host starts the VM, until the
work has ended or was taken over.
"""

from typing import Any

from vdsm import errors, leases, record
from vdsm.storage.repository import LEASE_WAIT_S, Repository
from vdsm.storage.rules import models

Argument = dict[str, Any]


def claim_vm(repo: Repository, session: leases.Session, argument: Argument) -> dict[str, Any]:
    """Writes work "queued" into the VM's record: {"slot", "record"}. A claim of the same job is left as it is.

    argument: vm_id, job_id, kind, generation (expected, or None), names (of what is going to be made). Raises
    `NoSuchVm`, `VmRuns` naming who holds the VM, `GenerationMismatch`. Killed: the VM is claimed or it is not.
    """
    vm_id = argument["vm_id"]
    slot = repo.vm_slot(vm_id)
    if repo.find_vm(vm_id) is None:
        raise errors.NoSuchVm(vm_id=vm_id)
    try:
        with session.holding([slot.data_lease()], LEASE_WAIT_S):
            since = repo.host_generation(slot)
            known = record.update(session, slot, lambda vm: _claimed(repo, vm, argument, since))
            return {"slot": list(slot), "record": known}
    except errors.LeaseHeld as error:
        raise errors.VmRuns(vm_id=vm_id, holder=error.facts["holder"]) from error


def _claimed(repo: Repository, vm: record.Record, argument: Argument, since: int | None) -> record.Record | None:
    if models.is_open(vm):
        if vm["work"]["job_id"] == argument["job_id"]:
            return None
        raise errors.VmRuns(vm_id=vm["id"], holder=f"job {vm['work']['job_id']} ({vm['work']['state']})")
    models.check_generation(vm, argument["generation"])
    job_id, names = argument["job_id"], argument["names"]
    work = models.work(argument["kind"], repo.host_id, names, job_id=job_id, host_generation=since)
    return {**vm, "work": work}


def unclaim_vm(repo: Repository, session: leases.Session, argument: Argument) -> record.Record:
    """Takes back the claim of a job that was refused. argument: vm_id, job_id. One that has begun stays."""

    def change(vm: record.Record) -> record.Record | None:
        work = vm["work"] or {}
        return (
            {**vm, "work": None} if (work.get("job_id"), work.get("state")) == (argument["job_id"], "queued") else None
        )

    return record.update(session, repo.vm_slot(argument["vm_id"]), change)
