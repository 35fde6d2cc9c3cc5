"""Hook scripts around real VMs, over the wire: QEMU gets what they made of the domain, and nobody waits for others'."""

import concurrent.futures
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, hookscripts
from tests.until import running, until
from vdsm import ids, standalone
from vdsm.client import failures, transport
from vdsm.hooks import points

VM_POINTS = [f"{when}_vm_{what}" for what in ("start", "pause", "cont", "destroy") for when in ("before", "after")]


class Hooks:
    """Scripts of the session's stack, and a directory that they, who are the agent's user, may write to."""

    def __init__(self, stack: standalone.Stack, said: Path) -> None:
        self.root = stack.place.hooks
        self.said = said

    def add(self, point: points.Point | str, text: str, name: str = "50_test") -> None:
        directory = self.root / (point if isinstance(point, str) else point.name)
        hookscripts.install(directory, name, text.replace("SAID", str(self.said)))

    def read(self, name: str) -> str:
        path = self.said / name
        until(lambda: path.exists() and path.read_text().endswith("\n"))
        return path.read_text()

    def pid(self, name: str) -> int:
        return int(self.read(name))

    def clean_up(self) -> None:
        for script in self.root.glob("*/*"):
            script.unlink()


@pytest.fixture
def hooks(stack: standalone.Stack) -> Iterator[Hooks]:
    said = stack.place.scratch / f"said-{ids.new()[:8]}"
    said.mkdir()
    said.chmod(0o777)
    made = Hooks(stack, said)
    yield made
    made.clean_up()
    subprocess.run(["rm", "-r", str(said)], check=True)


@pytest.fixture
def machines(agent: transport.Client, hooks: Hooks) -> Iterator[conftest.Machines]:
    """VMs end while the scripts are gone already: theirs is not the test's end to wait for."""
    made = conftest.Machines(agent)
    yield made
    hooks.clean_up()
    made.clean_up()


def live(stack: standalone.Stack, vm_id: str) -> str:
    command = ["virsh", "-c", stack.place.libvirt_uri, "dumpxml", vm_id]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def hook_events(client: transport.Client, vm_id: str) -> Iterator[dict[str, Any]]:
    while (event := client.next_event(60)) is not None:
        if event["topic"] == "hook" and event["subject"] == vm_id:
            yield event["data"]


def hangs(name: str) -> str:
    return f"#!/bin/sh\necho $$ > SAID/{name}\nexec sleep 300\n"


def test_qemu_gets_what_scripts_made_of_the_domain(
    stack: standalone.Stack, hooks: Hooks, images: conftest.Images, machines: conftest.Machines
) -> None:
    """Beside a disk with its leases, which the launcher still takes."""
    for name in ("qemucmdline", "smbios"):
        hooks.add(points.BEFORE_VM_START, hookscripts.EDITS[name][0], name)
    custom = hookscripts.EDITS["qemucmdline"][1]
    vm_id = machines.started(disks=[{"imageId": images.disk(), "repoId": images.repo_id}], customProperties=custom)
    assert f"für {vm_id}" in live(stack, vm_id)
    pid = machines.info(vm_id)["pid"]
    assert b"name=opt/hook,string=yes" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    machines.client.call("VM.pause", {"vmID": vm_id})
    machines.client.call("VM.cont", {"vmID": vm_id})  # only with all its leases


def test_every_point_of_a_vms_life(stack: standalone.Stack, hooks: Hooks, agent: transport.Client) -> None:
    """In order, with the VM's id, its properties and its domain; and each is told as an event."""
    text = "#!/bin/sh\necho $(basename $(dirname $0)) $vmId $colour $(grep -c '<uuid>' $_hook_domxml) >> SAID/all\n"
    for point in VM_POINTS:
        hooks.add(point, text)
    machines = conftest.Machines(agent)
    with transport.connect(str(stack.socket_path)) as listener:
        listener.subscribe(["hook"])
        vm_id = machines.started(customProperties={"colour": "blue"})
        until(lambda: "after_vm_start" in hooks.read("all"))
        agent.call("VM.pause", {"vmID": vm_id})
        agent.call("VM.cont", {"vmID": vm_id})
        machines.destroy(vm_id)
        told = []
        for data in hook_events(listener, vm_id):
            told.append(data["point"])
            assert [(one["script"], one["exit"], one["problem"]) for one in data["scripts"]] == [("50_test", 0, None)]
            if data["point"] == VM_POINTS[-1]:
                break
    assert hooks.read("all").splitlines() == [f"{point} {vm_id} blue 1" for point in VM_POINTS]
    assert told == VM_POINTS


