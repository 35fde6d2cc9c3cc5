"""Job.stop: the host is relieved and the image is kept for later, which an abort does not do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import conftest, fixes_test
from vdsm import standalone
from vdsm.client import failures, transport

shop = fixes_test.shop
Shop = fixes_test.Shop

SIZE_BYTES = 256 << 20


@pytest.fixture
def source(shop: Shop, stack: standalone.Stack) -> Iterator[str]:
    """A disk whose copy takes a moment."""
    path = stack.import_dir / "stopped.raw"
    with Path("/dev/urandom").open("rb") as noise, path.open("wb") as out:
        for _ in range(SIZE_BYTES >> 20):
            out.write(noise.read(1 << 20))
    path.chmod(0o644)
    try:
        yield shop.imported(path)
    finally:
        path.unlink()


def test_stopped_copy_is_kept_and_finished_by_a_fix(
    shop: Shop, agent: transport.Client, stack: standalone.Stack, source: str
) -> None:
    before = shop.data()
    copy = agent.call("Storage.copyImage", {"targetRepoId": shop.repo_id, "imageId": source})
    target = copy["imageId"]
    shop.made.append(target)
    with conftest.stopped_copy(stack, target):
        agent.call("Job.stop", {"jobId": copy["jobId"]})
        job = conftest.wait_job(agent, copy["jobId"])

    assert (job["status"], job["error"]["data"]["key"]) == ("aborted", "stopped")
    status = shop.status(target)
    assert (status["status"], status["last_error"]) == ("broken", "The job was stopped by its caller")
    assert (status["verdict"]["state"], status["generation"]) == ("interrupted", 0)
    assert shop.data() == before, "what was half made takes no space meanwhile"
    with pytest.raises(failures.ClientError) as refused:
        agent.call("Job.stop", {"jobId": copy["jobId"]})
    assert refused.value.data["key"] == "job_not_active"

    shop.fixed(shop.only(target, "mend"))

    assert shop.status(target)["status"] == "optimized"
    assert shop.sum(target) == shop.sum(source)
