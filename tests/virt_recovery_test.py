"""VMs outlive the agent and libvirtd, and are found again; domains of others are left alone."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import virt_ground
from tests.until import until
from vdsm import errors, hypervisor, ids
from vdsm.virt import qemu
from vdsm.virt.states import ExitReason

ground, host = virt_ground.ground, virt_ground.host

FOREIGN = """<domain type='qemu'><name>theirs</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
    <os><type arch='x86_64' machine='q35'>hvm</type></os>{metadata}<devices/></domain>"""


# -- the agent's end ---------------------------------------------------------------------------------------------------


class Agent:
    """An agent in a process of its own that has begun to create a VM; `until` waits for a word of it."""

    def __init__(self, host: virt_ground.Host, stop_at: list[str], **wanted: object) -> None:
        spec = json.dumps({"memory_mib": 64, "agent_channel": False, **wanted})
        storage = host.storage
        place = [str(host.ground.stack.place.config), str(storage.directory), storage.name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.virt_manager", *place, spec, *stop_at],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def until(self, word: str) -> None:
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line.strip())
            if said[-1] == word:
                return
        raise AssertionError(f"the agent ended after {said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def killed_agent(host: virt_ground.Host, word: str, *stop_at: str, **wanted: object) -> Iterator[None]:
    """Inside the block that agent is dead; `host`'s own was stopped before, and is started after it."""
    host.stop()
    agent = Agent(host, list(stop_at), **wanted)
    try:
        agent.until(word)
    finally:
        agent.kill()
    yield
    host.start()


def test_a_running_vm_outlives_the_agent_with_pid_and_leases(host: virt_ground.Host) -> None:
    vm_id, disk = ids.new(), host.storage.add_disk()
    with killed_agent(host, "Up", vm_id=vm_id, name="survivor", disks=host.disks(disk)):
        pid = qemu.find(vm_id)
        assert host.held(vm_id) == {(vm_id, False), (disk, False)}
    info = host.info(vm_id)
    assert (info["pid"], info["name"], info["status"]) == (pid, "survivor", "Up")
    assert host.held(vm_id) == {(vm_id, False), (disk, False)}
    assert host.machines.holder(disk) == f"VM survivor ({vm_id})"
    host.machines.pause(vm_id)
    host.machines.cont(vm_id)
    host.machines.destroy(vm_id)
    assert host.storage.read_vm("repo", vm_id)["exit_reason"] == ExitReason.ADMIN_SHUTDOWN


