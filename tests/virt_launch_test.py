"""Starts of VMs with real QEMUs, real leases and real records."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import virt_ground
from tests.until import private_parents, until
from vdsm import errors, hypervisor, ids, leases
from vdsm.virt import qemu
from vdsm.virt.states import ExitReason

ground, host = virt_ground.ground, virt_ground.host


def test_qemu_holds_exactly_the_planned_leases(host: virt_ground.Host) -> None:
    writable, read_only = host.storage.add_disk(), host.storage.add_disk(kind="snapshot")
    vm_id = host.started(disks=[{"image_id": writable}, {"image_id": read_only, "read_only": True}])
    assert host.held(vm_id) == {(vm_id, False), (writable, False), (read_only, True)}
    assert host.info(vm_id)["pid"] == qemu.find(vm_id)


def test_the_launcher_itself_became_qemu(host: virt_ground.Host) -> None:
    """The lease is QEMU's own from before it opened anything: one process, one pid (traps 3 and 15)."""
    vm_id = host.started(disks=host.disks(host.storage.add_disk()))
    pid = qemu.find(vm_id)
    assert Path(f"/proc/{pid}/exe").resolve().name.startswith("qemu-system")
    assert not [name for name in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if name.startswith(b"VDSM_")]
    assert Path(f"/proc/{pid}").owner() == "libvirt-qemu"


def test_states_are_published_with_reasons(host: virt_ground.Host) -> None:
    vm_id = host.started()
    assert host.moves(vm_id) == ["WaitForLaunch", "Up"]
    assert [event.params["reason"] for event in host.seen if event.subject == vm_id] == ["created", "started"]


def test_a_vm_with_an_agent_channel_powers_up_first(host: virt_ground.Host) -> None:
    vm_id = host.create(agent_channel=True)
    host.wait(vm_id, "PoweringUp")


def test_a_vm_without_disks_needs_no_lease(host: virt_ground.Host) -> None:
    vm_id = host.started()
    assert host.held(vm_id) == set()
    assert host.info(vm_id)["pid"] == qemu.find(vm_id)


