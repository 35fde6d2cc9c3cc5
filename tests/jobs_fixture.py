"""A job host in a test: fork server, pool and registry over the private sanlock, and requests for probe jobs."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import sanlock_fixture
from tests.until import until
from vdsm import errors, events, forkserver, ids, leases, record
from vdsm.jobs import job, pool, registry

PRELOADED = ["vdsm.jobs.worker", "tests.kinds.probe", "tests.kinds.export_image"]


class Probe:
    """One probe job: its request, its entity's slot and its directory. See `kinds/probe.py` for the steps."""

    def __init__(self, storage: sanlock_fixture.Storage, directory: Path, steps: list[list[Any]], **given: Any) -> None:
        self.directory = directory
        self.job_id = ids.new()
        work = {"job_id": given.pop("work_of", self.job_id), "state": given.pop("state", "queued")}
        self.slot = storage.slot(ids.new(), work=work)
        argument = {
            "slot": list(self.slot),
            "shared": given.pop("shared", []),
            "directory": str(directory),
            "steps": steps,
            "generation": given.pop("generation", 7),
        }
        self.request = job.JobRequest(
            kind=given.pop("kind", "probe"),
            job_id=self.job_id,
            job_type="storage",
            description="a probe",
            entity={"type": "image", "id": self.slot.name, "repo_id": "tests"},
            argument=argument,
            gate=given.pop("gate", None),
        )
        assert not given

    @property
    def record(self) -> record.Record:
        return record.read(self.slot)

    @property
    def work(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["work"]
        return found

    @property
    def journal(self) -> list[str]:
        path = self.directory / "journal"
        return path.read_text().split() if path.exists() else []

    @property
    def leftover(self) -> bool:
        """True while half made data is there."""
        return (self.directory / "made").exists()

    def reached(self, word: str) -> None:
        """Waits until the worker has noted `word`."""
        until(lambda: word in self.journal)

    def go(self, name: str) -> None:
        """Lets the worker go on that stopped at `["pause", name]`."""
        (self.directory / f"go-{name}").touch()

    def order(self, lease_wait_s: float = 5.0) -> dict[str, Any]:
        """What the pool would send to a worker, for tests that are the agent themselves."""
        argument = self.request.argument
        return {"job_id": self.job_id, "kind": "probe", "argument": argument, "lease_wait_s": lease_wait_s}


class Host:
    """All that an agent has for jobs."""

    def __init__(self, server: forkserver.ForkServer, **options: Any) -> None:
        self.server = server
        self.events = events.EventLog()
        self.pool = pool.Pool(server, **{"workers": 2, "lease_wait_s": 5.0, **options})
        self.jobs = registry.Registry(self.pool, self.events)
        self.pool.start()

    def run(self, probe: Probe) -> job.Info:
        self.jobs.add(probe.request)
        return self.end(probe)

    def end(self, probe: Probe) -> job.Info:
        info = self.jobs.wait(probe.job_id, 30)
        assert info["ended"], f"still {info['status']}: {info['detail']}"
        return info

    def states(self, probe: Probe) -> list[str]:
        """Every state that events told of the job, in order."""
        told, _ = self.events.since(self.events.instance_id, 0)
        states = [event.params["status"] for event in told if event.subject == probe.job_id]
        return [state for state, _ in itertools.groupby(states)]


@contextlib.contextmanager
def hosting(server: forkserver.ForkServer, **options: Any) -> Iterator[Host]:
    host = Host(server, **options)
    try:
        yield host
    finally:
        assert host.pool.stop(10)


def free(slot: record.Slot, within_s: float = 5.0) -> bool:
    """True when this process gets the slot's data lease within the time."""
    with leases.Session() as session:
        deadline = time.monotonic() + within_s
        while True:
            try:
                session.acquire([slot.data_lease()], 0)
                return True
            except errors.LeaseHeld:
                if time.monotonic() > deadline:
                    return False
