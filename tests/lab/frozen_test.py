"""One of five repositories hangs, on a LUN that is suspended or an NFS server that hangs: what the agent of that host
tells of it, and what everybody else feels. Reads hang there too, which no frozen file system of one machine shows."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests import lab, load, proof
from tests.lab import nfs, peers
from tests.lab.waiting import until
from vdsm import config
from vdsm.client import transport

LUN, NFS = "lun", "nfs"  # the two that can be frozen, each beside the other and these
CALM = ("calm-1", "calm-2", "calm-3")
NAMES = (LUN, NFS, *CALM)
IO_TIMEOUT_S = 10  # a lockspace outlives 80 s without its storage
# A look every 10 s, with a deadline of 10 s; and what a host of one slow CPU adds.
TOLD_S = 20.0 + 20.0
HEALTHY_S = 10.0
CALL_S = 120.0
# More than all children of all repositories. Threads or processes for each of their calls would be seen.
WRITERS = 24
MOST = len(NAMES) * config.Storage().io_children
WORSE = 2.0  # how much longer the slowest hundredth may take
QUICK = (
    *("Host.ping2", "Host.getVMList", "Host.getJobs", "Host.getStorageRepoStats"),
    "Storage.listStorageRepositories",
)
# They take milliseconds where making an image takes seconds: so many of each, for a slowest hundredth that means
# something.
OFTEN = 5
WRITING = ("Storage.createVirtualDisk", "Storage.removeImage")
STARTED = "/run/five"

GROUND = """\
mkfs.ext4 -q -F {disk}
mkdir -p {place}
mount {disk} {place}
"""


class Fault(NamedTuple):
    repo_id: str
    begin: Callable[[], object]
    end: Callable[[], object]


class Census(NamedTuple):
    """Processes of the agent's user, and threads of the agent."""

    processes: int
    threads: int


class Found(NamedTuple):
    """What was measured: each verb, how long after each freeze all was well again (seconds), and how many more
    processes and threads there were at most."""

    verbs: dict[str, load.Measured]
    healthy_s: list[float]
    more: Census


class Five:
    """The agent of the first host with its five repositories; the second host serves one of them."""

    def __init__(self, one: lab.Host, two: lab.Host) -> None:
        self.peer = peers.Peer(one)
        self._one, self._two = one, two
        self.faults = {
            "suspended-lun": Fault(LUN, one.luns[0].hang, one.luns[0].heal),
            "server-that-hangs": Fault(NFS, two.freeze, two.thaw),
        }

    def start(self) -> None:
        """All five are joined. Nothing is done twice."""
        if self._one.run(["test", "-e", STARTED], check=False).code == 0:
            return
        server = nfs.Server(self._two.luns[2], squash=True)
        server.start()
        self._two.sh(f"rm -rf {server.path}/five; install -d -o vdsm -g kvm -m 2770 {server.path}/five")
        self._one.start_agent()
        for disk, name in ((0, LUN), (1, CALM[0])):
            self._one.sh(GROUND.format(disk=self._one.luns[disk].path, place=self._place(name)), 120)
        for name in NAMES:
            given = self._given(name)
            self.peer("formatStorageRepository", **given, options={"ioTimeout": IO_TIMEOUT_S})
            self.peer("connectStorageRepository", repoId=name, **given)
        for name in NAMES:
            self.peer.joined(name)
        until(lambda: all(self.is_told(name, "reachable") for name in NAMES), TOLD_S)
        self._one.run(["touch", STARTED])

    def _place(self, name: str) -> str:
        """The mount point of the disk that it is on."""
        return f"/run/vdsm/storage/{LUN if name == LUN else 'calm'}"

    def _given(self, name: str) -> dict[str, Any]:
        if name == NFS:
            connection = {"connection": f"{self._two.address('lan')}:{nfs.EXPORT}/five"}
            return {"repoFormat": "nfs-3.4", "connectionParameters": connection}
        return {"repoFormat": "localfs-1.0", "connectionParameters": {"path": f"{self._place(name)}/{name}"}}

    def connect(self) -> transport.Client:
        return self._one.agent(CALL_S)

    def is_told(self, repo_id: str, reachability: str) -> bool:
        return (self.peer.repository(repo_id) or {}).get("reachability") == reachability

    def census(self) -> Census:
        said = self._one.sh(f"pgrep -c -u vdsm; ls /proc/{self.peer.agent_pid()}/task | wc -l").out
        return Census(*map(int, said.split()))

    def measuring(self, fault: Fault) -> load.Load:
        """Of everything that does not touch the one that is frozen."""

        def calls(repo_id: str) -> list[tuple[str, dict[str, Any]]]:
            quick = [(verb, {}) for verb in QUICK for _ in range(OFTEN)]
            return [*quick, *load.of_images(repo_id)]

        return load.Load(self.connect, [name for name in NAMES if name != fault.repo_id], calls)

    @contextlib.contextmanager
    def frozen(self, fault: Fault, healthy_s: list[float]) -> Iterator[None]:
        """It is frozen inside the block while many write to it. Afterwards it is as it was, and soon: how soon is added
        to `healthy_s`."""
        writers = load.Writers(self.connect, fault.repo_id, WRITERS)
        fault.begin()
        with writers.calling():
            try:
                yield
                until(lambda: self.is_told(fault.repo_id, "unreachable"), TOLD_S)
                done = writers.done
            finally:
                fault.end()
                ended = time.monotonic()
            until(lambda: writers.done > done and self.is_told(fault.repo_id, "reachable"), 60)
            healthy_s.append(time.monotonic() - ended)
        print(f"healthy after {healthy_s[-1]:.1f} s")
        assert healthy_s[-1] < HEALTHY_S

    def measure(self, fault: Fault, rounds: int, seconds: float) -> Found:
        """Each verb while all are free, and while one is frozen and written to."""
        calls = self.measuring(fault)
        calls.run(1.0)  # all children and threads are there
        before = self.census()
        free: load.Samples = defaultdict(list)
        frozen: load.Samples = defaultdict(list)
        healthy_s: list[float] = []
        more = Census(0, 0)
        for _ in range(rounds):
            load.add(free, calls.run(seconds))
            with self.frozen(fault, healthy_s):
                calls.run(1.0)  # so many writers' first calls keep the agent busy for half a second in such a host
                load.add(frozen, calls.run(seconds))
                now = self.census()
                more = Census(*(max(had, is_ - was) for had, is_, was in zip(more, now, before, strict=True)))
                assert max(more) <= MOST, (before, now)
                assert all(self.is_told(name, "reachable") for name in NAMES if name != fault.repo_id)
        return Found(load.measured(free, frozen), healthy_s, more)