def test_a_paused_vm_is_found_paused(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    host.machines.pause(vm_id)
    host.restart()
    assert host.info(vm_id)["status"] == "Paused"
    host.machines.cont(vm_id)


@pytest.mark.parametrize("call", ["set_metadata", "resume"])
def test_a_launch_that_the_agent_did_not_finish_is_finished(host: virt_ground.Host, call: str) -> None:
    """The guest stopped with all its leases: the next agent compares them and goes on (trap 60)."""
    vm_id, disk = ids.new(), host.storage.add_disk()
    with killed_agent(host, call, call, vm_id=vm_id, disks=host.disks(disk)):
        pid = qemu.find(vm_id)
        assert pid is not None
    if call == "resume":  # marked as launched: the next agent cannot know that nobody paused it, and leaves it so
        host.wait(vm_id, "Paused")
        host.machines.cont(vm_id)
    assert host.wait(vm_id, "Up")["pid"] == pid
    assert host.storage.read_vm("repo", vm_id)["last_host"] == host.settings.host.name
    host.restart()
    assert host.info(vm_id)["status"] == "Up"


def test_a_launch_in_which_the_agent_stops_is_finished_by_the_next(host: virt_ground.Host) -> None:
    """A restart for an update must not cost the VM that is just being started."""
    vm_id, disk = ids.new(), host.storage.add_disk()

    def stop_now() -> None:
        host.storage.before.clear()
        host.stop()

    host.storage.before["finish_vm"] = stop_now
    host.create(vm_id=vm_id, disks=host.disks(disk))
    until(lambda: not host.libvirt.connected)
    pid = qemu.find(vm_id)
    host.start()
    assert host.wait(vm_id, "Up")["pid"] == pid
    assert pid is not None


def test_a_launch_that_lost_its_leases_is_not_finished(host: virt_ground.Host) -> None:
    vm_id, disk = ids.new(), host.storage.add_disk()
    with killed_agent(host, "set_metadata", "set_metadata", vm_id=vm_id, disks=host.disks(disk)):
        virt_ground.release_by_force(host.storage.slot(disk).data_lease(), qemu.find(vm_id))
    info = host.wait(vm_id, "Down")
    assert info["error"]["data"]["key"] == "vm_lease_mismatch"
    assert qemu.find(vm_id) is None


def test_an_agent_killed_before_the_domain_leaves_nothing(host: virt_ground.Host) -> None:
    vm_id, disk = ids.new(), host.storage.add_disk()
    with killed_agent(host, "create_paused", "create_paused", vm_id=vm_id, disks=host.disks(disk)):
        assert qemu.find(vm_id) is None
    assert host.machines.list() == []
    host.started(vm_id=vm_id, disks=host.disks(disk))


def test_a_found_vm_whose_repository_is_not_connected_yet_is_recorded_later(host: virt_ground.Host) -> None:
    vm_id = ids.new()
    host.storage.connected = False
    try:
        with killed_agent(host, "set_metadata", "set_metadata", vm_id=vm_id, lease_repo_id="repo"):
            host.storage.change(vm_id, last_host=None)
        host.wait(vm_id, "Up")
        assert host.storage.read_vm("repo", vm_id)["last_host"] is None
    finally:
        host.storage.connected = True
    host.machines.reconcile()
    until(lambda: host.storage.read_vm("repo", vm_id)["last_host"] == host.settings.host.name)


# -- libvirtd's end ----------------------------------------------------------------------------------------------------


def test_vms_are_unknown_while_libvirt_is_away_and_found_again(host: virt_ground.Host) -> None:
    disk = host.storage.add_disk()
    vm_id = host.started(disks=host.disks(disk))
    paused = host.started()
    host.machines.pause(paused)
    pid = qemu.find(vm_id)
    host.ground.stop_libvirtd()
    try:
        until(lambda: host.info(vm_id)["status"] == "Unknown")
        assert qemu.find(vm_id) == pid
        for verb in (host.machines.destroy, host.machines.reset):
            with pytest.raises((errors.HypervisorUnavailable, errors.VmWrongState)):
                verb(vm_id)
        with pytest.raises(errors.HypervisorUnavailable):
            host.machines.destroy(vm_id)
        assert len(host.machines.list()) == 2
    finally:
        host.ground.start_libvirtd()
    host.wait(vm_id, "Up")
    host.wait(paused, "Paused")
    assert host.info(vm_id)["pid"] == pid
    assert host.held(vm_id) == {(vm_id, False), (disk, False)}
    host.machines.pause(vm_id)
    assert host.moves(vm_id) == ["WaitForLaunch", "Up", "Unknown", "Up", "Paused"]


def test_a_vm_that_ended_while_libvirt_was_away_is_down(host: virt_ground.Host) -> None:
    vm_id = host.started(lease_repo_id="repo")
    host.ground.stop_libvirtd()
    try:
        until(lambda: host.info(vm_id)["status"] == "Unknown")
        os.kill(qemu.find(vm_id) or 0, 9)
    finally:
        host.ground.start_libvirtd()
    until(lambda: host.info(vm_id)["status"] == "Down", 40)
    assert host.info(vm_id)["exit_reason"] == ExitReason.LOST_QEMU
    until(lambda: host.storage.read_vm("repo", vm_id)["exit_reason"] == ExitReason.LOST_QEMU)


def test_a_launch_waits_for_a_lost_libvirt_and_goes_on(host: virt_ground.Host) -> None:
    """Lost between the domain and its resume: neither a second QEMU nor a forgotten one."""
    vm_id, disk = ids.new(), host.storage.add_disk()

    def lose() -> None:
        host.storage.before.clear()
        host.ground.stop_libvirtd()

    host.storage.before["finish_vm"] = lose
    host.create(vm_id=vm_id, disks=host.disks(disk))
    until(lambda: not host.libvirt.connected)
    pid = qemu.find(vm_id)
    assert host.info(vm_id)["status"] == "WaitForLaunch"
    host.ground.start_libvirtd()
    assert host.wait(vm_id, "Up")["pid"] == pid


def test_libvirt_may_come_after_the_agent(host: virt_ground.Host) -> None:
    vm_id = host.started()
    host.stop()
    host.ground.stop_libvirtd()
    try:
        host.start()
        assert host.machines.list() == []
        with pytest.raises(errors.HypervisorUnavailable):
            host.create()
    finally:
        host.ground.start_libvirtd()
    until(lambda: host.machines.list() != [])
    assert host.wait(vm_id, "Up")["pid"] == qemu.find(vm_id)


# -- comparing without events ------------------------------------------------------------------------------------------


class Deaf(hypervisor.Hypervisor):
    """Events of domains come `delay_s` late, or never."""

    def __init__(self, uri: str, delay_s: float | None = None) -> None:
        super().__init__(uri)
        self.delay_s = delay_s

    def start(self, on_domain: Callable[[Any], None], on_connection: Callable[[bool, str], None]) -> None:
        def late(event: hypervisor.DomainEvent) -> None:
            if self.delay_s is not None:
                threading.Timer(self.delay_s, on_domain, [event]).start()

        super().start(late, on_connection)


def deaf(host: virt_ground.Host, delay_s: float | None = None, reconcile_s: float = 3600.0) -> None:
    """The host's agent from here on."""
    host.stop()
    host.settings = dataclasses.replace(
        host.settings, virt=dataclasses.replace(host.settings.virt, reconcile_s=reconcile_s)
    )
    host.start(Deaf(host.settings.virt.libvirt_uri, delay_s))


def test_a_comparison_corrects_and_records_what_no_event_told(host: virt_ground.Host) -> None:
    deaf(host)
    paused, ended, same = host.started(), host.started(lease_repo_id="repo"), host.started()
    host.ground.virsh("suspend", paused)
    host.ground.virsh("destroy", ended)
    assert [host.info(vm_id)["status"] for vm_id in (paused, ended)] == ["Up", "Up"]
    found = host.machines.reconcile()
    assert (found["checked"], found["unreachable"]) == (3, None)
    assert {(one["vm_id"], one["had"], one["found"]) for one in found["differences"]} == {
        *((paused, "Up", "Paused"), (ended, "Up", "Down"))
    }
    assert all(one["reason"] for one in found["differences"])
    assert [host.info(vm_id)["status"] for vm_id in (paused, ended, same)] == ["Paused", "Down", "Up"]
    assert host.info(ended)["exit_reason"] == ExitReason.LOST_QEMU
    told = {(event.subject, event.params["status"]) for event in host.seen if event.params["change"] == "difference"}
    assert told == {(paused, "Paused"), (ended, "Down")}
    until(lambda: host.storage.read_vm("repo", ended)["exit_reason"] == ExitReason.LOST_QEMU)
    again = host.machines.reconcile()
    assert again["differences"] == []
    assert again["history"] == found["differences"]


def test_the_table_is_compared_again_and_again(host: virt_ground.Host) -> None:
    deaf(host, reconcile_s=0.2)
    vm_id = host.started()
    host.ground.virsh("suspend", vm_id)
    host.wait(vm_id, "Paused")
    assert [(one["had"], one["found"]) for one in host.machines.reconcile()["history"]] == [("Up", "Paused")]


def test_a_comparison_lets_the_event_of_a_domain_that_is_gone_come_first(host: virt_ground.Host) -> None:
    """The event alone knows how it ended."""
    deaf(host, delay_s=0.3)
    vm_id = host.started()
    host.ground.virsh("destroy", vm_id)
    assert host.machines.reconcile()["differences"] == []
    info = host.info(vm_id)
    assert (info["status"], info["exit_reason"]) == ("Down", ExitReason.ADMIN_SHUTDOWN)


def test_without_libvirt_a_comparison_says_so(host: virt_ground.Host) -> None:
    vm_id = host.started()
    host.ground.stop_libvirtd()
    try:
        until(lambda: host.info(vm_id)["status"] == "Unknown")
        found = host.machines.reconcile()
        assert (found["checked"], found["differences"]) == (0, [])
        assert found["unreachable"]
        with pytest.raises(errors.HypervisorUnavailable):
            host.create()
    finally:
        host.ground.start_libvirtd()
    host.wait(vm_id, "Up")


# -- domains of others -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "with metadata of a later version"])
def foreign(host: virt_ground.Host, request: pytest.FixtureRequest) -> str:
    """A running domain that this agent did not start."""
    vm_id = ids.new()
    ours = '<metadata><vm xmlns="urn:vdsm:vm:1">{"version": 99}</vm></metadata>'
    xml = FOREIGN.format(uuid=vm_id, metadata="" if request.param == "plain" else ours)
    path = host.ground.stack.place.scratch / "foreign.xml"
    path.write_text(xml)
    host.ground.virsh("create", str(path))
    host.machines.reconcile()
    return vm_id


def test_a_foreign_domain_is_shown_and_never_touched(host: virt_ground.Host, foreign: str) -> None:
    pid = qemu.find(foreign)
    assert host.machines.list() == [{"vm_id": foreign, "name": "theirs", "status": "Up", "foreign": True}]
    for verb in (host.machines.destroy, host.machines.pause, host.machines.cont, host.machines.reset):
        with pytest.raises(errors.ForeignVm):
            verb(foreign)
    with pytest.raises(errors.VmExists):
        host.create(vm_id=foreign)
    host.restart()
    host.machines.reconcile()
    assert (qemu.find(foreign), host.ground.virsh("domstate", foreign)) == (pid, "running")


def test_a_start_whose_id_a_foreign_domain_took_meanwhile_fails_and_leaves_it(
    host: virt_ground.Host, foreign: str
) -> None:
    """Between two comparisons the table does not know of it: libvirt refuses, and nothing is undone on it."""
    host.machines._table._foreign = {}
    pid = qemu.find(foreign)
    info = host.refused(vm_id=foreign)
    assert info["error"]["data"]["key"] == "hypervisor_failed"
    assert (qemu.find(foreign), host.ground.virsh("domstate", foreign)) == (pid, "running")
    host.machines.destroy(foreign)
    assert host.ground.virsh("domstate", foreign) == "running"
    host.machines.reconcile()