def test_a_veto_of_the_start_names_the_script_and_its_words(hooks: Hooks, machines: conftest.Machines) -> None:
    hooks.add(points.BEFORE_VM_START, "#!hook\nhooking.exit_hook('no licence left')\n")
    hooks.add(points.AFTER_VM_DESTROY, "#!/bin/sh\necho $vmId > SAID/ended\n")
    vm_id = machines.create()
    info = machines.wait(vm_id, "Down")
    error = info["error"]
    assert (error["code"], error["data"]["key"]) == (1500, "hook_failed")
    assert "50_test" in info["exitMessage"] and "no licence left" in info["exitMessage"]
    assert error["data"]["facts"]["stderr"] == "no licence left"
    assert hooks.read("ended") == f"{vm_id}\n"  # what scripts before the start made must be cleaned up


def test_a_domain_that_cannot_be_used_is_refused(hooks: Hooks, machines: conftest.Machines) -> None:
    hooks.add(points.BEFORE_VM_START, "#!/bin/sh\nsed -i 's|<uuid>.|<uuid>0|; s|<uuid>|<uuid>f|' $_hook_domxml\n")
    info = machines.wait(machines.create(), "Down")
    assert info["error"]["data"]["key"] == "hook_failed"
    assert "it changed the VM's uuid" in info["exitMessage"]


@pytest.mark.parametrize(("verb", "state"), [("pause", "Up"), ("cont", "Paused")])
def test_a_veto_of_a_verb_changes_nothing(
    hooks: Hooks, machines: conftest.Machines, agent: transport.Client, verb: str, state: str
) -> None:
    vm_id = machines.started()
    if state == "Paused":
        agent.call("VM.pause", {"vmID": vm_id})
    hooks.add(f"before_vm_{verb}", "#!/bin/sh\necho not now >&2\nexit 2\n")
    with pytest.raises(failures.ClientError) as refused:
        agent.call(f"VM.{verb}", {"vmID": vm_id})
    assert refused.value.data["key"] == "hook_failed"
    assert "not now" in str(refused.value)
    assert machines.status(vm_id) == state


def test_no_script_keeps_a_vm_from_being_destroyed(hooks: Hooks, machines: conftest.Machines) -> None:
    vm_id = machines.started()
    for point in (points.BEFORE_VM_DESTROY, points.AFTER_VM_DESTROY):
        hooks.add(point, "#!/bin/sh\nexit 2\n")
    machines.destroy(vm_id)
    assert vm_id not in machines.client.call("Host.getVMList")


def test_destroy_ends_a_start_that_a_script_holds(hooks: Hooks, machines: conftest.Machines) -> None:
    hooks.add(points.BEFORE_VM_START, hangs("pid"))
    vm_id = machines.create()
    pid = hooks.pid("pid")
    began = time.monotonic()
    machines.destroy(vm_id)
    assert time.monotonic() - began < 25, "the script has 30 s"
    until(lambda: not running(pid))
    assert vm_id not in machines.client.call("Host.getVMList")


def test_starts_that_scripts_hold_keep_no_other_from_starting(
    stack: standalone.Stack, hooks: Hooks, machines: conftest.Machines
) -> None:
    """More of them than VMs are started at once."""
    text = '#!/bin/sh\ntest -z "$hangs" && exit 0\necho $$ > SAID/$vmId\nexec sleep 300\n'
    hooks.add(points.BEFORE_VM_START, text)
    count = stack.settings.virt.starts + 1
    held = [machines.create(customProperties={"hangs": "yes"}) for _ in range(count)]
    pids = [hooks.pid(vm_id) for vm_id in held]
    machines.started()
    assert all(map(running, pids))
    for vm_id in held:
        machines.destroy(vm_id)
    until(lambda: not any(map(running, pids)))


def test_scripts_that_hang_hold_up_nobody_else(
    stack: standalone.Stack, hooks: Hooks, machines: conftest.Machines
) -> None:
    """More VMs in a hanging verb than the agent has threads for verbs; all others still answer, and end them."""
    vms = [machines.started() for _ in range(3)]
    other = machines.started()
    text = f"#!/bin/sh\ntest $vmId = {other} && exit 0\necho $$ > SAID/$vmId\nexec sleep 300\n"
    hooks.add(points.BEFORE_VM_PAUSE, text)

    def pause(vm_id: str) -> str:
        with transport.connect(str(stack.socket_path)) as client:
            try:
                client.call("VM.pause", {"vmID": vm_id}, 120)
            except failures.ClientError as error:
                return str(error.data["key"])
        return "paused"

    with concurrent.futures.ThreadPoolExecutor(9) as callers:
        pausing = [callers.submit(pause, vm_id) for vm_id in vms * 3]
        pids = [hooks.pid(vm_id) for vm_id in vms]
        began = time.monotonic()
        assert machines.client.call("VM.pause", {"vmID": other})["status"] == "Paused"
        machines.client.call("Host.getHardwareInfo")
        machines.client.call("Host.getCapabilities")
        for vm_id in vms:
            machines.destroy(vm_id)
        assert time.monotonic() - began < 20
        until(lambda: not any(map(running, pids)))  # nobody wants them any more
        outcomes = {future.result(60) for future in pausing}
    assert outcomes <= {"hook_failed", "no_such_vm", "vm_wrong_state"}


