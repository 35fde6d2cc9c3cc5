"""Two hosts on one repository: what each can tell of the other's work, and how it is taken away."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import second_host, storage_fixture
from tests.until import until
from vdsm import errors, ids, leases, record
from vdsm.storage.formats import filelayout
from vdsm.storage.steps import vmrecords

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service = storage_fixture.Shelf, storage_fixture.Service

MIB = 1 << 20


@pytest.fixture(scope="module")
def machine(service: Service, world: storage_fixture.World) -> Iterator[second_host.SecondHost]:
    repo = world.main
    made = second_host.SecondHost(repo, storage_fixture.describe(Path(repo.place), "main"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def other(machine: second_host.SecondHost, shelf: Shelf) -> Iterator[second_host.SecondHost]:
    """Alive at the beginning, whatever a test before did to it."""
    if machine.ended() or machine.state != "live":
        machine.stop()
        machine.start()
    yield machine


def begun(other: second_host.SecondHost, **given: Any) -> dict[str, Any]:
    """A copy that is queued on the other host: {image_id, job_id}."""
    asked = {"kind": "disk", "size_bytes": MIB, "strategy": "space", "user_data": {}, "digest": "a copy"}
    told = {"verb": "copyImage", "job_id": ids.new(), "source": {}, "image_id": ids.new()}
    return dict(other("begin_copy", {**asked, **told, **given}))


def verdict(service: Service, target: dict[str, Any], job_id: str | None = None) -> dict[str, Any]:
    return dict(service.storage.get_image_status("main", target["image_id"], job_id)["verdict"])


def fence(service: Service, target: dict[str, Any], **given: Any) -> dict[str, Any]:
    return service.storage.fence_lease("main", target["image_id"], **given)


def test_queued_on_a_living_host_is_queued(service: Service, other: second_host.SecondHost) -> None:
    target = begun(other)
    assert verdict(service, target)["state"] == "queued"
    assert verdict(service, target, target["job_id"])["state"] == "queued"
    assert verdict(service, target, "another")["state"] == "superseded"


def test_running_on_a_living_host_is_running_until_its_worker_ends(
    service: Service, shelf: Shelf, other: second_host.SecondHost
) -> None:
    target = begun(other)
    other("claim", target)
    assert verdict(service, target)["state"] == "running"
    status = service.storage.lease_status("main", target["image_id"])
    assert status["owners"] == [2]
    assert status["holders"] == [{"host_id": 2, "host_state": "live", "holder": f"job {target['job_id']}"}]
    with pytest.raises(errors.LeaseHeld) as refused:
        fence(service, target)
    assert refused.value.facts["holder"] == f"job {target['job_id']} on host 2"
    assert shelf.image(target["image_id"])["work"]["state"] == "running"

    other.kill()  # the worker alone; its host lives on
    until(lambda: verdict(service, target)["state"] == "interrupted")


def test_host_that_joined_anew_has_lost_its_queue_and_its_leases(
    service: Service, other: second_host.SecondHost
) -> None:
    """Power lost and back, before anybody would have called it dead."""
    queued, running = begun(other), begun(other)
    other("claim", running)
    other.stop()
    other.start()
    for target in (queued, running):
        found = verdict(service, target)
        assert (found["state"], found["reason"]) == ("interrupted", "host 2 joined anew since")
    fenced = fence(service, running, generation=0, job_id=running["job_id"])
    assert (fenced["verdict"]["state"], fenced["generation"], fenced["owners"]) == ("fenced", 1, [])


def test_failing_host_is_waited_for_outside_sanlock(
    service: Service, shelf: Shelf, other: second_host.SecondHost
) -> None:
    """It may come back: nothing is taken, sanlock is not asked for what it could only wait for, and other leases are
    had as fast as ever (trap 8)."""
    target, disk = begun(other), shelf.disk()
    other("claim", target)
    with other.silent():
        until(lambda: other.state == "failing")
        assert verdict(service, target)["state"] == "unknown"
        assert service.storage.get_image_status("main", target["image_id"])["work"]["state"] == "running"
        began = time.monotonic()
        for force in (False, True):
            with pytest.raises(errors.OwnerUndecided):
                fence(service, target, force=force)
        with leases.Session() as session, pytest.raises(errors.LeaseHeld):
            session.acquire([shelf.repo.slot(target["image_id"]).data_lease()], 0.5)
        with leases.Session() as session, session.holding([shelf.repo.slot(disk).data_lease()], 1):
            pass
        assert time.monotonic() - began < 40, "sanlock waits for about a minute"
    # Its sanlock finds that it has come too late, unless a renewal of its is quicker than its look at the clock.
    until(lambda: other.ended() or other.state == "live")
    assert shelf.image(target["image_id"])["generation"] == 0


def test_stopped_holder_is_killed_by_its_own_sanlock_when_forced(
    service: Service, shelf: Shelf, other: second_host.SecondHost, caplog: pytest.LogCaptureFixture
) -> None:
    """Its host renews its lease for ever (trap 16)."""
    target = begun(other)
    other("claim", target)
    other.freeze()
    with pytest.raises(errors.LeaseHeld):
        fence(service, target)
    assert not other.ended()

    fenced = fence(service, target, generation=0, job_id=target["job_id"], force=True, who="the test")

    assert other.ended()
    assert (fenced["verdict"]["state"], fenced["work"]["state"], fenced["generation"]) == ("fenced", "fenced", 1)
    assert shelf.image(target["image_id"])["status"] == "broken"
    assert [line for line in caplog.messages if "audit: the test has the holder" in line and target["job_id"] in line]


def test_late_worker_finds_the_work_no_longer_its_own(
    service: Service, shelf: Shelf, other: second_host.SecondHost
) -> None:
    """Queued there, fenced here: never started is final from then on (trap 23)."""
    target = begun(other)
    fence(service, target, generation=0, job_id=target["job_id"])
    before = shelf.image(target["image_id"])
    with pytest.raises(errors.Superseded):
        other("claim", target)
    assert shelf.image(target["image_id"]) == before
    found = verdict(service, target, target["job_id"])
    assert (found["state"], found["final"]) == ("fenced", True)


def test_writer_that_joined_anew_is_no_alarm(shelf: Shelf, other: second_host.SecondHost) -> None:
    """Its record says the generation in which it owned the lease, and so does the lease (trap 30)."""
    target = begun(other)
    other("know_itself", None)
    other("claim", target)
    slot = shelf.repo.slot(target["image_id"])
    said, before = shelf.image(slot.name)["writer"], other.generation
    assert (said["host_id"], said["host_generation"]) == (second_host.HOST_ID, before)
    other.stop()
    other.start()
    assert other.generation != before
    record.check_writer(slot)
    storage_fixture.forge(slot, host_generation=other.generation)
    with pytest.raises(errors.RecordNotOwned):
        record.check_writer(slot)


def test_fence_says_what_it_expects(service: Service, shelf: Shelf, other: second_host.SecondHost) -> None:
    target = begun(other)
    for expected, refusal in (({"generation": 7}, errors.GenerationMismatch), ({"job_id": "x"}, errors.Superseded)):
        with pytest.raises(refusal):
            fence(service, target, **expected)
    assert shelf.image(target["image_id"])["work"]["state"] == "queued"
    work = shelf.image(target["image_id"])["work"]
    shelf.change(target["image_id"], work={**work, "state": "committing"})
    with pytest.raises(errors.WorkCommitted):
        fence(service, target)
    shelf.change(target["image_id"], work=work)
    once = fence(service, target, generation=0, job_id=target["job_id"])
    again = fence(service, target, generation=0, job_id=target["job_id"])
    assert once["generation"] == again["generation"] == 1


def test_work_on_a_vm_is_fenced_and_begun_here(service: Service, shelf: Shelf, other: second_host.SecondHost) -> None:
    """As for a VM that was being sysprepped on a host that is lost: by the lease of the VM and its generation."""
    vm_id, job_id = ids.new(), ids.new()
    claim = {"vm_id": vm_id, "job_id": job_id, "kind": "sysprep", "generation": 0, "names": {}}
    other("ensure_vm", {"vm_id": vm_id, "fields": {}})
    other("claim_vm", claim)
    assert service.storage.lease_status("main", vm_id, job_id)["verdict"]["state"] == "queued"
    with pytest.raises(errors.VmRuns):
        service.storage.delete_lease("main", vm_id)

    fenced = service.storage.fence_lease("main", vm_id, 0, job_id)

    assert (fenced["verdict"]["state"], fenced["generation"]) == ("fenced", 1)
    with pytest.raises(errors.GenerationMismatch):  # the same request, once more, by whoever has not heard of it
        other("claim_vm", claim)
    service.storage.claim_vm("main", vm_id, job_id=ids.new(), kind="sysprep", generation=1, names={})
    status = service.storage.lease_status("main", vm_id, job_id)
    assert status["verdict"]["state"] == "superseded"
    service.storage.fence_lease("main", vm_id)
    service.storage.delete_lease("main", vm_id)


@pytest.mark.parametrize(
    "step", [(record, "erase"), (filelayout, "_remove")], ids=["before the record", "before the slot"]
)
def test_killed_removal_of_a_vm_lease_is_done_again(shelf: Shelf, step: tuple[Any, str]) -> None:
    vm_id = ids.new()
    vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {}})

    def act() -> None:
        storage_fixture.dies_before(*step)
        with leases.Session() as session:
            vmrecords.remove_vm(shelf.repo, session, {"vm_id": vm_id})

    storage_fixture.killed(act)
    vmrecords.remove_vm(shelf.repo, shelf.session, {"vm_id": vm_id})
    assert shelf.files() == set()


def test_lease_whose_maker_died_before_it_was_one_is_removed(shelf: Shelf) -> None:
    vm_id = ids.new()
    Path(shelf.repo.vm_slot(vm_id).path).touch()
    vmrecords.remove_vm(shelf.repo, shelf.session, {"vm_id": vm_id})
    assert shelf.files() == set()


def test_held_lease_of_a_vm_is_not_removed(shelf: Shelf) -> None:
    vm_id = ids.new()
    vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {}})
    with leases.Session() as vm, vm.holding([shelf.repo.vm_slot(vm_id).data_lease()], 1):
        with pytest.raises(errors.LeaseHeld):
            vmrecords.remove_vm(shelf.repo, shelf.session, {"vm_id": vm_id})
        vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {}})
        with pytest.raises(errors.LeaseHeld):  # made again, it would be given away (trap 12)
            shelf.session.acquire([shelf.repo.vm_slot(vm_id).data_lease()], 0)
    assert shelf.repo.find_vm(vm_id)


def test_fence_of_what_nobody_works_on_counts_the_generation(service: Service, shelf: Shelf) -> None:
    """A request that was on its way meanwhile is refused by it."""
    disk = shelf.disk()
    fenced = service.storage.fence_lease("main", disk, generation=1, job_id=ids.new())
    assert (fenced["generation"], fenced["work"]["state"]) == (2, "done")
    told = [event.params for event in service.events.since(service.events.instance_id, 0)[0] if event.subject == disk]
    assert told == [{"repo_id": "main", "change": "fenced"}]
    with pytest.raises(errors.GenerationMismatch):
        service.storage.create_snapshot("main", disk, options={"generation": 1})


def test_two_takeovers_at_once_are_enough(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    taken = service.storage._leasing._takeovers
    for _ in range(2):
        assert taken.acquire(blocking=False)
    try:
        with pytest.raises(errors.Overloaded):
            service.storage.fence_lease("main", disk)
    finally:
        for _ in range(2):
            taken.release()
    assert service.storage.fence_lease("main", disk)["generation"] == 2


def test_worker_that_was_stopped_on_its_way_leaves(service: Service, shelf: Shelf) -> None:
    """Fenced before it came: it finds that out under the leases, and touches nothing (trap 23)."""
    source, files = shelf.disk(), shelf.files()
    assert service.server.pid is not None
    os.kill(service.server.pid, signal.SIGSTOP)  # the worker comes when its parent may make it
    try:
        copy = service.storage.copy_image("main", source)
        fenced = service.storage.fence_lease("main", copy["image_id"], generation=0, job_id=copy["job_id"])
        before = shelf.image(copy["image_id"])
    finally:
        os.kill(service.server.pid, signal.SIGCONT)

    job = service.ended(copy["job_id"], "failed")

    assert job["error"]["data"]["key"] == "superseded"
    assert (fenced["verdict"]["state"], before["generation"]) == ("fenced", 1)
    assert shelf.image(copy["image_id"]) == before
    assert shelf.files() - files == {f"images/{copy['image_id']}"}
    (mend,) = service.storage.check_storage_repository("main")
    fixed = service.storage.fix_storage_repository("main", {"type": mend["type"], "data": mend["data"]})
    service.ended(fixed["job_id"])
    image = shelf.image(copy["image_id"])
    assert (mend["type"], image["status"], image["generation"]) == ("mend", "optimized", 2)
