"""Namespace Lease through the wire: a VM's lease is made, looked at, taken away and removed."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest, storage_fixture
from tests.until import until
from vdsm import ids, record, standalone
from vdsm.client import failures, transport

COPIED_BYTES = 512 << 20


def refused(client: transport.Client, verb: str, lease: dict[str, str], **params: Any) -> failures.ClientError:
    with pytest.raises(failures.ClientError) as caught:
        client.call(f"Lease.{verb}", {"lease": lease, **params})
    return caught.value


@pytest.fixture
def lease(agent: transport.Client, repo: str) -> Iterator[dict[str, str]]:
    """A fresh VM's lease."""
    made = {"repoId": repo, "leaseId": ids.new()}
    agent.call("Lease.create", {"lease": made})
    yield made
    try:
        agent.call("Lease.delete", {"lease": made})
    except failures.ClientError as error:
        assert error.data["key"] == "no_such_lease"


def test_lease_lives(agent: transport.Client, repo: str, stack: standalone.Stack) -> None:
    lease = {"repoId": repo, "leaseId": ids.new()}
    for verb in ("info", "status", "delete", "fence"):
        assert refused(agent, verb, lease).data["key"] == "no_such_lease"

    made = agent.call("Lease.create", {"lease": lease})

    path = str(stack.storage_dir / repo / "vms" / lease["leaseId"])
    assert {**made, "lockspace": ""} == {**lease, "kind": "vm", "lockspace": "", "path": path, "offset": 0}
    older = {"sd_id": repo, "lease_id": lease["leaseId"]}
    assert agent.call("Lease.info", {"lease": older}) == agent.call("Lease.create", {"lease": lease}) == made
    status = agent.call("Lease.status", {"lease": lease})
    assert (status["owners"], status["holders"], status["generation"], status["work"]) == ([], [], 0, None)
    assert status["verdict"]["state"] == "absent"
    agent.call("Lease.delete", {"lease": lease})
    assert not Path(path).exists()
    assert refused(agent, "info", lease).data["key"] == "no_such_lease"


def test_lease_of_an_image(agent: transport.Client, repo: str, images: conftest.Images) -> None:
    disk = images.disk()
    lease = {"repoId": repo, "leaseId": disk}
    assert agent.call("Lease.info", {"lease": lease})["kind"] == "image"
    assert agent.call("Lease.status", {"lease": lease})["verdict"]["state"] == "done"
    assert refused(agent, "create", lease).data["key"] == "id_taken"
    assert refused(agent, "delete", lease).data["key"] == "no_such_lease"
    assert agent.call("Lease.fence", {"lease": lease, "generation": 1})["generation"] == 2


def test_image_with_the_id_of_a_vm_is_refused(agent: transport.Client, repo: str, lease: dict[str, str]) -> None:
    """Both leases would have one name."""
    wanted = {"targetRepoId": repo, "size": 4096, "options": {"imageId": lease["leaseId"]}}
    with pytest.raises(failures.ClientError) as caught:
        agent.call("Storage.createVirtualDisk", wanted)
    assert caught.value.data["key"] == "id_taken"
    assert agent.call("Lease.info", {"lease": lease})["kind"] == "vm"
    assert lease["leaseId"] not in {
        image["imageId"] for image in agent.call("Storage.listImages", {"repositoryId": repo})
    }


def test_running_vm_keeps_its_lease(
    agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines, lease: dict[str, str]
) -> None:
    """It is found by the start, not made again under it (trap 12), and neither removed nor fenced while it runs."""
    vm_id = lease["leaseId"]
    machines.started(vmId=vm_id, leaseRepoId=repo, disks=[{"imageId": images.disk(), "repoId": repo}])
    agent.call("Lease.create", {"lease": lease})
    status = agent.call("Lease.status", {"lease": lease})
    assert status["owners"] == [1]
    assert (status["holders"][0]["hostState"], vm_id in status["holders"][0]["holder"]) == ("live", True)
    for verb in ("delete", "fence"):
        error = refused(agent, verb, lease)
        assert (error.data["key"], vm_id in str(error)) == ("lease_held", True)
    error = refused(agent, "fence", lease, force=True)
    assert (error.data["key"], "VM.destroy" in error.data["state"]) == ("lease_held", True)
    assert machines.status(vm_id) == "Up"
    machines.destroy(vm_id)
    until(lambda: agent.call("Lease.status", {"lease": lease})["owners"] == [])
    assert agent.call("Lease.status", {"lease": lease})["version"] == status["version"]
    agent.call("Lease.delete", {"lease": lease})


