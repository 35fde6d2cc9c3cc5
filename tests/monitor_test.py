"""What the monitor makes of what it sees, and when it looks: with a clock of the test's own."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import loopfs, sanlock_fixture, storage_fixture
from tests.until import until
from vdsm import config, errors, events, ids, leases
from vdsm.storage import connected, formats, lockspaces, monitor
from vdsm.storage.steps import places

world, service = storage_fixture.world, storage_fixture.service
Service, World = storage_fixture.Service, storage_fixture.World

SETTINGS = config.Storage(monitor_s=10.0, space_low_percent=10.0, space_enough_percent=12.0)
IO_TIMEOUT_S = 5
STUCK = errors.RepositoryStuck(repo_id="repo", seconds=10)


class Scene:
    """One repository that answers what the test wants."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: list[Any] = []
        self.failure: errors.VdsmError | None = None
        self.free_bytes = 500
        self.brought_back = 0
        self.obstacle: errors.VdsmError | None = None
        clocks = (lambda: self.now, lambda: 1e9 + self.now)
        self.watch = monitor.Watch(SETTINGS, IO_TIMEOUT_S, self.ask, self.told.append, *clocks, self.bring_back)

    def ask(self) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        return {"read_s": 0.25, "total_bytes": 1000, "free_bytes": self.free_bytes}

    def bring_back(self) -> None:
        self.brought_back += 1
        if self.obstacle is not None:
            raise self.obstacle

    def look(self, failure: errors.VdsmError | None = None) -> dict[str, Any]:
        self.failure = failure
        self.watch.look()
        return self.watch.info()

    def reachability(self) -> list[tuple[str, str | None]]:
        """What was told of it."""
        told = [(one["reachability"], one["reason"]) for one in self.told if one["change"] == "reachability"]
        self.told.clear()
        return told


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_nothing_is_known_before_the_first_look(scene: Scene) -> None:
    found = scene.watch.info()
    assert (found["reachability"], found["last_check"], found["read_latency"]) == ("unknown", None, None)
    assert (found["total_bytes"], found["free_bytes"], found["space_low"]) == (None, None, None)
    assert (found["renewal_age"], found["renewal_late"]) == (None, False)
    assert scene.told == []


def test_a_look_that_was_answered_is_told_with_its_age(scene: Scene) -> None:
    scene.look()
    scene.now += 7
    found = scene.watch.info()
    assert (found["reachability"], found["reachability_reason"], found["reachability_code"]) == ("reachable", None, 0)
    assert (found["last_check"], found["read_latency"], found["free_bytes"]) == (7, 0.25, 500)
    assert scene.reachability() == [("reachable", None)]


def test_each_change_is_told_once_and_since_when(scene: Scene) -> None:
    scene.look()
    for _ in range(3):
        scene.now += 10
        found = scene.look(STUCK)
    assert found["reachability_since"] == 1e9 + 1010, "when it began, not when it was seen again"
    assert (found["reachability_code"], found["reachability_reason"]) == (STUCK.code, str(STUCK))
    assert (found["read_latency"], found["free_bytes"]) == (None, None), "what is old is not told"
    scene.now += 10
    scene.look(errors.StorageFailed(repo_id="repo", reason="Input/output error"))
    scene.now += 10
    assert scene.look()["reachability_since"] == 1e9 + 1050
    told = scene.reachability()
    assert [reachability for reachability, _ in told] == ["reachable", "unreachable", "unreachable", "reachable"]
    assert "does not answer" in str(told[1]) and "Input/output error" in str(told[2])


@pytest.mark.parametrize("trouble", [errors.WorkerDied(how="it"), errors.Unexpected(reason="x")], ids=["died", "bug"])
def test_the_agents_own_trouble_is_no_news_of_the_storage(scene: Scene, trouble: errors.VdsmError) -> None:
    scene.look()
    assert scene.look(trouble)["reachability"] == "unknown"
    assert scene.watch.pause_s() == monitor.RETRY_S


def test_what_is_not_well_is_looked_at_sooner(scene: Scene) -> None:
    assert scene.watch.pause_s() == monitor.RETRY_S
    scene.look()
    assert scene.watch.pause_s() == SETTINGS.monitor_s
    scene.look(STUCK)
    assert scene.watch.pause_s() == monitor.RETRY_S


def test_what_is_down_is_brought_back_after_a_look_that_failed(scene: Scene) -> None:
    scene.look()
    scene.look(errors.WorkerDied(how="it"))
    assert scene.brought_back == 0, "storage that answers, or of which nothing is known, lacks nothing"
    assert scene.look(STUCK)["reachability_reason"] == str(STUCK)
    scene.obstacle = errors.HelperFailed(call="StartVolumeGroup", reason="a process still has it open")
    assert scene.look(STUCK)["reachability_reason"] == str(scene.obstacle), "people can change that"
    assert scene.brought_back == 2
    assert scene.look()["reachability"] == "reachable"


