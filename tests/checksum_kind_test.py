"""A kind of job written by `docs/jobs.md` alone, on a real sanlock: its result, its shared lease, and a kill."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs_fixture, sanlock_fixture
from tests.until import until
from vdsm import forkserver, ids, leases, record
from vdsm.jobs import job

storage = sanlock_fixture.storage


@pytest.fixture(scope="module")
def host(storage: sanlock_fixture.Storage) -> Iterator[jobs_fixture.Host]:
    server = forkserver.ForkServer([*jobs_fixture.PRELOADED, "tests.kinds.checksum_image"])
    try:
        with jobs_fixture.hosting(server) as host:
            yield host
    finally:
        server.stop()


def hashing(
    storage: sanlock_fixture.Storage, directory: Path, content: Path, image_format: str
) -> tuple[job.JobRequest, record.Slot]:
    data = directory / "data"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, str(content), str(data)], check=True)
    job_id = ids.new()
    slot = storage.slot(ids.new(), work={"job_id": job_id, "state": "queued"})
    argument = {"slot": list(slot), "data": str(data), "format": image_format, "scratch": str(directory / job_id)}
    return job.JobRequest("checksumImage", job_id, "storage", "", {}, argument), slot


@pytest.fixture
def small(tmp_path: Path) -> Path:
    content = tmp_path / "content"
    content.write_bytes(os.urandom(3 << 20) + bytes(1 << 20))
    return content


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """4 GiB of nothing: quick to convert, seconds to hash."""
    content = tmp_path / "content"
    with content.open("wb") as file:
        file.truncate(4 << 30)
    return content


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_the_checksum_is_that_of_the_raw_content(
    host: jobs_fixture.Host, storage: sanlock_fixture.Storage, tmp_path: Path, small: Path, image_format: str
) -> None:
    request, slot = hashing(storage, tmp_path, small, image_format)
    before = record.read(slot)
    host.jobs.add(request)
    info = host.jobs.wait(request.job_id, 60)
    assert (info["status"], info["progress"], info["error"]) == ("done", 100, None)
    known = record.read(slot)
    assert known["sha256"] == hashlib.sha256(small.read_bytes()).hexdigest()
    assert known["generation"] == before["generation"] + 1
    assert not Path(request.argument["scratch"]).exists()
    assert jobs_fixture.free(slot)


def test_other_readers_do_not_hinder_it(
    host: jobs_fixture.Host, storage: sanlock_fixture.Storage, tmp_path: Path, small: Path
) -> None:
    request, slot = hashing(storage, tmp_path, small, "qcow2")
    with leases.Session() as session:
        session.acquire([slot.data_lease(shared=True)], 5)
        host.jobs.add(request)
        assert host.jobs.wait(request.job_id, 60)["status"] == "done"


def test_a_killed_worker_leaves_nothing(
    host: jobs_fixture.Host, storage: sanlock_fixture.Storage, tmp_path: Path, large: Path
) -> None:
    request, slot = hashing(storage, tmp_path, large, "raw")
    host.jobs.add(request)
    until(lambda: host.jobs.get(request.job_id)["stage_name"] == "hash", 60)
    (pid,) = leases.local_pids(slot.data_lease())
    os.kill(pid, signal.SIGKILL)
    assert host.jobs.wait(request.job_id, 60)["status"] == "failed"
    assert record.read(slot)["work"]["state"] == "failed"
    assert not Path(request.argument["scratch"]).exists()
    assert jobs_fixture.free(slot)
