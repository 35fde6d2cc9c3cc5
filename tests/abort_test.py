"""Aborted jobs leave nothing behind, whenever the abort comes."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest, proof
from vdsm import ids, standalone
from vdsm.client import transport

SEED = 20
MOMENTS = 20
TORTURE_MOMENTS = 500
SIZE_BYTES = 192 << 20


@pytest.fixture(scope="module")
def source(stack: standalone.Stack, repo: str) -> Iterator[tuple[str, str]]:
    """A disk that takes a moment to copy, and the checksum of its data."""
    path = stack.import_dir / "noise.raw"
    with Path("/dev/urandom").open("rb") as noise, path.open("wb") as out:
        for _ in range(SIZE_BYTES >> 20):
            out.write(noise.read(1 << 20))
    path.chmod(0o644)
    with transport.connect(str(stack.socket_path)) as client:
        images = conftest.Images(client, repo, stack.import_dir)
        disk = images.imported(path)
        path.unlink()
        yield disk, data_checksum(stack, repo)
        images.clean_up()


def listing(stack: standalone.Stack, repo: str) -> set[str]:
    """Everything that a repository holds on storage."""
    root = stack.storage_dir / repo
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def data_checksum(stack: standalone.Stack, repo: str) -> str:
    """Over all data in the repository, its names included."""
    digest = hashlib.sha256()
    for path in sorted((stack.storage_dir / repo / "data").iterdir()):
        with path.open("rb") as data:
            digest.update(path.name.encode())
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()


def test_copy_aborted_at_random_moments_leaves_nothing(
    stack: standalone.Stack, agent: transport.Client, repo: str, source: tuple[str, str]
) -> None:
    disk, checksum = source
    ended = abort_copies(stack, agent, repo, disk, random.Random(SEED), MOMENTS)
    assert "aborted" in ended
    assert data_checksum(stack, repo) == checksum


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_copies_aborted_for_a_long_time_leave_nothing(
    stack: standalone.Stack, agent: transport.Client, repo: str, source: tuple[str, str]
) -> None:
    disk, checksum = source
    seed = proof.seed()
    with proof.writing("aborted-copies", seed) as told:
        ended = abort_copies(stack, agent, repo, disk, random.Random(seed), TORTURE_MOMENTS)
        assert data_checksum(stack, repo) == checksum
        told["copies"] = len(ended)
        told |= {f"ended as {state}": ended.count(state) for state in sorted(set(ended))}
        told["files left behind, bytes of the source changed"] = 0


def abort_copies(
    stack: standalone.Stack, agent: transport.Client, repo: str, disk: str, moments: random.Random, count: int
) -> list[str]:
    """Begins and aborts `count` copies; returns how they ended. Fails when anything of one is left."""
    before = listing(stack, repo)
    agent.subscribe(["job"])
    ended: list[str] = []
    for _ in range(count):
        copy = agent.call("Storage.copyImage", {"targetRepoId": repo, "imageId": disk, "options": {"jobId": ids.new()}})
        wait_for_moment(agent, copy["jobId"], moments)
        conftest.abort(agent, copy["jobId"])
        info = conftest.wait_job(agent, copy["jobId"])
        ended.append(info["status"])
        if info["status"] == "done":
            agent.call("Storage.removeImage", {"repositoryId": repo, "imageId": copy["imageId"]})
        assert listing(stack, repo) == before, info
    assert set(ended) <= {"aborted", "done"}
    return ended


def wait_for_moment(agent: transport.Client, job_id: str, moments: random.Random) -> None:
    """Until a random point of what the job tells, and a random while longer: what lies between its events."""
    wanted = moments.choice(["pending", "running", "measure", "copy", "copy"])
    while True:
        event = agent.next_event(moments.uniform(0.0, 0.3) if wanted == "copy" else 5)
        if event is None:
            return
        told = event["data"]
        if event["subject"] == job_id and wanted in (told["status"], told["stageName"]):
            agent.next_event(moments.uniform(0.0, 0.2))
            return