def test_low_space_is_told_on_the_way_down_and_on_the_way_up(scene: Scene) -> None:
    for scene.free_bytes in (500, 101, 99, 50, 101, 119, 120, 500):
        scene.look()
    assert [(one["space_low"], one["free_bytes"]) for one in scene.told if one["change"] == "space"] == [
        (True, 99),
        (False, 120),
    ]


def test_what_was_low_stays_so_while_nothing_is_seen(scene: Scene) -> None:
    scene.free_bytes = 0
    scene.look()
    assert scene.look(STUCK)["space_low"] is True


def test_a_late_renewal_is_told_and_one_that_worked_again(scene: Scene) -> None:
    renewed_at = scene.now
    for scene.now in (renewed_at + 10, renewed_at + 20, renewed_at + 21, renewed_at + 30):
        scene.watch.renewed(renewed_at)
    assert scene.watch.info()["renewal_age"] == 30
    scene.watch.renewed(None)
    found = scene.watch.info()
    assert (found["renewal_age"], found["renewal_late"]) == (None, True), "lost, which the lockspace tells"
    scene.watch.renewed(scene.now - 1)
    told = [(one["renewal_late"], one["renewal_age"]) for one in scene.told]
    assert told == [(True, 21), (False, 1)]


# -- all of them -------------------------------------------------------------------------------------------------------