def test_a_vm_without_disks_takes_the_lease_it_was_given_a_place_for(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    assert host.held(vm_id) == {(vm_id, False)}


def test_the_record_says_where_it_runs_and_on_what(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    vm_id = host.started(name="web", disks=host.disks(disk))
    found = host.storage.read_vm("repo", vm_id)
    assert (found["name"], found["last_host"], found["exit_code"]) == ("web", host.settings.host.name, None)
    assert found["disks"] == [{"repo": host.storage.name, "image_id": disk}]


def test_the_console_log_is_the_agents_and_shows_the_guest(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk(virt_ground.boot_sector(virt_ground.OBEDIENT))
    vm_id = host.started(disks=host.disks(disk))
    log = Path(host.info(vm_id)["console_log"])
    until(lambda: virt_ground.GREETING in log.read_bytes())
    assert (log.stat().st_mode & 0o777, log.owner()) == (0o660, "root")  # the tests are the agent, and root


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_second_start_on_this_host_is_refused(host: virt_ground.Host) -> None:
    vm_id = host.started()
    with pytest.raises(errors.VmExists):
        host.create(vm_id=vm_id)
    assert host.info(vm_id)["status"] == "Up"


def test_a_vm_whose_lease_another_holds_is_refused_by_name(host: virt_ground.Host) -> None:
    vm_id, disk = ids.new(), host.storage.add_disk()
    host.storage.ensure_vm("repo", vm_id, {})
    with host.storage.session.holding([host.storage.slot(vm_id).data_lease()], 5):
        info = host.refused(vm_id=vm_id, disks=host.disks(disk))
    assert info["error"]["data"]["key"] == "vm_runs"
    assert f"process {os.getpid()}" in info["error"]["data"]["facts"]["holder"]


def test_a_disk_that_another_process_holds_is_refused_by_name(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    with host.storage.session.holding([host.storage.slot(disk).data_lease()], 5):
        info = host.refused(disks=host.disks(disk))
    assert (info["error"]["data"]["key"], info["exit_reason"]) == ("image_in_use", ExitReason.START_FAILED)
    assert f"process {os.getpid()}" in info["exit_message"]


def test_a_disk_of_a_running_vm_is_refused_naming_the_vm(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    first = host.started(disks=host.disks(disk))
    info = host.refused(disks=host.disks(disk))
    assert info["error"]["data"]["key"] == "image_in_use"
    assert f"VM {first}" in info["error"]["data"]["facts"]["holder"]
    assert host.machines.holder(disk) == f"VM {first} ({first})"


def test_a_refused_start_leaves_the_record_of_the_running_one_alone(host: virt_ground.Host) -> None:
    vm_id = ids.new()
    host.storage.ensure_vm("repo", vm_id, {"name": "theirs", "last_host": "another"})
    with host.storage.session.holding([host.storage.slot(vm_id).data_lease()], 5):
        before = host.storage.read_vm("repo", vm_id)
        host.refused(vm_id=vm_id, lease_repo_id="repo")
        host.machines.destroy(vm_id)
        assert host.storage.read_vm("repo", vm_id) == before


@pytest.fixture
def marking_host(ground: virt_ground.Ground, tmp_path: Path) -> Iterator[virt_ground.Host]:
    """Its QEMU leaves a mark when it is executed."""
    tmp_path.chmod(0o777)
    for parent in private_parents(tmp_path):
        parent.chmod(0o755)
    marker = tmp_path / "qemu"
    marker.write_text(f'#!/bin/sh\n: > {tmp_path}/executed\nexec {ground.settings.virt.emulator} "$@"\n')
    marker.chmod(0o755)
    settings = dataclasses.replace(
        ground.settings, virt=dataclasses.replace(ground.settings.virt, emulator=str(marker))
    )
    started = virt_ground.Host(ground, settings)
    started.start()
    yield started
    started.clean_up()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "broken": ({"status": "broken"}, "record_changed"),
    "deleted": ({"deleted": True}, "record_changed"),
    "other data": ({"data": {"name": "other", "format": "raw"}}, "record_changed"),
    "claimed by a job": ({"work": {"job_id": "j", "state": "running", "host_id": 7}}, "image_busy"),
}


@pytest.mark.parametrize(("change", "key"), CHANGES.values(), ids=CHANGES.keys())
def test_a_record_that_changed_after_the_plan_stops_the_launcher(
    marking_host: virt_ground.Host, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    """The disk is looked at again under the lease, before any QEMU exists that could open it (trap 3)."""
    disk = marking_host.storage.add_disk()
    marking_host.storage.before["ensure_vm"] = lambda: marking_host.storage.change(disk, **change)
    info = marking_host.refused(disks=marking_host.disks(disk))
    assert info["error"]["data"]["key"] == key
    assert not (tmp_path / "executed").exists()


def test_the_mark_is_left_by_a_start_that_works(marking_host: virt_ground.Host, tmp_path: Path) -> None:
    marking_host.started(disks=marking_host.disks(marking_host.storage.add_disk()))
    assert (tmp_path / "executed").exists()


def test_a_vm_whose_record_a_job_claims_is_refused(host: virt_ground.Host) -> None:
    vm_id = ids.new()
    host.storage.ensure_vm("repo", vm_id, {})
    host.storage.change(vm_id, work={"job_id": "sysprep", "state": "running", "host_id": 1})
    info = host.refused(vm_id=vm_id, lease_repo_id="repo")
    assert (info["error"]["data"]["key"], info["error"]["data"]["facts"]["jobId"]) == ("image_busy", "sysprep")


@pytest.mark.parametrize("place", ["outside", "symlink", "missing"])
def test_kernels_come_from_configured_directories_only(host: virt_ground.Host, place: str) -> None:
    boot = host.ground.stack.place.boot
    (boot / "symlink").unlink(missing_ok=True)
    (boot / "symlink").symlink_to("/etc/passwd")
    path = "/etc/passwd" if place == "outside" else str(boot / place)
    with pytest.raises(errors.InvalidParameters if place == "missing" else errors.PathNotAllowed):
        host.create(direct_kernel={"kernel": path})
    assert host.machines.list() == []


def test_a_limit_on_vms_is_said_before_sanlock_chokes(ground: virt_ground.Ground) -> None:
    """What is registered beside VMs counts: workers, the one that concludes, and here storage's one child (trap 7)."""
    most = 1 + ground.settings.jobs.workers + 1 + ground.storage.most_registrations()
    few = dataclasses.replace(
        ground.settings, sanlock=dataclasses.replace(ground.settings.sanlock, max_registrations=most)
    )
    limited = virt_ground.Host(ground, few)
    limited.start()
    try:
        limited.started()
        with pytest.raises(errors.Overloaded):
            limited.create()
    finally:
        limited.clean_up()


# -- failures ----------------------------------------------------------------------------------------------------------


class Failing(hypervisor.Hypervisor):
    """The real thing, but for one call that fails."""

    def __init__(self, uri: str, call: str) -> None:
        super().__init__(uri)
        if call in ("create_paused", "state", "set_metadata", "xml", "resume"):
            setattr(self, call, self._fail)

    def _fail(self, *_: object, **__: object) -> Any:
        raise errors.HypervisorFailed(call="this", reason="made to fail")


def _refuse() -> None:
    raise errors.RepositoryStuck(repo_id="repo", seconds=1)


STEPS: dict[str, Callable[[virt_ground.Host], object]] = {
    "plan the disks": lambda host: host.storage.before.update(plan_disk=_refuse),
    "ensure the record": lambda host: host.storage.before.update(ensure_vm=_refuse),
    "make the console log": lambda host: None,
    "create_paused": lambda host: None,
    "compare the leases": lambda host: None,
    "record the start": lambda host: host.storage.before.update(finish_vm=_refuse),
    "set_metadata": lambda host: None,
    "xml": lambda host: None,
    "resume": lambda host: None,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_start_that_fails_leaves_nothing(ground: virt_ground.Ground, step: str, tmp_path: Path) -> None:
    settings = ground.settings
    if step == "make the console log":
        console = dataclasses.replace(settings.virt, console_dir=str(tmp_path / "absent"))
        settings = dataclasses.replace(settings, virt=console)
    host = virt_ground.Host(ground, settings)
    host.start(Failing(settings.virt.libvirt_uri, step))
    try:
        disk, vm_id = host.storage.add_disk(), ids.new()
        if step == "compare the leases":
            _lose_a_lease_on_the_way(host, vm_id, disk)
        STEPS[step](host)
        info = host.refused(vm_id=vm_id, disks=host.disks(disk))
        assert info["exit_reason"] == ExitReason.START_FAILED
        host.storage.before.clear()
        assert vm_id not in ground.domains()
        assert qemu.find(vm_id) is None
        assert not Path(info["console_log"]).exists()
        with host.storage.session.holding([host.storage.slot(disk).data_lease()], 5):
            pass  # nobody holds it
    finally:
        host.clean_up()
    again = virt_ground.Host(ground, ground.settings)
    again.start()
    try:
        again.started(vm_id=vm_id, disks=again.disks(disk))
    finally:
        again.clean_up()


def _lose_a_lease_on_the_way(host: virt_ground.Host, vm_id: str, disk: str) -> None:
    """As when sanlock was restarted between the launcher and the comparison."""
    create = host.libvirt.create_paused

    def create_and_lose(*given: Any, **named: Any) -> None:
        create(*given, **named)
        virt_ground.release_by_force(host.storage.slot(disk).data_lease(), qemu.find(vm_id))

    host.libvirt.create_paused = create_and_lose


def test_a_failed_start_can_be_looked_at_until_it_is_destroyed(host: virt_ground.Host) -> None:
    vm_id = host.create(disks=host.disks(ids.new()))
    info = host.wait(vm_id, "Down")
    assert info["error"]["data"]["key"] == "no_such_image"
    host.machines.destroy(vm_id)
    with pytest.raises(errors.NoSuchVm):
        host.info(vm_id)


def test_a_vm_destroyed_during_its_launch_never_runs(host: virt_ground.Host) -> None:
    disk, vm_id = host.storage.add_disk(), ids.new()
    destroyer = threading.Thread(target=lambda: host.machines.destroy(vm_id))

    def destroy_now() -> None:
        host.storage.before.clear()
        destroyer.start()
        until(host.machines._table.get(vm_id).given_up.is_set)

    host.storage.before["finish_vm"] = destroy_now
    host.create(vm_id=vm_id, disks=host.disks(disk))
    until(lambda: destroyer.ident is not None)
    destroyer.join(30)
    assert host.moves(vm_id) == ["WaitForLaunch", "Down"]
    assert host.seen[-1].params["exit_reason"] == ExitReason.DESTROYED_ON_STARTUP
    assert host.machines.list() == []
    lease = host.storage.slot(disk).data_lease()
    with host.storage.session.holding([lease], 5):
        assert leases.local_pids(lease) == [os.getpid()]


def test_a_vm_destroyed_before_its_launch_began_is_gone_at_once(ground: virt_ground.Ground) -> None:
    one = dataclasses.replace(ground.settings, virt=dataclasses.replace(ground.settings.virt, starts=1))
    host = virt_ground.Host(ground, one)
    host.start()
    begun, go_on = threading.Event(), threading.Event()
    host.storage.before["ensure_vm"] = lambda: (begun.set(), go_on.wait(30))
    try:
        first = host.create(disks=host.disks(host.storage.add_disk()))
        assert begun.wait(10)
        second = host.create()
        host.machines.destroy(second)
        assert host.moves(second) == ["WaitForLaunch", "Down"]
        go_on.set()
        host.wait(first, "Up")
    finally:
        go_on.set()
        host.clean_up()


def test_more_starts_than_threads_all_come_up(ground: virt_ground.Ground) -> None:
    one = dataclasses.replace(ground.settings, virt=dataclasses.replace(ground.settings.virt, starts=2))
    host = virt_ground.Host(ground, one)
    host.start()
    try:
        made = [host.create(disks=host.disks(host.storage.add_disk())) for _ in range(5)]
        for vm_id in made:
            host.wait(vm_id, "Up")
    finally:
        host.clean_up()
