"""Which VMs of a repository ended here while nobody watched: records and leases, nothing else."""

from typing import Any

import pytest

from tests import storage_fixture
from tests.storage_fixture import Shelf
from vdsm import ids, leases
from vdsm.storage.steps import vmrecords

world, shelf = storage_fixture.world, storage_fixture.shelf

ENDING = {"exit_code": 1, "exit_reason": 2, "exit_message": "unseen"}
RAN_HERE = {"last_host": storage_fixture.HOST_NAME, "started": 1000.0}


def a_vm(shelf: Shelf, **fields: Any) -> str:
    vm_id = ids.new()
    vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {"name": "web"}})
    vmrecords.change_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "changes": fields})
    return vm_id


def look(shelf: Shelf, *skip: str) -> tuple[list[str], list[str]]:
    """Ids of those that ended, and of those that may run."""
    argument = {"host_name": storage_fixture.HOST_NAME, "ending": ENDING, "skip": list(skip)}
    found = vmrecords.end_vms(shelf.repo, shelf.session, argument)
    return [vm["id"] for vm in found["ended"]], found["held"]


def ending_of(shelf: Shelf, vm_id: str) -> dict[str, Any]:
    found = shelf.repo.find_vm(vm_id)
    assert found is not None
    return {name: found[name] for name in ENDING}


def test_a_vm_without_an_end_whose_lease_is_free_gets_one(shelf: Shelf) -> None:
    vm_id = a_vm(shelf, **RAN_HERE)
    assert look(shelf) == ([vm_id], [])
    assert ending_of(shelf, vm_id) == ENDING
    assert look(shelf) == ([vm_id], []), "until somebody forgets it"
    vmrecords.change_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "changes": {"forgotten": True}})
    assert look(shelf) == ([], [])


def test_an_end_that_is_known_stays(shelf: Shelf) -> None:
    known = {"exit_code": 0, "exit_reason": 7, "exit_message": "the guest powered off"}
    vm_id = a_vm(shelf, **RAN_HERE, **known)
    assert look(shelf) == ([vm_id], [])
    assert ending_of(shelf, vm_id) == known


def test_a_vm_whose_lease_is_held_is_left_alone(shelf: Shelf) -> None:
    vm_id = a_vm(shelf, **RAN_HERE)
    with leases.Session() as qemu, qemu.holding([shelf.repo.vm_slot(vm_id).data_lease()], 1):
        assert look(shelf) == ([], [vm_id])
    assert ending_of(shelf, vm_id)["exit_code"] is None


NOT_OURS: dict[str, dict[str, Any]] = {
    "another host's": {**RAN_HERE, "last_host": "elsewhere"},
    "never started": {"last_host": None},
    "destroyed on request": {**RAN_HERE, **ENDING, "forgotten": True},
}


@pytest.mark.parametrize("fields", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_others_are_not_told(shelf: Shelf, fields: dict[str, Any]) -> None:
    vm_id = a_vm(shelf, **fields)
    before = shelf.repo.find_vm(vm_id)
    assert look(shelf) == ([], [])
    assert shelf.repo.find_vm(vm_id) == before


def test_a_vm_that_the_agent_knows_is_not_looked_at(shelf: Shelf) -> None:
    vm_id = a_vm(shelf, **RAN_HERE)
    assert look(shelf, vm_id) == ([], [])
    assert ending_of(shelf, vm_id)["exit_code"] is None