def test_record_of_unknown_make_is_not_fenced_without_force(
    agent: transport.Client, repo: str, images: conftest.Images, stack: standalone.Stack
) -> None:
    """Nor removed; all can be read, and the error says the way out (trap 30)."""
    disk = images.disk()
    agent.call("Storage.setImageUserData", {"repositoryId": repo, "imageId": disk, "userData": {"before": 1}})
    slot = record.Slot("", disk, str(stack.storage_dir / repo / "images" / disk), 0)
    lease, forged = {"repoId": repo, "leaseId": disk}, storage_fixture.forge(slot, host_id=77)

    error = refused(agent, "fence", lease)
    with pytest.raises(failures.ClientError, match="host 77"):
        agent.call("Storage.removeImage", {"repositoryId": repo, "imageId": disk})

    assert (error.data["key"], "Lease.fence with force" in error.data["hint"]) == ("record_not_owned", True)
    assert record.read(slot) == forged
    assert agent.call("Storage.getImageStatus", {"repositoryId": repo, "imageId": disk})["status"] == "optimized"
    fenced = agent.call("Lease.fence", {"lease": lease, "force": True})
    assert fenced["generation"] == forged["generation"] + 1
    assert record.read(slot)["user_data"] == {"before": 1}
    images.remove(disk)


@pytest.fixture
def source(images: conftest.Images, stack: standalone.Stack) -> str:
    """A disk whose copy takes a moment."""
    path = stack.import_dir / "fenced.raw"
    with Path("/dev/urandom").open("rb") as noise, path.open("wb") as out:
        for _ in range(COPIED_BYTES >> 20):
            out.write(noise.read(1 << 20))
    path.chmod(0o644)
    try:
        return images.imported(path)
    finally:
        path.unlink()


def data(stack: standalone.Stack, repo: str) -> dict[str, str]:
    """What is stored, and its checksum."""
    found = {}
    for path in (stack.storage_dir / repo / "data").iterdir():
        with path.open("rb") as content:
            found[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def test_stopped_worker_is_fenced_by_force_alone(
    agent: transport.Client, repo: str, stack: standalone.Stack, images: conftest.Images, source: str
) -> None:
    before = data(stack, repo)
    copy = agent.call("Storage.copyImage", {"targetRepoId": repo, "imageId": source})
    images.made.append(copy["imageId"])
    lease = {"repoId": repo, "leaseId": copy["imageId"]}
    until(lambda: images.status(copy["imageId"])["work"]["state"] == "running")
    (worker,) = conftest.holders(stack, copy["imageId"])
    os.kill(worker, signal.SIGSTOP)

    error = refused(agent, "fence", lease, jobId=copy["jobId"])
    assert (error.data["key"], error.data["facts"]["holder"]) == ("lease_held", f"job {copy['jobId']} on host 1")
    assert agent.call("Lease.status", {"lease": lease, "jobId": copy["jobId"]})["verdict"]["state"] == "running"

    fenced = agent.call("Lease.fence", {"lease": lease, "jobId": copy["jobId"], "force": True})

    job = conftest.wait_job(agent, copy["jobId"])
    assert job["status"] == "failed"
    assert fenced["generation"] == 1
    # Only now: the worker that concludes for the dead one may have got the lease before the fence had read its owners.
    assert agent.call("Lease.status", {"lease": lease})["owners"] == []
    assert fenced["verdict"]["state"] in ("fenced", "failed")  # failed: its agent was quicker to say that it died
    assert images.status(copy["imageId"])["status"] == "broken"
    assert {name: sum_ for name, sum_ in data(stack, repo).items() if name in before} == before
