"""What the agent tells of its VMs, images, jobs and repositories, and how it finds out: through the wire."""

import concurrent.futures
import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import conftest
from tests.until import until
from vdsm import ids, standalone
from vdsm.api import shapes
from vdsm.client import failures, transport
from vdsm.virt import qemu
from vdsm.virt.states import ExitReason

FOREIGN = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
    <os><type arch='x86_64' machine='q35'>hvm</type></os><devices/></domain>"""


# What the monitor sees comes in between, whenever it looks.
MONITORED = {("repository", change) for change in ("reachability", "space", "renewal")}


class Follower:
    """A subscriber, as an engine is one."""

    def __init__(self, address: str, *topics: str) -> None:
        self.client = transport.connect(address)
        self.client.subscribe(list(topics))
        self.seen: list[dict[str, Any]] = []

    def of(self, subject: str, last: Any, timeout_s: float = 60.0) -> list[tuple[Any, ...]]:
        """What was told of `subject`, in the words of `told`, up to and with `last`."""
        deadline = time.monotonic() + timeout_s
        while not (found := [told(event) for event in self.seen if event["subject"] == subject]) or found[-1] != last:
            event = self.client.next_event(max(0.0, deadline - time.monotonic()))
            assert event is not None, found
            shapes.MODELS[event["topic"]].model_validate(event["data"], by_alias=True, by_name=False)
            if (event["topic"], event["data"].get("change")) not in MONITORED:
                self.seen.append(event)
        return found


def told(event: dict[str, Any]) -> tuple[Any, ...]:
    """The gist of an event."""
    data = event["data"]
    if event["topic"] == "vm":
        return (data["change"], data["status"])
    if event["topic"] == "job":
        return (data["status"], data["deleted"])
    return (data["change"] if event["topic"] == "image" else data["state"],)


@pytest.fixture
def follow(stack: standalone.Stack, repo: str) -> Iterator[Any]:
    made: list[Follower] = []

    def begin(*topics: str) -> Follower:
        made.append(Follower(f"ws://127.0.0.1:{stack.tcp_port}", *topics))
        return made[-1]

    yield begin
    for follower in made:
        follower.client.close()


def virsh(stack: standalone.Stack, *words: str) -> str:
    command = ["virsh", "-c", stack.place.libvirt_uri, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


# -- events ------------------------------------------------------------------------------------------------------------


def test_every_change_of_a_vm_is_told_in_its_order(
    stack: standalone.Stack, follow: Any, machines: conftest.Machines
) -> None:
    follower = follow("vm")
    vm_id = machines.started()
    for verb in ("pause", "cont", "reset"):
        machines.client.call(f"VM.{verb}", {"vmID": vm_id})
    follower.of(vm_id, ("rebooted", "Up"))
    conftest.end_domain(stack, vm_id)
    follower.of(vm_id, ("state", "Down"))
    machines.destroy(vm_id)
    seen = follower.of(vm_id, ("forgotten", "Down"))
    # Whether QEMU is seen on its way out is a matter of milliseconds, and a BIOS that finds that it ran before resets
    # once more.
    told = [gist for gist, _ in itertools.groupby(seen) if gist != ("state", "PoweringDown")]
    assert told == [
        *(("created", "WaitForLaunch"), ("state", "Up"), ("state", "Paused"), ("state", "Up")),
        *(("rebooted", "Up"), ("state", "Down"), ("forgotten", "Down")),
    ]
    mine = [event for event in follower.seen if event["subject"] == vm_id]
    assert all(event["data"]["reason"] for event in mine)
    assert [event["data"]["exitReason"] for event in mine[-2:]] == [ExitReason.ADMIN_SHUTDOWN] * 2


def test_a_start_that_fails_is_told_with_its_reason(follow: Any, machines: conftest.Machines) -> None:
    follower, missing = follow("vm"), ids.new()
    vm_id = machines.create(disks=[{"imageId": missing}])
    assert follower.of(vm_id, ("state", "Down")) == [("created", "WaitForLaunch"), ("state", "Down")]
    assert missing in follower.seen[-1]["data"]["reason"]
    assert follower.seen[-1]["data"]["exitReason"] == ExitReason.START_FAILED


def test_every_change_of_an_image_and_of_its_job_is_told(follow: Any, repo: str, images: conftest.Images) -> None:
    follower, client = follow("image", "job"), images.client
    disk = images.disk()
    snapshot = images.snapshot(disk)
    client.call("Storage.setImageUserData", {"repositoryId": repo, "imageId": disk, "userData": {"a": 1}})
    copy = client.call("Storage.copyImage", {"targetRepoId": repo, "imageId": disk})
    conftest.done(client, copy["jobId"])
    client.call("Job.delete", {"jobId": copy["jobId"]})
    for image_id in (copy["imageId"], disk):
        client.call("Storage.removeImage", {"repositoryId": repo, "imageId": image_id})
    images.made.remove(disk)
    assert follower.of(disk, ("removed",)) == [("created",), ("snapshot",), ("user_data",), ("removed",)]
    assert follower.of(snapshot, ("created",)) == [("created",)]
    assert follower.of(copy["imageId"], ("removed",)) == [("begun",), ("done",), ("removed",)]
    moves = follower.of(copy["jobId"], ("done", True))
    assert (moves[0], moves[-2:]) == (("pending", False), [("done", False), ("done", True)])


def test_a_repository_that_comes_and_goes_is_told(
    stack: standalone.Stack, follow: Any, agent: transport.Client
) -> None:
    follower, repo_id = follow("repository"), f"r-{ids.new()[:8]}"
    where = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": str(stack.storage_dir / repo_id)}}
    agent.call("Storage.formatStorageRepository", {**where, "options": {"ioTimeout": 1}})
    agent.call("Storage.connectStorageRepository", {"repoId": repo_id, **where})
    follower.of(repo_id, ("joined",))
    agent.call("Storage.disconnectStorageRepository", {"repoId": repo_id})
    assert follower.of(repo_id, ("disconnected",)) == [("joining",), ("joined",), ("disconnected",)]


def test_a_subscriber_of_an_earlier_life_of_the_agent_gets_a_gap(
    stack: standalone.Stack, repo: str, images: conftest.Images
) -> None:
    with transport.connect(str(stack.socket_path)) as client:
        client.subscribe(["image"])
        images.disk()
        last = client.next_event(30)
    assert last is not None
    stack.restart_agent()
    with transport.connect(str(stack.socket_path)) as again:
        images.client = again
        conftest.reconnect_repository(stack, repo)
        answer = again.call("Host.subscribe", {"instanceId": last["instanceId"], "since": last["sequence"]})
        assert answer["gap"] is True
        assert answer["instanceId"] != last["instanceId"]
        first = again.next_event(30)
        assert first is not None
        assert (first["instanceId"], first["topic"]) == (answer["instanceId"], "repository")
        again.call("Host.unsubscribe")
        images.clean_up()
        images.made.clear()


# -- comparing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(stack: standalone.Stack) -> Iterator[str]:
    """A domain made beside the agent."""
    vm_id = ids.new()
    path = stack.place.scratch / "foreign.xml"
    path.write_text(FOREIGN.format(name=f"theirs-{vm_id[:8]}", uuid=vm_id))
    virsh(stack, "create", str(path))
    yield vm_id
    if vm_id in virsh(stack, "list", "--uuid").split():
        virsh(stack, "destroy", vm_id)


def test_a_domain_of_others_is_reported_and_left_alone(
    stack: standalone.Stack, follow: Any, agent: transport.Client, foreign: str
) -> None:
    follower, pid = follow("vm"), qemu.find(foreign)
    found = agent.call("Host.reconcile")
    assert found["unreachable"] is None and found["checked"] >= 1
    (difference,) = [one for one in found["differences"] if one["vmId"] == foreign]
    assert (difference["had"], difference["found"], difference["done"]) == (None, "Up", "left alone")
    assert foreign in {one["vmId"] for one in found["foreign"]}
    follower.of(foreign, ("difference", "Up"))

    assert foreign not in agent.call("Host.getVMList")
    listed = agent.call("Host.getVMList", {"onlyUUID": False})
    assert [one["foreign"] for one in listed if one["vmId"] == foreign] == [True]
    assert foreign not in {stats["vmId"] for stats in agent.call("Host.getAllVmStats")}
    with pytest.raises(failures.ClientError) as refused:
        agent.call("VM.destroy", {"vmID": foreign})
    assert refused.value.data["key"] == "foreign_vm"
    assert (qemu.find(foreign), virsh(stack, "domstate", foreign)) == (pid, "running")

    virsh(stack, "destroy", foreign)
    again = agent.call("Host.reconcile")
    assert [(one["had"], one["found"]) for one in again["differences"]] == [("Up", None)]
    assert [one["vmId"] for one in again["history"]].count(foreign) == 2
    assert agent.call("Host.reconcile")["differences"] == []


def test_a_vm_that_ended_while_the_agent_was_away_is_listed_until_it_is_destroyed(
    stack: standalone.Stack, repo: str, images: conftest.Images
) -> None:
    disk = images.disk()
    spec = {"name": "away", "disks": [{"imageId": disk, "repoId": repo}]}
    with transport.connect(str(stack.socket_path)) as before:
        machines = conftest.Machines(before)
        ended, runs, destroyed = machines.started(**spec), machines.started(leaseRepoId=repo), ids.new()
        machines.started(vmId=destroyed, leaseRepoId=repo)
        machines.destroy(destroyed)
        forgettable = machines.started()  # nobody keeps a record of it
    stack.kill_agent()
    for vm_id in (ended, forgettable):
        conftest.end_domain(stack, vm_id)
    for life in ("the first life after it", "another one"):
        stack.start_agent()
        follower = Follower(str(stack.socket_path), "vm")
        with transport.connect(str(stack.socket_path)) as client:
            assert client.call("Host.getVMList") == [runs], life
            conftest.reconnect_repository(stack, repo)
            follower.of(ended, ("difference", "Down"))
            follower.client.close()
            assert set(client.call("Host.getVMList")) == {runs, ended}, life
        if life == "the first life after it":
            stack.kill_agent()
    with transport.connect(str(stack.socket_path)) as client:
        images.client = client
        info = client.call("VM.getInfo", {"vmID": ended})
        assert (info["status"], info["exitCode"], info["exitReason"]) == ("Down", 1, ExitReason.LOST_QEMU)
        assert (info["name"], info["fromRecord"]) == ("away", True)
        assert [one["imageId"] for one in info["spec"]["disks"]] == [disk]
        assert "memory" not in info["spec"], "nobody knows it any more"
        (stats,) = client.call("VM.getStats", {"vmID": ended})
        assert (stats["status"], stats["exitReason"]) == ("Down", ExitReason.LOST_QEMU)
        assert "while the agent was away" in stats["exitMessage"]

        with pytest.raises(failures.ClientError) as refused:
            client.call("VM.create", {"vmParams": {"vmId": ended}})
        assert refused.value.data["key"] == "vm_exists"
        machines = conftest.Machines(client)
        client.call("VM.destroy", {"vmID": ended})
        assert client.call("Host.getVMList") == [runs]
        machines.started(vmId=ended, **spec)
        machines.made.append(runs)
        machines.clean_up()
    stack.restart_agent()
    with transport.connect(str(stack.socket_path)) as client:
        images.client = client
        follower = Follower(str(stack.socket_path), "repository")
        conftest.reconnect_repository(stack, repo)
        follower.of(repo, ("joined",))
        follower.client.close()
        assert client.call("Host.reconcile")["history"] == []
        assert client.call("Host.getVMList") == []
        images.clean_up()
        images.made.clear()


# -- what hangs --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing inside the block, if it lives so long."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def refusal(stack: standalone.Stack, verb: str, params: dict[str, Any]) -> tuple[str, float]:
    """The key of the error with which a call of its own connection ends, and after how many seconds."""
    began = time.monotonic()
    with transport.connect(str(stack.socket_path)) as client, pytest.raises(failures.ClientError) as refused:
        client.call(verb, params)
    return str(refused.value.data["key"]), time.monotonic() - began


def test_a_libvirtd_that_hangs_delays_the_verbs_of_vms_alone(
    stack: standalone.Stack, repo: str, follow: Any, images: conftest.Images, machines: conftest.Machines
) -> None:
    up, paused, disk = machines.started(), machines.started(), images.disk()
    machines.client.call("VM.pause", {"vmID": paused})
    pids = [qemu.find(up), qemu.find(paused)]
    follower, client = follow("vm", "job"), machines.client
    libvirtd = int((stack.place.libvirt / "run" / "libvirtd.pid").read_text())
    with concurrent.futures.ThreadPoolExecutor(24) as callers, stopped(libvirtd):
        # More than there are threads for, and connections to libvirt.
        hanging = [callers.submit(refusal, stack, "VM.reset", {"vmID": up}) for _ in range(20)]
        slowest = 0.0
        while not all(call.done() for call in hanging):
            began = time.monotonic()
            for verb in ("ping2", "getJobs", "getAllVmStats", "getVMList"):
                client.call(f"Host.{verb}")
            client.call("Storage.listStorageRepositories")
            client.call("Storage.listImages", {"repositoryId": repo})
            client.call("Storage.setImageUserData", {"repositoryId": repo, "imageId": disk, "userData": {"a": began}})
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5, "seven verbs together"
        assert {call.result()[0] for call in hanging} == {"hypervisor_unavailable"}
        assert max(call.result()[1] for call in hanging) < 45

        for vm_id in (up, paused):
            follower.of(vm_id, ("state", "Unknown"))
        assert {machines.status(vm_id) for vm_id in (up, paused)} == {"Unknown"}
        for verb in ("pause", "cont", "destroy"):
            key, seconds = refusal(stack, f"VM.{verb}", {"vmID": up})
            assert (key, seconds < 5) == ("hypervisor_unavailable", True)
        key, seconds = refusal(stack, "VM.create", {"vmParams": {"vmId": ids.new()}})
        assert (key, seconds < 5) == ("hypervisor_unavailable", True)
        found = client.call("Host.reconcile")
        assert (found["checked"], bool(found["unreachable"])) == (0, True)
        copy = client.call("Storage.copyImage", {"targetRepoId": repo, "imageId": disk})
        images.made.append(copy["imageId"])
        conftest.done(client, copy["jobId"], 60)

    follower.of(up, ("state", "Up"))
    follower.of(paused, ("state", "Paused"))
    assert [qemu.find(up), qemu.find(paused)] == pids
    client.call("VM.cont", {"vmID": paused})
    assert {machines.status(vm_id) for vm_id in (up, paused)} == {"Up"}
    assert client.call("Host.reconcile")["unreachable"] is None


def test_a_qemu_that_hangs_ages_alone_and_can_be_ended(
    stack: standalone.Stack, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    client, disk = machines.client, images.disk()
    stuck, fine = machines.started(disks=[{"imageId": disk, "repoId": repo}]), machines.started()

    def stats(vm_id: str) -> dict[str, Any]:
        return dict(client.call("VM.getStats", {"vmID": vm_id})[0])

    until(lambda: stats(stuck).get("disks") and "sampleTime" in stats(fine))
    figures, pid = stats(stuck)["disks"], qemu.find(stuck) or 0
    assert stats(stuck)["staleSince"] is None
    with stopped(pid), concurrent.futures.ThreadPoolExecutor(1) as caller:
        stopped_at = time.time()
        until(lambda: stats(stuck)["staleSince"] is not None)
        assert stats(stuck)["staleSince"] <= stopped_at + 1
        assert stats(stuck)["disks"].keys() == figures.keys()
        after = time.time()
        until(lambda: stats(fine)["sampleTime"] > after)
        assert stats(fine)["staleSince"] is None
        assert {known["vmId"] for known in client.call("Host.getAllVmStats")} >= {stuck, fine}
        waiting = caller.submit(refusal, stack, "VM.pause", {"vmID": stuck})
        assert client.call("VM.pause", {"vmID": fine})["status"] == "Paused"
        machines.destroy(stuck)
        assert waiting.result(60)[0] in ("no_such_vm", "hypervisor_failed", "vm_wrong_state", "deadline_passed")
    assert qemu.find(stuck) is None
    machines.started(vmId=stuck, disks=[{"imageId": disk, "repoId": repo}])