class Child:
    """Stands for a repository's children: it hangs while it is not let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = False
        self.going = threading.Event()
        self.going.set()

    def call(self, function: str, argument: object, repo_id: str) -> dict[str, Any]:
        self.calls += 1
        assert self.going.wait(60)
        return {"read_s": 0.0, "total_bytes": 1000, "free_bytes": 500}

    def close(self) -> None:
        self.closed = True


class Host:
    """A monitor of repositories of which some hang."""

    def __init__(self) -> None:
        self.renewed: dict[str, float] | errors.VdsmError = {}
        self.monitor = monitor.Monitor(config.Storage(monitor_s=0.02, monitor_deadline_s=0.1), self.renewals)
        self.children: dict[str, Child] = {}
        self.told: list[tuple[str, Any]] = []

    def renewals(self) -> dict[str, float]:
        if isinstance(self.renewed, errors.VdsmError):
            raise self.renewed
        return self.renewed

    def begin(self, name: str) -> Child:
        child: Any = Child()
        self.children[name] = child
        self.monitor.begin(name, lambda: name, child, IO_TIMEOUT_S, lambda facts: self.told.append((name, facts)))
        return self.children[name]

    def close(self) -> None:
        for child in self.children.values():
            child.going.set()
        self.monitor.stop()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


def test_twenty_repositories_of_which_five_hang(host: Host) -> None:
    threads = threading.active_count()
    for number in range(20):
        child = host.begin(f"repo-{number}")
        if number < 5:
            child.going.clear()
    assert threading.active_count() == threads, "not before it is started"
    host.monitor.start()
    children = list(host.children.values())
    until(lambda: all(child.calls >= 5 for child in children[5:]) and all(child.calls for child in children[:5]))
    assert [child.calls for child in children[:5]] == [1] * 5, "one look at a time"
    assert threading.active_count() == threads + 20 + 1
    for number in range(20):
        expected = "unknown" if number < 5 else "reachable"
        assert host.monitor.info(f"repo-{number}")["reachability"] == expected
    for child in children:
        child.going.set()
    until(lambda: all(host.monitor.info(name)["reachability"] == "reachable" for name in host.children))


def test_one_that_is_ended_is_looked_at_no_more(host: Host) -> None:
    host.monitor.start()
    child = host.begin("one")
    until(lambda: child.calls)
    host.monitor.end("one")
    calls = child.calls
    other = host.begin("other")
    until(lambda: other.calls >= 5)
    assert child.closed and child.calls == calls
    assert host.monitor.info("one")["reachability"] == "unknown"


def test_the_end_of_one_that_hangs_is_not_waited_for_long(host: Host) -> None:
    host.monitor.start()
    child = host.begin("one")
    child.going.clear()
    calls = child.calls
    until(lambda: child.calls > calls or child.calls == 1)
    began = time.monotonic()
    host.monitor.end("one")
    assert time.monotonic() - began < 5


def test_a_sanlock_that_does_not_answer_leaves_the_age_unknown(host: Host) -> None:
    host.renewed = {"one": time.monotonic()}
    host.begin("one")
    host.monitor.start()
    until(lambda: host.monitor.info("one")["renewal_age"] is not None)
    host.renewed = errors.DeadlinePassed(what="sanlock", seconds=5)
    until(lambda: host.monitor.info("one")["renewal_age"] is None)
    host.renewed = {"one": time.monotonic()}
    until(lambda: host.monitor.info("one")["renewal_age"] is not None)


# -- what a look does, and what sanlock says ---------------------------------------------------------------------------


def test_renewals_are_those_of_the_daemon(service: Service, world: World) -> None:
    """Another source: what the daemon writes on storage, which is its own clock."""
    names = {world.main.name, world.other.name}
    until(lambda: lockspaces.renewals().keys() >= names)
    found = lockspaces.renewals()
    for repo in (world.main, world.other):
        age_s = time.monotonic() - found[repo.name]
        assert 0 <= age_s < 4 * sanlock_fixture.IO_TIMEOUT_S + 5
        history = subprocess.run(
            ["sanlock", "client", "renewal", "-s", repo.name], capture_output=True, text=True, check=True
        ).stdout
        renewed = [int(line.partition("timestamp=")[2].split()[0]) for line in history.splitlines() if "stamp=" in line]
        assert found[repo.name] in (*renewed, renewed[-1] + 1, renewed[-1] - 1), (found, history)


@pytest.fixture
def small(world: World) -> Iterator[Path]:
    """A repository on a file system of its own, in no lockspace."""
    sanlock_fixture.use(world.run_dir)
    with loopfs.mounted(64 << 20) as mounted:
        place = mounted / "repository"
        place.mkdir()
        formats.open(storage_fixture.describe(place, "small")).format_(1)
        yield place


def probe(place: Path) -> dict[str, Any]:
    repo = formats.open(storage_fixture.describe(place, "small"))
    repo.name = repo.header()["name"]
    return places.probe(repo, {})


def test_a_look_reads_and_measures(small: Path) -> None:
    before = sorted(small.rglob("*")), small.stat().st_mtime_ns
    found = probe(small)
    assert 0 < found["read_s"] < 10
    space = os.statvfs(small)
    assert (found["total_bytes"], found["free_bytes"]) == (
        space.f_blocks * space.f_frsize,
        space.f_bavail * space.f_frsize,
    )
    assert (sorted(small.rglob("*")), small.stat().st_mtime_ns) == before, "it changes nothing"


def test_a_read_only_file_system_is_not_well(small: Path) -> None:
    for mode in ("ro", "rw"):
        subprocess.run(["mount", "-o", f"remount,{mode}", small.parent], check=True)
        if mode == "ro":
            with pytest.raises(errors.StorageFailed, match="Read-only file system"):
                probe(small)
    probe(small)


def test_another_repository_at_the_place_is_not_well(small: Path) -> None:
    repo = formats.open(storage_fixture.describe(small, "small"))
    repo.name = ids.new()
    with pytest.raises(errors.NotARepository, match="another repository is there"):
        places.probe(repo, {})


def test_an_empty_place_is_not_well(small: Path) -> None:
    repo = formats.open(storage_fixture.describe(small, "small"))
    (small / "repository").rename(small / "gone")
    with pytest.raises(errors.NotARepository, match="no header"):
        places.probe(repo, {})


# -- connected ---------------------------------------------------------------------------------------------------------


def test_a_repository_is_watched_from_its_first_id_to_its_last(service: Service, world: World, tmp_path: Path) -> None:
    log = events.EventLog()
    settings = config.Config(
        host=service.settings.host,
        storage=config.Storage(localfs_dirs=(str(world.directory),), monitor_s=0.05),
        sanlock=service.settings.sanlock,
    )
    connections = connected.Connections(settings, log, service.server, storage_fixture.Root())
    connections.start()
    place = world.directory / f"watched-{ids.new()[:8]}"
    place.mkdir()
    formats.open(storage_fixture.describe(place, place.name)).format_(1)

    def told(repo_id: str) -> list[str]:
        happened, _ = log.since(log.instance_id, 0)
        params = [event.params for event in happened if event.subject == repo_id]
        return [one.get("state") or one["reachability"] for one in params]

    try:
        for repo_id in ("first", "second"):
            connections.connect(repo_id, "localfs-1.0", {"path": str(place)})
        until(lambda: connections.get("first").membership.state == "joined")
        until(lambda: {info["reachability"] for info in connections.infos()} == {"reachable"})
        connections.disconnect("first", lambda connection: [])
        header = place / "repository"
        lockspace = leases.Lockspace(connections.get("second").name, str(header), 0, 1)
        header.rename(place / "away")
        until(lambda: [info["reachability"] for info in connections.infos()] == ["unreachable"])
        (place / "away").rename(header)
        until(lambda: [info["reachability"] for info in connections.infos()] == ["reachable"])
        connections.disconnect("second", lambda connection: [])
        assert leases.state(lockspace) == "left"
    finally:
        connections.stop()
    assert told("first")[-1] == "disconnected" and "unreachable" not in told("first")
    assert told("second")[-3:] == ["unreachable", "reachable", "disconnected"]
