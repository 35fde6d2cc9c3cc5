"""Records of VMs: what must be known of a VM that runs nowhere.

Fields: id, kind "vm", name, status "optimized", deleted, disks [{"repo": persistent name of a repository, "image_id"}],
generation, work, last_host, started, exit_code, exit_reason, exit_message, forgotten, version, writer; what they mean:
`virt/vmrecord.py`. Written by VM starts and ends under the record lease, by VM jobs under the VM's data lease, which a
running QEMU holds.

Runs in a repository's I/O child.
"""

from typing import Any

from vdsm import errors, leases, logs, record
from vdsm.storage.repository import LEASE_WAIT_S, Repository
from vdsm.storage.rules import models

Argument = dict[str, Any]

_log = logs.get("storage.vmrecords")

_BLANK = {
    **{"kind": models.VM, "status": models.OPTIMIZED, "deleted": False, "name": "", "disks": [], "generation": 0},
    **{"work": None, "last_host": None, "exit_code": None, "exit_reason": None, "exit_message": None},
}


def ensure_vm(repo: Repository, session: leases.Session, argument: Argument) -> dict[str, Any]:
    """{"slot", "record"} of the VM; made with `fields` if there is none, left as it is otherwise. argument: vm_id,
    fields.

    Raises `IdTaken` for an image's id. Killed: the record is there whole or not at all; at most a slot without a record
    is left.
    """
    vm_id = argument["vm_id"]
    slot, known = repo.vm_slot(vm_id), repo.find_vm(vm_id)
    if known is None:
        slot = repo.allocate_vm(session, vm_id)
        with session.holding([slot.record_lease()], LEASE_WAIT_S, patient=True):
            known = repo.find_vm(vm_id)  # two may have found none
            if known is None:
                fields = {**_BLANK, "id": vm_id, "writer": models.writer(repo.host_id), **argument["fields"]}
                known = record.create(slot, fields)
    return {"slot": list(slot), "record": known}


def remove_vm(repo: Repository, session: leases.Session, argument: Argument) -> None:
    """Removes the VM's record with its leases; a slot whose maker died, too. argument: vm_id.

    Killed: it is there, or gone, or at most a slot without a record is left. Raises `NoSuchLease`, `LeaseHeld`, and
    `VmRuns` while work on it is open, `RecordNotOwned`.
    """
    vm_id = argument["vm_id"]
    slot = repo.vm_slot(vm_id)
    if vm_id not in repo.vm_ids():
        raise errors.NoSuchLease(lease_id=vm_id, repo_id=repo.repo_id)
    if repo.find_vm(vm_id) is None:
        repo.allocate_vm(session, vm_id)  # a dead maker's may lack its leases
    with session.holding([slot.data_lease()], LEASE_WAIT_S):
        known = repo.find_vm(vm_id)
        if known is not None and models.is_open(known):
            work = known["work"]
            raise errors.VmRuns(vm_id=vm_id, holder=f"job {work['job_id']} ({work['state']}, host {work['host_id']})")
        record.check_writer(slot)
        repo.free(session, slot)


def change_vm(repo: Repository, session: leases.Session, argument: Argument) -> record.Record:
    """The VM's record with `changes` made to it. argument: vm_id, changes. Raises `NoRecord`."""
    if repo.find_vm(argument["vm_id"]) is None:
        raise errors.NoRecord(path=argument["vm_id"], reason="no such VM in this repository")
    return record.update(session, repo.vm_slot(argument["vm_id"]), lambda vm: {**vm, **argument["changes"]})


def end_vms(repo: Repository, session: leases.Session, argument: Argument) -> dict[str, Any]:
    """VMs that ran last on this host and have ended: {"ended": their records, "held": ids of those that nobody has
    ended and whose lease is not free, or cannot be told}.

    argument: host_name, ending (exit fields for a record that has none yet), skip (ids that are not looked at). VMs
    that were destroyed on request are left out. That a VM has ended is proved by its lease: it is held while its end is
    written. Killed: some have their end, some not.
    """
    found: dict[str, list[Any]] = {"ended": [], "held": []}
    for vm_id, vm in repo.vms().items():
        if vm_id in argument["skip"] or not _ran_here(vm, argument["host_name"]):
            continue
        try:
            ended = vm if vm["exit_code"] is not None else _end(repo, session, vm_id, argument)
        except (errors.LeaseHeld, errors.LeaseFailed, errors.RecordNotOwned) as error:
            _log.info("VM %s may still run: %s", vm_id, error)
            found["held"].append(vm_id)
        else:
            found["ended"] += [ended] if _ran_here(ended, argument["host_name"]) else []
    return found


def _ran_here(vm: record.Record, host_name: str) -> bool:
    return vm["last_host"] == host_name and vm.get("started") is not None and not vm.get("forgotten")


def _end(repo: Repository, session: leases.Session, vm_id: str, argument: Argument) -> record.Record:
    """The VM's record with its end. Raises `LeaseHeld` when somebody runs it."""

    def change(vm: record.Record) -> record.Record | None:
        if vm["exit_code"] is not None or not _ran_here(vm, argument["host_name"]):
            return None  # somebody was quicker
        return {**vm, **argument["ending"]}

    slot = repo.vm_slot(vm_id)
    with session.holding([slot.data_lease()], LEASE_WAIT_S):
        return record.update(session, slot, change)