def test_a_guest_that_ends_by_itself_is_cleaned_up_after(
    stack: standalone.Stack, hooks: Hooks, machines: conftest.Machines
) -> None:
    vm_id = machines.started()
    hooks.add(points.BEFORE_VM_DESTROY, "#!/bin/sh\ntouch SAID/before\n")
    hooks.add(points.AFTER_VM_DESTROY, "#!/bin/sh\ncp $_hook_domxml SAID/domain\necho $vmId > SAID/ended\n")
    conftest.end_domain(stack, vm_id)
    assert hooks.read("ended") == f"{vm_id}\n"
    assert f"<uuid>{vm_id}</uuid>" in (hooks.said / "domain").read_text()
    assert not (hooks.said / "before").exists()  # nobody could say so before
    hooks.add(points.AFTER_VM_DESTROY, "#!/bin/sh\necho $vmId >> SAID/ended\n")
    machines.destroy(vm_id)
    assert hooks.read("ended") == f"{vm_id}\n"  # once


def test_destroy_waits_for_what_cleans_up_after_the_vm(hooks: Hooks, machines: conftest.Machines) -> None:
    """Otherwise it would clean up under the next start of the same VM."""
    hooks.add(points.AFTER_VM_DESTROY, "#!/bin/sh\nsleep 1\necho done > SAID/ended\n")
    vm_id = machines.started()
    machines.destroy(vm_id)
    assert (hooks.said / "ended").read_text() == "done\n"


def test_a_start_flag_leaves_the_guest_paused(
    stack: standalone.Stack, hooks: Hooks, machines: conftest.Machines
) -> None:
    hooks.add(
        points.BEFORE_VM_START,
        "#!hook\nvm = os.environ['vmId']\n"
        "hooking.dump_vm_launch_flags_to_file(vm, hooking.load_vm_launch_flags_from_file(vm) | 1)\n",
    )
    vm_id = machines.create()
    machines.wait(vm_id, "Paused")
    command = ["virsh", "-c", stack.place.libvirt_uri, "domstate", vm_id]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "paused"
    assert machines.client.call("VM.cont", {"vmID": vm_id})["status"] == "Up"


def test_properties_that_are_not_the_callers_are_refused_at_once(machines: conftest.Machines) -> None:
    with pytest.raises(failures.ClientError) as refused:
        machines.create(customProperties={"LD_PRELOAD": "/tmp/evil.so"})
    assert refused.value.data["key"] == "invalid_parameters"
    assert refused.value.data["facts"]["parameter"] == "custom_properties.LD_PRELOAD"


def test_capabilities_tell_scripts_and_are_theirs_to_change(hooks: Hooks, agent: transport.Client) -> None:
    hooks.add(
        points.AFTER_GET_CAPS,
        "#!hook\ndata = hooking.read_json()\ndata['vmfex'] = data['hostID']\nhooking.write_json(data)\n",
        "60_adds",
    )
    hooks.add(points.AFTER_GET_CAPS, "#!/bin/sh\necho '{' > $_hook_json\n", "70_breaks")
    told = agent.call("Host.getCapabilities")
    assert told["vmfex"] == told["hostID"]
    assert told["hooks"].keys() == {"after_get_caps"}
    assert {len(script["checksum"]) for script in told["hooks"]["after_get_caps"].values()} == {64}


def test_agent_start_and_stop(stack: standalone.Stack, repo: str, hooks: Hooks) -> None:
    hooks.add(points.BEFORE_VDSM_START, "#!/bin/sh\necho start >> SAID/agent\nexit 2\n")  # no veto
    hooks.add(points.AFTER_VDSM_STOP, "#!/bin/sh\necho stop >> SAID/agent\n")
    stack.restart_agent()
    assert hooks.read("agent") == "stop\nstart\n"
    conftest.reconnect_repository(stack, repo)


def test_scripts_die_with_the_agent(stack: standalone.Stack, repo: str, hooks: Hooks) -> None:
    hooks.add(points.BEFORE_VM_START, hangs("pid"))
    with transport.connect(str(stack.socket_path)) as client:
        conftest.Machines(client).create()
    pid = hooks.pid("pid")
    stack.kill_agent()
    until(lambda: not running(pid))
    hooks.clean_up()
    stack.start_agent()
    conftest.reconnect_repository(stack, repo)
    with transport.connect(str(stack.socket_path)) as client:
        assert client.call("Host.getVMList") == []
