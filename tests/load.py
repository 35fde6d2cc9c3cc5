"""Callers that measure how long verbs take, and callers that keep a repository busy: what a frozen repository does to
everybody else."""

import concurrent.futures
import contextlib
import itertools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vdsm import ids
from vdsm.client import failures, transport

MIB = 1 << 20
CALLERS = 3
# What refuses at once is not asked all the time: that would be a load of its own (seconds).
PAUSE_S = 2.0
CONNECT_S = 60.0

Samples = dict[str, list[float]]
Connect = Callable[[], transport.Client]
Calls = Callable[[str], list[tuple[str, dict[str, Any]]]]


class Load:
    """Callers on connections of their own. Each calls what `calls` answers for one repository after the other: verbs
    with their parameters, in that order."""

    def __init__(self, connect: Connect, repo_ids: Sequence[str], calls: Calls) -> None:
        self._connect = connect
        self._repo_ids = repo_ids
        self._calls = calls

    def run(self, seconds: float) -> Samples:
        """How long the calls took, by verb; a round that was begun is ended."""
        found: Samples = defaultdict(list)
        end = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
            for samples in pool.map(lambda number: self._call(number, end), range(CALLERS)):
                add(found, samples)
        return found

    def _call(self, number: int, end: float) -> Samples:
        found: Samples = defaultdict(list)
        with self._connect() as client:
            for repo_id in itertools.islice(itertools.cycle(self._repo_ids), number, None):
                for verb, params in self._calls(repo_id):
                    began = time.monotonic()
                    client.call(verb, params)
                    found[verb].append(time.monotonic() - began)
                if time.monotonic() > end:
                    return found
        raise AssertionError("unreachable")


def of_images(repo_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The life of an image, as calls."""
    image_id = ids.new()
    where = {"repositoryId": repo_id, "imageId": image_id}
    new = {"targetRepoId": repo_id, "size": MIB, "options": {"imageId": image_id}}
    return [
        ("Storage.createVirtualDisk", new),
        ("Storage.getImageStatus", where),
        ("Storage.listImages", {"repositoryId": repo_id}),
        ("Storage.removeImage", where),
    ]


class Writers:
    """So many callers that write to a repository, inside the block of `calling`. While it hangs each has a call under
    way."""

    def __init__(self, connect: Connect, repo_id: str, count: int) -> None:
        self._connect = connect
        self._repo_id = repo_id
        self._count = count
        self._stopping = threading.Event()
        self._begun = threading.Semaphore(0)
        self._done = [0] * count

    @property
    def done(self) -> int:
        """Calls that did what they should."""
        return sum(self._done)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Begins when all are connected: so many at once would be felt without any call of theirs."""
        with concurrent.futures.ThreadPoolExecutor(self._count) as pool:
            running = [pool.submit(self._write, number) for number in range(self._count)]
            try:
                for _ in running:
                    assert self._begun.acquire(timeout=CONNECT_S), "they do not get connections"
                yield
            finally:
                self._stopping.set()
        for one in running:
            one.result()

    def _write(self, number: int) -> None:
        with self._connect() as client:
            self._begun.release()
            while not self._stopping.is_set():
                try:
                    for verb, params in of_images(self._repo_id):
                        client.call(verb, params)
                        self._done[number] += 1
                except failures.ClientError:
                    self._stopping.wait(PAUSE_S)


class Measured(NamedTuple):
    """One verb's calls. Percentiles in seconds."""

    calls: int
    free: float
    frozen: float


def measured(free: Samples, frozen: Samples) -> dict[str, Measured]:
    """By verb, the 99th percentile of both."""
    return {verb: Measured(len(found), p99(found), p99(frozen[verb])) for verb, found in free.items()}


def p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


def add(samples: Samples, more: Samples) -> None:
    for verb, seconds in more.items():
        samples[verb] += seconds