@pytest.fixture(scope="module")
def kept(the_lab: lab.Lab) -> Iterator[Five]:
    yield Five(*the_lab.hosts)
    for host in the_lab.hosts:
        host.renew()  # the quickest way out of five lockspaces


@pytest.fixture
def five(hosts: list[lab.Host], kept: Five) -> Five:
    kept.start()
    return kept


FAULTS = ("suspended-lun", "server-that-hangs")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [FAULTS[0], pytest.param(FAULTS[1], marks=pytest.mark.torture)])
def test_one_that_hangs_is_told_and_felt_by_nobody_else(five: Five, name: str) -> None:
    fault, felt = five.faults[name], list[str]()
    with five.connect() as follower:
        follower.subscribe(["repository"])
        # A call that waits for the frozen one takes until the thaw, each time; `make torture` has the exact bound.
        for _ in range(3):
            figures = five.measure(fault, rounds=1, seconds=10.0).verbs
            print(figures)
            noise = {verb: 6.0 if verb in WRITING else 3.0 for verb in figures}
            felt = [verb for verb, found in figures.items() if found.frozen > max(noise[verb], WORSE * found.free)]
            if not felt:
                break
        told: list[tuple[str, str]] = []
        while (fault.repo_id, "reachable") not in told:
            event = follower.next_event(30)
            assert event is not None, told
            if event["data"]["change"] == "reachability":
                told.append((event["subject"], event["data"]["reachability"]))
    assert not felt
    assert told[0] == (fault.repo_id, "unreachable") and {repo_id for repo_id, _ in told} == {fault.repo_id}


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAULTS)
def test_figures_of_one_that_hangs(five: Five, name: str) -> None:
    rounds, seconds = 6, 25.0
    with proof.writing(f"frozen-{name}", None) as told:
        figures, healthy_s, more = five.measure(five.faults[name], rounds, seconds)
        print(figures)
        told["rounds, seconds each"] = f"{rounds}, {seconds:g}"
        told["callers that write to the frozen one"] = WRITERS
        told["processes more than before, at most"] = more.processes
        told["threads of the agent more than before, at most"] = more.threads
        told["seconds from its return until it is reachable and written to, longest"] = f"{max(healthy_s):.1f}"
        for verb, (calls, free, frozen) in sorted(figures.items()):
            told[verb] = f"{calls} calls, p99 {free * 1000:.1f} ms free, {frozen * 1000:.1f} ms frozen"
        assert not {verb: found for verb, found in figures.items() if found.frozen > WORSE * found.free}
