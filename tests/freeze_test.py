"""One of five repositories hangs in D state: who does not touch it must not feel it."""

import functools
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, load, loopfs, proof, until
from vdsm import standalone
from vdsm.client import transport
from vdsm.standalone import processes

HEALTHY = ("main", "calm-1", "calm-2", "calm-3")
FROZEN = "frozen"
WRITERS = 40
WORSE = 2.0  # how much longer the slowest hundredth may take
WRITING = ("Storage.createVirtualDisk", "Storage.removeImage")
HEALTHY_AFTER_S = 30.0


@pytest.fixture(scope="module")
def five(stack: standalone.Stack, repo: str) -> Iterator[Path]:
    """The mount point of the fifth repository. All five are joined."""
    with loopfs.mounted(256 << 20, stack.inside([]), stack.storage_dir / FROZEN) as place:
        for name in (*HEALTHY[1:], FROZEN):
            begin_connect(stack, name)
        with transport.connect(str(stack.socket_path)) as client:
            for name in (*HEALTHY, FROZEN):
                until.until(lambda name=name: conftest.repository(client, name)["state"] == "joined", conftest.JOIN_S)
        yield place
        with transport.connect(str(stack.socket_path)) as client:
            for name in (*HEALTHY[1:], FROZEN):
                client.call("Storage.disconnectStorageRepository", {"repoId": name})


def begin_connect(stack: standalone.Stack, name: str) -> None:
    path = stack.storage_dir / name / ("repository" if name == FROZEN else "")
    given = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": str(path)}}
    with transport.connect(str(stack.socket_path)) as client:
        client.call("Storage.formatStorageRepository", {**given, "options": {"ioTimeout": 2}})
        client.call("Storage.connectStorageRepository", {"repoId": name, **given})


def connect(stack: standalone.Stack) -> load.Connect:
    return functools.partial(transport.connect, str(stack.socket_path), 120.0)


def measuring(stack: standalone.Stack, vm_id: str) -> load.Load:
    """Everything that does not touch the fifth repository."""

    def calls(repo_id: str) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("Host.ping2", {}),
            ("Host.getVMList", {}),
            ("Host.getAllVmStats", {}),
            ("Host.getJobs", {}),
            ("VM.getInfo", {"vmID": vm_id}),
            ("Storage.listStorageRepositories", {}),
            *load.of_images(repo_id),
        ]

    return load.Load(connect(stack), HEALTHY, calls)


def stack_processes(stack: standalone.Stack) -> list[int]:
    return [one.pid for one in processes.inside(stack.run_dir)]


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def stuck(stack: standalone.Stack) -> list[int]:
    """Threads in D state: sanlock's, with the leases of the frozen repository, and children with its files."""
    tasks = [path for pid in stack_processes(stack) for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [int(task.parent.name) for task in tasks if until.state_of(task) == "D"]


def measure(stack: standalone.Stack, five: Path, vm_id: str, rounds: int, seconds: float) -> dict[str, load.Measured]:
    """The 99th percentile of each verb while the fifth repository is free, and while it is frozen and written to."""
    calls = measuring(stack, vm_id)
    calls.run(1.0)  # all children and threads are there
    processes_before, threads_before = len(stack_processes(stack)), threads(stack.agent_pid)
    # All children of all repositories, and threads that wait for them. Threads or processes for each of the calls would
    # be more.
    most = (len(HEALTHY) + 1) * stack.settings.storage.io_children
    assert most < WRITERS
    free: load.Samples = defaultdict(list)
    frozen: load.Samples = defaultdict(list)
    for _ in range(rounds):
        load.add(free, calls.run(seconds))
        loopfs.freeze(five, stack.inside([]))
        with load.Writers(connect(stack), FROZEN, WRITERS).calling():
            try:
                until.until(lambda: stuck(stack))
                load.add(frozen, calls.run(seconds))
                assert len(stack_processes(stack)) <= processes_before + most
                assert threads(stack.agent_pid) <= threads_before + most
            finally:
                loopfs.thaw(five, stack.inside([]))
        check_healthy(stack)
    return load.measured(free, frozen)


def check_healthy(stack: standalone.Stack) -> None:
    """The thawed repository takes writes again soon, and nothing hangs any more."""
    thawed = time.monotonic()
    with transport.connect(str(stack.socket_path)) as client:
        image_id = client.call("Storage.createVirtualDisk", {"targetRepoId": FROZEN, "size": 1 << 20})["imageId"]
        client.call("Storage.removeImage", {"repositoryId": FROZEN, "imageId": image_id})
    assert time.monotonic() - thawed < HEALTHY_AFTER_S
    assert not stuck(stack)


@pytest.mark.timeout(240)
def test_frozen_repository_is_felt_by_nobody_else(
    stack: standalone.Stack, five: Path, machines: conftest.Machines
) -> None:
    vm_id, felt = machines.started(), list[str]()
    # A call that waits for the frozen one takes a second, or, when it writes, until the thaw; what is below speaks of a
    # machine that is busy with the tests beside this one, and more of it of another moment: what waits for the frozen
    # one does so each time. `make torture` has the exact bound.
    for _ in range(3):
        figures = measure(stack, five, vm_id, rounds=1, seconds=5.0)
        print(figures)
        noise = {verb: 3.0 if verb in WRITING else 0.9 for verb in figures}
        felt = [verb for verb, found in figures.items() if found.frozen > max(noise[verb], WORSE * found.free)]
        if not felt:
            break
    assert not felt


@pytest.mark.torture
@pytest.mark.timeout(1200)
def test_figures_of_a_frozen_repository(stack: standalone.Stack, five: Path, machines: conftest.Machines) -> None:
    rounds, seconds = 8, 10.0
    with proof.writing("frozen-repository", None) as told:
        figures = measure(stack, five, machines.started(), rounds, seconds)
        told["rounds, seconds each"] = f"{rounds}, {seconds:g}"
        for verb, (calls, free, frozen) in sorted(figures.items()):
            told[verb] = f"{calls} calls, p99 {free * 1000:.1f} ms free, {frozen * 1000:.1f} ms frozen"
        assert not {verb: found for verb, found in figures.items() if found.frozen > max(0.005, WORSE * found.free)}
