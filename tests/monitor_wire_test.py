"""Repositories that hang, fill up and come back, as a caller and a subscriber see it: on an agent that looks often."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, loopfs
from tests.until import state_of, until
from vdsm import ids, standalone
from vdsm.client import transport
from vdsm.standalone import processes

PERIOD_S, DEADLINE_S = 1.0, 2.0
# What a busy machine adds to them, and to a call that waits for nothing.
LEEWAY_S, QUICK_S = 5.0, 2.0
HEALTHY_S = 10.0
FROZEN = [f"frozen-{number}" for number in range(5)]
WELL = [f"well-{number}" for number in range(15)]
# A lease is late after 4 of these; after 8 the lockspace would be lost, and with it what the tests are about.
IO_TIMEOUT_S = 4


class Ground:
    """A stack with twenty repositories, five of them on small file systems of their own."""

    def __init__(self, stack: standalone.Stack, mounted: dict[str, Path]) -> None:
        self.stack = stack
        self.mounted = mounted
        self.client = transport.connect(str(stack.socket_path))
        self.seen: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """What is told inside the block is seen by `told`."""
        self.seen.clear()
        with transport.connect(str(self.stack.socket_path)) as self.follower:
            self.follower.subscribe(["repository"])
            yield

    def connect(self, name: str) -> None:
        place = self.stack.storage_dir / name / ("repository" if name in self.mounted else "")
        given = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": str(place)}}
        self.client.call("Storage.formatStorageRepository", {**given, "options": {"ioTimeout": IO_TIMEOUT_S}})
        self.client.call("Storage.connectStorageRepository", {"repoId": name, **given})

    def freeze(self, names: list[str]) -> None:
        for name in names:
            loopfs.freeze(self.mounted[name], self.stack.inside([]))

    def thaw(self, names: list[str]) -> None:
        for name in names:
            loopfs.thaw(self.mounted[name], self.stack.inside([]))

    def listed(self) -> dict[str, dict[str, Any]]:
        return {found["repoId"]: found for found in self.client.call("Storage.listStorageRepositories")}

    def are(self, names: list[str], **expected: Any) -> bool:
        found = self.listed()
        return all(found[name][field] == value for name in names for field, value in expected.items())

    def told(self, repo_id: str, change: str, count: int) -> list[dict[str, Any]]:
        """What of that kind is told of it, once it is so many."""
        while len(found := self.known(repo_id, change)) < count:
            event = self.follower.next_event(30)
            assert event is not None, (found, self.seen)
            self.seen.append(event)
        return found

    def known(self, repo_id: str, change: str) -> list[dict[str, Any]]:
        """What of that kind was seen already."""
        of_it = [event["data"] for event in self.seen if event["subject"] == repo_id]
        return [data for data in of_it if data["change"] == change]

    def inside(self, *argv: str) -> None:
        """Runs a command where the file systems are mounted."""
        subprocess.run(self.stack.inside(list(argv)), check=True)

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.stack.agent_pid}/task").iterdir()))

    def processes(self) -> list[int]:
        return [one.pid for one in processes.inside(self.stack.run_dir)]

    def stuck(self) -> int:
        """Children that wait for what is frozen; threads of sanlock wait beside them."""
        found = [path.parent for path in map(Path, (f"/proc/{pid}/stat" for pid in self.processes()))]
        return sum(state_of(path / "stat") == "D" and b"forkserver" in _cmdline(path) for path in found)


def _cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.fixture(scope="module")
def twenty() -> Iterator[Ground]:
    storage = {"monitor_s": PERIOD_S, "monitor_deadline_s": DEADLINE_S}
    with standalone.Stack(overrides={"storage": storage}) as stack:
        mounts = {name: loopfs.mounted(24 << 20, stack.inside([]), stack.storage_dir / name) for name in FROZEN}
        mounted = {name: mount.__enter__() for name, mount in mounts.items()}
        made = Ground(stack, mounted)
        try:
            for name in (*FROZEN, *WELL):
                made.connect(name)
            until(lambda: made.are([*FROZEN, *WELL], reachability="reachable", state="joined"), 90)
            yield made
        finally:
            made.client.close()
            for mount in mounts.values():
                mount.__exit__(None, None, None)


@pytest.fixture
def ground(twenty: Ground) -> Iterator[Ground]:
    """Thawed after each test, also after one that failed."""
    with twenty.following():
        yield twenty
    frozen = [name for name, found in twenty.listed().items() if found["reachability"] != "reachable"]
    if frozen:
        twenty.thaw(frozen)
        until(lambda: twenty.are(frozen, reachability="reachable"))


def write(ground: Ground, repo_id: str) -> float:
    """How long it takes to make a disk and remove it (seconds)."""
    began = time.monotonic()
    given = {"targetRepoId": repo_id, "size": 1 << 20, "options": {"imageId": ids.new()}}
    ground.client.call("Storage.createVirtualDisk", given)
    ground.client.call("Storage.removeImage", {"repositoryId": repo_id, "imageId": given["options"]["imageId"]})  # type: ignore[index]
    return time.monotonic() - began


@pytest.mark.timeout(240)
def test_five_of_twenty_freeze_again_and_again(ground: Ground) -> None:
    # The writes below have a thread and a child in each repository that they write to.
    threads, count = ground.threads() + 1 + len(FROZEN), len(ground.processes()) + 1 + len(FROZEN)
    for _ in range(3):
        ground.freeze(FROZEN)
        frozen_at = time.monotonic()
        until(lambda: ground.are(FROZEN, reachability="unreachable"), PERIOD_S + DEADLINE_S + LEEWAY_S)
        while time.monotonic() - frozen_at < PERIOD_S + DEADLINE_S + 2:  # several looks of the others
            began = time.monotonic()
            found = ground.listed()
            assert time.monotonic() - began < QUICK_S
            assert {found[name]["reachability"] for name in WELL} == {"reachable"}
            assert max(found[name]["lastCheck"] for name in WELL) < PERIOD_S + LEEWAY_S
            assert write(ground, WELL[0]) < QUICK_S + LEEWAY_S
        assert ground.stuck() <= len(FROZEN), "one look at a time"
        assert ground.threads() <= threads and len(ground.processes()) <= count
        ground.thaw(FROZEN)
        thawed_at = time.monotonic()
        until(lambda: ground.are(FROZEN, reachability="reachable"), HEALTHY_S)
        for name in FROZEN:
            write(ground, name)
        assert time.monotonic() - thawed_at < HEALTHY_S
        until(lambda: len(ground.processes()) <= count and not ground.stuck())
    for name in FROZEN:
        told = ground.told(name, "reachability", 6)
        assert [one["reachability"] for one in told] == 3 * ["unreachable", "reachable"]
        assert "does not answer" in told[0]["reason"] and told[1]["reason"] is None
    assert [name for name in WELL if ground.known(name, "reachability")] == []


def test_stats_in_upstreams_words(ground: Ground) -> None:
    found = ground.client.call("Host.getStorageRepoStats")
    assert found.keys() == {*FROZEN, *WELL}
    stats = found[WELL[0]]
    assert {name: stats[name] for name in ("code", "valid", "version", "acquired", "actual")} == {
        **{"code": 0, "valid": True, "version": 1, "acquired": True, "actual": True}
    }
    assert 0 <= float(stats["lastCheck"]) < PERIOD_S + LEEWAY_S and 0 < float(stats["delay"]) < DEADLINE_S

    ground.freeze(FROZEN[:1])
    until(lambda: ground.are(FROZEN[:1], reachability="unreachable"))
    asked = {"domains": [FROZEN[0], WELL[0], "nobody"]}
    found = ground.client.call("Host.getStorageRepoStats", asked)
    assert found.keys() == {FROZEN[0], WELL[0]}, "what is not connected is left out"
    stats = found[FROZEN[0]]
    assert (stats["code"], stats["valid"], float(stats["delay"])) == (10038, False, 0)
    ground.thaw(FROZEN[:1])
    until(lambda: ground.client.call("Host.getStorageRepoStats", asked)[FROZEN[0]]["valid"], HEALTHY_S)


@pytest.mark.timeout(240)
def test_a_lease_that_is_not_renewed_is_told_before_it_is_lost(ground: Ground) -> None:
    name = FROZEN[0]
    assert 0 <= ground.listed()[name]["renewalAge"] <= 4 * IO_TIMEOUT_S
    ground.freeze([name])
    until(lambda: ground.are([name], renewalLate=True), 60)
    assert ground.are([name], state="joined"), "its holders live"
    assert ground.are(WELL, renewalLate=False)
    ground.thaw([name])
    until(lambda: ground.are([name], renewalLate=False, reachability="reachable"), 60)
    late, timely = ground.told(name, "renewal", 2)
    assert late["renewalLate"] and late["renewalAge"] > 4 * IO_TIMEOUT_S
    assert not timely["renewalLate"] and timely["renewalAge"] <= 4 * IO_TIMEOUT_S


@pytest.mark.timeout(240)
def test_space_that_runs_out_is_told_down_and_up(ground: Ground) -> None:
    name = FROZEN[1]
    found = ground.listed()[name]
    assert found["spaceLow"] is False
    total, taken, more = found["totalBytes"], *(str(ground.mounted[name] / file) for file in ("taken", "more"))
    # Between low and enough it is what it was before, on the way down and on the way up.
    ground.inside("fallocate", "-l", str(found["freeBytes"] - total * 11 // 100), taken)
    until(lambda: ground.listed()[name]["freeBytes"] < 0.12 * total)
    assert ground.are([name], spaceLow=False)
    ground.inside("fallocate", "-l", str(total // 20), more)
    until(lambda: ground.are([name], spaceLow=True))
    ground.inside("rm", more)
    until(lambda: ground.listed()[name]["freeBytes"] > 0.1 * total)
    assert ground.are([name], spaceLow=True)
    ground.inside("rm", taken)
    until(lambda: ground.are([name], spaceLow=False))
    low, enough = ground.told(name, "space", 2)
    assert low["spaceLow"] and low["freeBytes"] < 0.1 * low["totalBytes"]
    assert not enough["spaceLow"] and enough["freeBytes"] >= 0.12 * enough["totalBytes"]


def test_what_ends_is_told_last(ground: Ground) -> None:
    """A repository that comes and goes, and what is left of it: nothing."""
    count, name = len(ground.processes()), "passing"
    ground.connect(name)
    until(lambda: ground.are([name], reachability="reachable", state="joined"), conftest.JOIN_S)
    ground.client.call("Storage.disconnectStorageRepository", {"repoId": name})
    assert name not in ground.listed()
    assert [one["state"] for one in ground.told(name, "state", 3)] == ["joining", "joined", "disconnected"]
    assert [one["reachability"] for one in ground.known(name, "reachability")] == ["reachable"]
    until(lambda: len(ground.processes()) <= count)
    ground.freeze(FROZEN[:1])  # something else that is told
    ground.told(FROZEN[0], "reachability", 1)
    told = [event for event in ground.seen if event["subject"] == name]
    assert told[-1]["data"].get("state") == "disconnected", "nothing is told after its end"
