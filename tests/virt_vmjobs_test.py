"""What is told of the images of a VM when a job on the VM ends."""

from typing import Any

import pytest

from tests import registry_test
from vdsm.jobs import job
from vdsm.virt import vmjobs

Status = job.Status
NOBODY: Any = None


@pytest.mark.parametrize("status", [Status.DONE, Status.FAILED])
def test_images_are_told_when_the_job_is_done_and_only_then(status: Status) -> None:
    desk = registry_test.Desk()
    told: list[tuple[str, dict[str, Any]]] = []
    jobs = vmjobs.VmJobs(
        NOBODY, NOBODY, NOBODY, desk.jobs, NOBODY, lambda image_id, params: told.append((image_id, params))
    )
    begun = desk.add()
    jobs._tell_when_done(begun.id, "changed", {"one": "main", "two": "other"})
    begun.move(Status.RUNNING)
    assert told == []
    begun.move(status)
    expected = [
        (image_id, {"repo_id": repo_id, "change": "changed", "job_id": begun.id})
        for image_id, repo_id in (("one", "main"), ("two", "other"))
    ]
    assert told == (expected if status == Status.DONE else [])
