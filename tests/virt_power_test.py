"""Stopping, continuing and ending guests, with real QEMUs and leases."""

import concurrent.futures
import os
import signal
import threading
import time
from pathlib import Path

import orjson
import pytest

from tests import virt_ground
from tests.until import running, until
from vdsm import errors, hypervisor, leases
from vdsm.virt import qemu
from vdsm.virt.states import ExitReason

ground, host = virt_ground.ground, virt_ground.host


def boots(host: virt_ground.Host, code: bytes) -> str:
    """A started VM whose disk has that boot sector."""
    return host.started(disks=host.disks(host.storage.add_disk(virt_ground.boot_sector(code))))


def booted(host: virt_ground.Host) -> str:
    """A VM whose guest has run: it has greeted, and now waits for the power button."""
    vm_id = boots(host, virt_ground.OBEDIENT)
    log = Path(host.info(vm_id)["console_log"])
    until(lambda: virt_ground.GREETING in log.read_bytes())
    return vm_id


def test_pause_stops_the_guest_and_keeps_the_leases(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    vm_id = host.started(disks=host.disks(disk))
    info = host.machines.pause(vm_id)
    assert (info["status"], info["reason"]) == ("Paused", "paused on request")
    assert host.libvirt.state(vm_id) == ("paused", "user")
    assert host.held(vm_id) == {(vm_id, False), (disk, False)}


def test_cont_lets_it_run_on(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    host.machines.pause(vm_id)
    assert host.machines.cont(vm_id)["reason"] == "continued on request"
    assert host.libvirt.state(vm_id).state == "running"
    assert host.moves(vm_id) == ["WaitForLaunch", "Up", "Paused", "Up"]


def test_a_paused_guest_that_lost_a_lease_stays_paused(host: virt_ground.Host) -> None:
    """Whoever holds the lease now may have changed the disk under the guest's memory (trap 60)."""
    disk = host.storage.add_disk()
    vm_id = host.started(disks=host.disks(disk))
    host.machines.pause(vm_id)
    virt_ground.release_by_force(host.storage.slot(disk).data_lease(), qemu.find(vm_id))
    with pytest.raises(errors.VmLeaseMismatch) as refused:
        host.machines.cont(vm_id)
    assert refused.value.facts["missing"] == disk
    assert host.libvirt.state(vm_id).state == "paused"
    assert host.info(vm_id)["status"] == "Paused"


def test_a_running_guest_without_its_leases_is_ended(host: virt_ground.Host) -> None:
    """As after a restart of sanlock: any other host may take the leases now (trap 5)."""
    disk = host.storage.add_disk()
    vm_id = host.started(disks=host.disks(disk))
    virt_ground.release_by_force(host.storage.slot(disk).data_lease(), qemu.find(vm_id))
    (difference,) = host.machines.reconcile()["differences"]
    assert (difference["vm_id"], difference["had"], difference["done"]) == (vm_id, "Up", "ended")
    info = host.info(vm_id)
    assert (info["status"], info["exit_code"]) == ("Down", 1)
    assert disk in info["exit_message"]
    assert qemu.find(vm_id) is None


@pytest.mark.parametrize(("verb", "state"), [("cont", "Up"), ("pause", "Paused"), ("shutdown", "Paused")])
def test_a_verb_in_the_wrong_state_says_which_it_needs(host: virt_ground.Host, verb: str, state: str) -> None:
    vm_id = host.started()
    if state == "Paused":
        host.machines.pause(vm_id)
    with pytest.raises(errors.VmWrongState) as refused:
        getattr(host.machines, verb)(vm_id)
    assert refused.value.facts["status"] == state


def test_destroy_frees_the_leases_and_writes_the_record(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    vm_id = host.started(disks=host.disks(disk))
    pid, log = qemu.find(vm_id), Path(host.info(vm_id)["console_log"])
    host.machines.destroy(vm_id)
    with host.storage.session.holding([host.storage.slot(name).data_lease() for name in (vm_id, disk)], 5):
        pass
    assert not running(pid or 0)
    assert not log.exists()
    record = host.storage.read_vm("repo", vm_id)
    assert (record["exit_code"], record["exit_reason"]) == (0, ExitReason.ADMIN_SHUTDOWN)
    with pytest.raises(errors.NoSuchVm):
        host.info(vm_id)
    host.started(vm_id=vm_id, disks=host.disks(disk))


def test_a_paused_vm_can_be_destroyed(host: virt_ground.Host) -> None:
    vm_id = host.started()
    host.machines.pause(vm_id)
    host.machines.destroy(vm_id)
    assert host.moves(vm_id)[-1] == "Down"


def test_reset_boots_the_guest_again(host: virt_ground.Host) -> None:
    vm_id = booted(host)
    log = Path(host.info(vm_id)["console_log"])
    assert host.machines.reset(vm_id)["status"] == "Up"
    until(lambda: log.read_bytes().count(virt_ground.GREETING) == 2)


# -- guests that end ---------------------------------------------------------------------------------------------------


def test_a_guest_that_powers_off_is_down_and_its_record_says_so(host: virt_ground.Host) -> None:
    vm_id = host.create(disks=host.disks(host.storage.add_disk(virt_ground.boot_sector(virt_ground.POWERS_OFF))))
    until(lambda: host.info(vm_id)["status"] == "Down", 40)
    info = host.info(vm_id)
    assert (info["exit_code"], info["exit_reason"]) == (0, ExitReason.USER_SHUTDOWN)
    until(lambda: host.storage.read_vm("repo", vm_id)["exit_reason"] == ExitReason.USER_SHUTDOWN)
    assert Path(info["console_log"]).exists(), "it can be looked at until the VM is destroyed"


def test_a_qemu_that_is_killed_is_down_with_an_error(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    os.kill(qemu.find(vm_id) or 0, signal.SIGKILL)
    until(lambda: host.info(vm_id)["status"] == "Down")
    assert (host.info(vm_id)["exit_code"], host.info(vm_id)["exit_reason"]) == (1, ExitReason.LOST_QEMU)
    until(lambda: host.storage.read_vm("repo", vm_id)["exit_reason"] == ExitReason.LOST_QEMU)


def test_a_qemu_that_sanlock_ends_did_not_end_by_itself(host: virt_ground.Host) -> None:
    """sanlock begins with SIGTERM, which QEMU obeys as if it had been told to: that is no clean end (trap 14)."""
    vm_id = host.started(lease_repo_id="repo")
    os.kill(qemu.find(vm_id) or 0, signal.SIGTERM)
    until(lambda: host.info(vm_id)["status"] == "Down")
    info = host.info(vm_id)
    assert (info["exit_code"], info["exit_reason"]) == (1, ExitReason.GENERIC_ERROR)
    assert "leases" in info["exit_message"]


def test_an_end_that_cannot_be_recorded_now_is_recorded_later(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    host.storage.connected = False
    try:
        os.kill(qemu.find(vm_id) or 0, signal.SIGKILL)
        until(lambda: host.info(vm_id)["status"] == "Down")
        host.machines.reconcile()
        assert host.storage.read_vm("repo", vm_id)["exit_reason"] is None
    finally:
        host.storage.connected = True
    host.machines.reconcile()
    until(lambda: host.storage.read_vm("repo", vm_id)["exit_reason"] == ExitReason.LOST_QEMU)


def test_a_late_end_does_not_hide_a_newer_start_elsewhere(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    host.storage.change(vm_id, last_host="another", started=host.info(vm_id)["created"] + 1)
    host.machines.destroy(vm_id)
    assert host.storage.read_vm("repo", vm_id)["exit_reason"] is None


# -- shutting down -----------------------------------------------------------------------------------------------------


def test_shutdown_asks_the_guest(host: virt_ground.Host) -> None:
    vm_id = booted(host)
    assert host.machines.shutdown(vm_id, message="maintenance")["status"] == "PoweringDown"
    info = host.wait(vm_id, "Down")
    assert (info["exit_code"], info["exit_reason"]) == (0, ExitReason.ADMIN_SHUTDOWN)
    assert info["exit_message"] == "maintenance"
    assert host.moves(vm_id) == ["WaitForLaunch", "Up", "PoweringDown", "Down"]


def test_shutdown_goes_on_to_acpi_when_the_agent_is_silent(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk(virt_ground.boot_sector(virt_ground.OBEDIENT))
    vm_id = host.create(disks=host.disks(disk), agent_channel=True)
    host.wait(vm_id, "PoweringUp")
    log = Path(host.info(vm_id)["console_log"])
    until(lambda: virt_ground.GREETING in log.read_bytes())
    host.machines.shutdown(vm_id)
    assert host.wait(vm_id, "Down")["exit_reason"] == ExitReason.ADMIN_SHUTDOWN


def test_a_guest_that_does_not_listen_stays_up(host: virt_ground.Host) -> None:
    vm_id = boots(host, virt_ground.DEAF)
    host.machines.shutdown(vm_id, timeout_s=0.3)
    host.wait(vm_id, "Up", 20)
    assert "did not listen" in host.info(vm_id)["reason"]
    assert host.moves(vm_id)[-2:] == ["PoweringDown", "Up"]


def test_force_ends_a_guest_that_does_not_listen(host: virt_ground.Host) -> None:
    vm_id = boots(host, virt_ground.DEAF)
    host.machines.shutdown(vm_id, timeout_s=0.3, force=True)
    info = host.wait(vm_id, "Down")
    assert (info["exit_code"], info["exit_reason"]) == (0, ExitReason.ADMIN_SHUTDOWN)


def test_a_later_request_takes_the_place_of_an_earlier_one(host: virt_ground.Host) -> None:
    vm_id = boots(host, virt_ground.DEAF)
    host.machines.shutdown(vm_id, timeout_s=60)
    host.machines.shutdown(vm_id, timeout_s=0.3, force=True)
    host.wait(vm_id, "Down")


def test_a_delayed_shutdown_leaves_the_guest_alone_until_then(host: virt_ground.Host) -> None:
    vm_id = boots(host, virt_ground.DEAF)
    assert host.machines.shutdown(vm_id, delay_s=60)["status"] == "Up"
    host.machines.destroy(vm_id)


def test_reboot_by_the_power_button_boots_the_guest_again(host: virt_ground.Host) -> None:
    vm_id = booted(host)
    pid, log = qemu.find(vm_id), Path(host.info(vm_id)["console_log"])
    assert host.machines.shutdown(vm_id, reboot=True)["status"] == "RebootInProgress"
    until(lambda: log.read_bytes().count(virt_ground.GREETING) == 2)
    host.wait(vm_id, "Up")
    assert qemu.find(vm_id) == pid


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_tell_what_qemu_does(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk(virt_ground.boot_sector(virt_ground.DEAF))
    vm_id = host.started(disks=host.disks(disk), nics=[{}], vnc={})
    host.machines._sampler.sample()
    stats = orjson.loads(host.machines.get_stats(vm_id))
    assert (stats["vmId"], stats["status"]) == (vm_id, "Up")
    assert stats["cpuUsage"] > 0
    assert stats["disks"]["vda"]["imageID"] == disk
    assert stats["disks"]["vda"]["capacity"] == 1 << 20
    assert stats["displayInfo"][0]["port"] >= 5900
    assert orjson.loads(host.machines.all_stats_bytes()) == [stats]


def test_one_qemu_that_hangs_ages_alone(host: virt_ground.Host) -> None:
    stuck, fine = host.started(disks=host.disks(host.storage.add_disk())), host.started()
    pid = qemu.find(stuck) or 0
    host.machines._sampler._interval_s = 0.5
    os.kill(pid, signal.SIGSTOP)
    try:
        host.machines._sampler.sample()  # its part of the sample is left behind
        before = _sampled_at(host, fine)
        host.machines._sampler.sample()
        assert _sampled_at(host, fine) > before
        assert [orjson.loads(host.machines.get_stats(vm_id))["staleSince"] is None for vm_id in (fine, stuck)] == [
            *(True, False)
        ]
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not [call for call in host.machines._sampler._calls if call.is_alive()])


def test_one_qemu_that_hangs_delays_no_other_call(host: virt_ground.Host) -> None:
    """On one connection for all, some answers came only with the next keepalive message (decision 10)."""
    stuck, fine = host.started(), host.started()
    pid, slowest = qemu.find(stuck) or 0, 0.0
    os.kill(pid, signal.SIGSTOP)
    hanging = threading.Thread(target=lambda: host.libvirt.stats(hypervisor.ALL_GROUPS))
    hanging.start()
    try:
        end = time.monotonic() + 3
        while (before := time.monotonic()) < end:
            host.libvirt.state(fine)
            slowest = max(slowest, time.monotonic() - before)
        assert hanging.is_alive()
        assert slowest < 2
    finally:
        os.kill(pid, signal.SIGCONT)
        hanging.join(20)


def _sampled_at(host: virt_ground.Host, vm_id: str) -> float:
    return float(orjson.loads(host.machines.get_stats(vm_id)).get("sampleTime", 0))


def test_leases_of_a_guest_are_its_qemus_alone(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    assert leases.local_pids(host.storage.slot(vm_id).data_lease()) == [qemu.find(vm_id)]


def test_what_a_qemu_holds_can_be_asked_by_many_at_once(host: virt_ground.Host) -> None:
    """A comparison and a verb may ask at the same moment; sanlock alone refuses one of them."""
    pid = qemu.find(host.started(lease_repo_id="repo")) or 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(leases.held_by, [pid] * 400))
    assert [len(answer) for answer in answers] == [1] * 400
