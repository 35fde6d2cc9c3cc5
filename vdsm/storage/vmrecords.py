"""Records of VMs: what must be known of a VM that runs nowhere.

Fields: id, kind "vm", name, status "optimized", deleted, disks [{"repo": persistent name of a repository, "image_id"}],
generation, work, last_host, exit_code, exit_reason, exit_message, version, writer. Written by VM starts and ends
under the record lease, by VM jobs under the VM's data lease, which a running QEMU holds.

Runs in a repository's I/O child.
"""

from typing import Any

from vdsm import errors, leases, record
from vdsm.storage import models
from vdsm.storage.repository import LEASE_WAIT_S, Repository

Argument = dict[str, Any]

_BLANK = {
    **{"kind": models.VM, "status": models.OPTIMIZED, "deleted": False, "name": "", "disks": [], "generation": 0},
    **{"work": None, "last_host": None, "exit_code": None, "exit_reason": None, "exit_message": None},
}


def ensure_vm(repo: Repository, session: leases.Session, argument: Argument) -> record.Record:
    """The VM's record; made with `fields` if there is none, left as it is otherwise. argument: vm_id, fields.

    Killed: the record is there whole or not at all; at most a slot without a record is left.
    """
    vm_id = argument["vm_id"]
    slot, known = repo.vm_slot(vm_id), repo.find_vm(vm_id)
    if known is None:
        repo.allocate(session, slot)
        with session.holding([slot.record_lease()], LEASE_WAIT_S, patient=True):
            known = repo.find_vm(vm_id)  # two may have found none
            if known is None:
                fields = {**_BLANK, "id": vm_id, "writer": models.writer(repo.host_id), **argument["fields"]}
                known = record.create(slot, fields)
    return known


def change_vm(repo: Repository, session: leases.Session, argument: Argument) -> record.Record:
    """The VM's record with `changes` made to it. argument: vm_id, changes. Raises `NoRecord`."""
    if repo.find_vm(argument["vm_id"]) is None:
        raise errors.NoRecord(path=argument["vm_id"], reason="no such VM in this repository")
    changes = {**argument["changes"], "writer": models.writer(repo.host_id)}
    return record.update(session, repo.vm_slot(argument["vm_id"]), lambda vm: {**vm, **changes})
