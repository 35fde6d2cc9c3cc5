"""virt-sysprep on disks with the real Debian guest: on one, on two, and aborted."""

from pathlib import Path

import pytest

from tests import conftest, guests
from vdsm import standalone
from vdsm.client import transport
from vdsm.tool import guestimage

pytestmark = guests.MARKS
library, disk, down_vm = guests.library, guests.disk, guests.down_vm


def test_sysprep_cleans_one_disk(
    stack: standalone.Stack, agent: transport.Client, repo: str, disk: str, down_vm: str, tmp_path: Path
) -> None:
    before = guests.file_in(stack, repo, disk, "/etc/machine-id", tmp_path)
    assert before
    started = agent.call("VM.sysprep", {"vmID": down_vm, "leaseRepoId": repo})

    job = conftest.done(agent, started["jobId"])

    assert job["stage"] == job["stages"]
    assert guests.file_in(stack, repo, disk, "/etc/machine-id", tmp_path) != before
    assert guests.file_in(stack, repo, disk, "/etc/ssh/ssh_host_ed25519_key", tmp_path) is None
    assert guests.file_in(stack, repo, disk, "/root/.bash_history", tmp_path) is None
    status = agent.call("Storage.getImageStatus", {"repositoryId": repo, "imageId": disk})
    assert status["status"] == "optimized"


def test_sysprep_cleans_two_disks_as_one(
    stack: standalone.Stack,
    agent: transport.Client,
    repo: str,
    images: conftest.Images,
    machines: conftest.Machines,
    disk: str,
    tmp_path: Path,
) -> None:
    source = stack.import_dir / "data.raw"
    source.write_bytes(guestimage.build_data_disk(guestimage.default_cache()).read_bytes())
    source.chmod(0o644)
    data_disk = images.imported(source)
    source.unlink()
    vm_id = guests.make_down(machines, repo, [disk, data_disk])
    before = {image: images.status(image)["generation"] for image in (disk, data_disk)}
    agent.subscribe(["image"])

    conftest.done(agent, agent.call("VM.seal", {"vmID": vm_id, "leaseRepoId": repo})["jobId"])

    assert guests.changes_told(agent, 2) == {(disk, "changed"), (data_disk, "changed")}
    assert {image: images.status(image)["generation"] for image in before} == {
        image: generation + 1 for image, generation in before.items()
    }
    assert guests.file_in(stack, repo, disk, "/etc/ssh/ssh_host_ed25519_key", tmp_path) is None


@pytest.mark.parametrize("stage", ["overlay", "examine", "sysprep", "commit"])
def test_sysprep_aborted_in_stage_leaves_the_vm_untouched(
    stack: standalone.Stack, agent: transport.Client, repo: str, disk: str, down_vm: str, stage: str
) -> None:
    """In the stage "commit" it is too late: the job ends as done."""
    before, data = guests.listing(stack, repo), guests.data_of(stack, repo, disk)
    agent.subscribe(["job"])
    job_id = agent.call("VM.sysprep", {"vmID": down_vm, "leaseRepoId": repo})["jobId"]
    while True:
        event = agent.next_event(120)
        assert event is not None
        if event["subject"] == job_id and event["data"]["stageName"] == stage:
            break
        assert event["data"]["status"] in ("pending", "running"), event

    conftest.abort(agent, job_id)

    ended = conftest.wait_job(agent, job_id)["status"]
    if ended == "done":
        assert stage == "commit"
        return
    assert ended == "aborted"
    assert guests.listing(stack, repo) == before
    assert guests.data_of(stack, repo, disk) == data
    assert agent.call("Storage.getImageStatus", {"repositoryId": repo, "imageId": disk})["status"] == "optimized"
