"""What the job framework adds to what a job cannot do without: its process and its leases.

A private sanlock, real workers, a body that does nothing. Costs are the medians of a few dozen runs, in seconds; the
sum that a job is compared with is measured in the same round.
"""

import statistics
import subprocess
import time
from collections.abc import Callable

from benchmarks import table
from tests import jobs_fixture, sanlock_fixture
from vdsm import forkserver, ids, leases, record
from vdsm.jobs import job

RUNS = 20


def rows(rounds: int) -> list[table.Row]:
    server = forkserver.ForkServer(jobs_fixture.PRELOADED)
    try:
        with (
            sanlock_fixture.running() as storage,
            leases.Session() as session,
            jobs_fixture.hosting(server) as host,
        ):
            return _Bench(storage, session, host).rows(rounds)
    finally:
        server.stop()


class _Bench:
    def __init__(self, storage: sanlock_fixture.Storage, session: leases.Session, host: jobs_fixture.Host) -> None:
        self._session = session
        self._host = host
        self._slot = storage.slot(ids.new())

    def rows(self, rounds: int) -> list[table.Row]:
        def cycles(count: int) -> float:
            return count * _median(self._cycle)

        fork = self._fork
        return [
            table.compare(
                "leased no-op job, request to done",
                "sanlock acquire + release, fork of a child",
                lambda: _median(self._leased),
                lambda: cycles(1) + _median(fork),
                rounds,
                1.15,
            ),
            table.compare(
                "the same", "sanlock acquire + release", lambda: _median(self._leased), lambda: cycles(1), rounds, None
            ),
            table.compare(
                "the same with its two record writes",
                "three times acquire + release, fork of a child",
                lambda: _recorded(self._recorded),
                lambda: cycles(3) + _median(fork),
                rounds,
                1.3,
            ),
            table.compare(
                "no-op child of the fork server, request to end",
                "subprocess.run(['true'])",
                lambda: _median(fork),
                lambda: _median(lambda: subprocess.run(["true"], check=True)),
                rounds,
                None,
            ),
        ]

    def _cycle(self) -> None:
        lease = [self._slot.data_lease()]
        self._session.acquire(lease, 5)
        self._session.release(lease)

    def _fork(self) -> None:
        with self._host.server.spawn("tests.kinds.probe:nothing", {}) as child:
            child.wait_exit(10)

    def _leased(self) -> None:
        self._run(None, ids.new(), [list(self._slot.data_lease())])

    def _recorded(self) -> float:
        job_id = ids.new()
        work = {"job_id": job_id, "state": "queued"}
        record.update(self._session, self._slot, lambda known: {**known, "work": work})
        return _seconds(lambda: self._run(list(self._slot), job_id, []))

    def _run(self, slot: list[object] | None, job_id: str, shared: list[list[object]]) -> None:
        argument = {"slot": slot, "shared": shared, "directory": "/nowhere", "steps": []}
        self._host.jobs.add(job.JobRequest("noop", job_id, "storage", "", {}, argument))
        ended = self._host.jobs.wait(job_id, 30)
        assert ended["status"] == "done", ended


def _median(call: Callable[[], object]) -> float:
    return statistics.median(_seconds(call) for _ in range(RUNS))


def _recorded(call: Callable[[], float]) -> float:
    return statistics.median(call() for _ in range(RUNS))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
