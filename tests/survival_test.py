"""The agent is killed while a VM runs and a copy is under way: what must go on goes on, what ends says so."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest
from tests.until import running, until
from vdsm import record, standalone
from vdsm.client import transport

COPIED_BYTES = 512 << 20


def slot(stack: standalone.Stack, repo: str, image_id: str) -> record.Slot:
    """Where the image's record is: read here as any host may read it, without the agent."""
    return record.Slot("", image_id, str(stack.storage_dir / repo / "images" / image_id), 0)


@pytest.fixture
def large(images: conftest.Images, stack: standalone.Stack) -> Iterator[str]:
    """A disk whose copy takes long enough to be interrupted."""
    path = stack.import_dir / "large.raw"
    with Path("/dev/urandom").open("rb") as noise, path.open("wb") as out:
        for _ in range(COPIED_BYTES >> 20):
            out.write(noise.read(1 << 20))
    path.chmod(0o644)
    try:
        yield images.imported(path)
    finally:
        path.unlink()


def test_killed_agent_leaves_the_vm_running_and_the_copy_interrupted(
    stack: standalone.Stack, repo: str, images: conftest.Images, large: str, agent: transport.Client
) -> None:
    disk = images.disk()
    vm_id = conftest.Machines(agent).started(disks=[{"imageId": disk, "repoId": repo}])
    before = agent.call("VM.getInfo", {"vmID": vm_id})
    agent.subscribe(["job"])
    copy = agent.call("Storage.copyImage", {"targetRepoId": repo, "imageId": large})
    images.made.append(copy["imageId"])
    while True:
        event = agent.next_event(30)
        assert event is not None and event["data"]["status"] in ("pending", "running"), event
        if event["data"]["status"] == "running":
            break

    stack.kill_agent()
    killed = time.monotonic()

    target = slot(stack, repo, copy["imageId"])
    until(lambda: record.read(target)["work"]["state"] == "interrupted", 1.0)
    assert time.monotonic() - killed < 1.0
    assert running(before["pid"])

    stack.start_agent()
    with transport.connect(str(stack.socket_path)) as again:
        images.client = again
        conftest.reconnect_repository(stack, repo)
        after = again.call("VM.getInfo", {"vmID": vm_id})
        assert (after["pid"], after["status"], after["created"]) == (before["pid"], "Up", before["created"])
        assert again.call("Host.getJobs") == {}
        status = images.status(copy["imageId"])
        assert (status["status"], status["work"]["state"]) == ("broken", "interrupted")
        # Its leases are the ones it was started with: it may be paused and continued, which compares them.
        again.call("VM.pause", {"vmID": vm_id})
        assert again.call("VM.cont", {"vmID": vm_id})["status"] == "Up"
        again.call("VM.destroy", {"vmID": vm_id})
        images.clean_up()
        images.made.clear()
