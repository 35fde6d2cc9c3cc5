"""Who holds something is named to whoever is refused it."""

import pytest

from tests import conftest
from vdsm import ids
from vdsm.client import failures, transport


def refused(client: transport.Client, verb: str, **params: object) -> failures.ClientError:
    with pytest.raises(failures.ClientError) as caught:
        client.call(verb, params)
    return caught.value


def test_second_start_names_the_first(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    disk = images.disk()
    first = machines.started(name="holder", disks=[{"imageId": disk, "repoId": repo}])
    assert refused(agent, "VM.create", vmParams={"vmId": first}).data["key"] == "vm_exists"

    second = machines.create(disks=[{"imageId": disk, "repoId": repo}])
    info = machines.wait(second, "Down")
    assert info["error"]["data"]["key"] == "image_in_use"
    assert "holder" in info["error"]["message"] and first in info["error"]["message"]


def test_disk_of_a_running_vm_cannot_be_changed(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    disk = images.disk()
    vm_id = machines.started(name="holder", disks=[{"imageId": disk, "repoId": repo}])
    for verb, params in (
        ("Storage.createSnapshot", {"targetRepoId": repo, "baseVirtualDiskId": disk}),
        ("Storage.removeImage", {"repositoryId": repo, "imageId": disk}),
    ):
        error = refused(agent, verb, **params)
        assert error.data["key"] == "image_in_use"
        assert vm_id in str(error)
    assert images.status(disk)["status"] == "optimized"


def test_sysprep_of_a_running_vm_names_it(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    vm_id = machines.started(disks=[{"imageId": images.disk(), "repoId": repo}])
    for verb in ("VM.sysprep", "VM.seal", "VM.makeTemplate"):
        error = refused(agent, verb, vmID=vm_id)
        assert error.data["key"] == "vm_runs"
        assert vm_id in str(error)


def test_start_on_a_disk_that_a_job_holds_names_the_job(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    source = images.disk(64 << 20)
    copy = agent.call("Storage.copyImage", {"targetRepoId": repo, "imageId": source})
    images.made.append(copy["imageId"])
    vm_id = machines.create(disks=[{"imageId": copy["imageId"], "repoId": repo}])
    info = machines.wait(vm_id, "Down")
    conftest.wait_job(agent, copy["jobId"])
    assert info["error"]["data"]["key"] in ("image_busy", "image_in_use")
    assert copy["jobId"] in info["error"]["message"]


def test_disconnect_names_the_users(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    vm_id = machines.started(disks=[{"imageId": images.disk(), "repoId": repo}])
    error = refused(agent, "Storage.disconnectStorageRepository", repoId=repo)
    assert error.data["key"] == "repository_in_use"
    assert vm_id in str(error)
    assert machines.status(vm_id) == "Up"  # nobody was killed for it


def test_same_id_same_request_is_the_same_image(agent: transport.Client, repo: str, images: conftest.Images) -> None:
    given = {"targetRepoId": repo, "size": 4096, "options": {"imageId": ids.new()}}
    first = agent.call("Storage.createVirtualDisk", given)
    images.made.append(first["imageId"])
    assert agent.call("Storage.createVirtualDisk", given) == first
    assert refused(agent, "Storage.createVirtualDisk", **{**given, "size": 8192}).data["key"] == "image_exists"
