"""The real Debian guest: it boots, obeys, is copied, cleaned and made a template."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import backup_test, conftest
from tests.until import until
from vdsm import ids, standalone
from vdsm.client import transport
from vdsm.tool import guestimage

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

BOOT_S = 240.0
MEMORY_MIB = 512


@pytest.fixture(scope="module")
def library(
    stack: standalone.Stack, repo: str, guest: guestimage.GuestImage
) -> Iterator[tuple[transport.Client, conftest.Images, str]]:
    """A snapshot of the freshly imported guest: what the tests' disks are based on."""
    path = stack.import_dir / "guest.raw"
    subprocess.run(["cp", "--sparse=always", str(guest.disk_path), str(path)], check=True)
    path.chmod(0o644)
    with transport.connect(str(stack.socket_path)) as client:
        images = conftest.Images(client, repo, stack.import_dir)
        disk = images.imported(path)
        path.unlink()
        yield client, images, images.snapshot(disk)
        images.clean_up()


@pytest.fixture
def disk(library: tuple[transport.Client, conftest.Images, str]) -> Iterator[str]:
    """A fresh disk with the guest on it."""
    _, images, snapshot = library
    made = images.disk(0, baseSnapshotId=snapshot)
    yield made
    if made in images.ids():
        images.remove(made)
    images.made.remove(made)


@pytest.fixture
def down_vm(machines: conftest.Machines, repo: str, disk: str) -> str:
    """A VM that has a record and runs nowhere; its disk is the guest as installed."""
    return make_down(machines, repo, [disk])


def make_down(machines: conftest.Machines, repo: str, disks: list[str]) -> str:
    vm_id = machines.started(disks=[{"imageId": image_id, "repoId": repo} for image_id in disks])
    machines.destroy(vm_id)
    return vm_id


def listing(stack: standalone.Stack, repo: str) -> set[str]:
    root = stack.storage_dir / repo
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def file_in(stack: standalone.Stack, repo: str, image_id: str, path: str, tmp_path: Path) -> str | None:
    """The file of the guest's root file system, None when there is none: read without the code under test."""
    data = data_of(stack, repo, image_id)
    raw = tmp_path / "whole.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(data), str(raw)], check=True)
    partition = f"{raw}?offset={guestimage.PARTITION_START}"
    shown = subprocess.run(["debugfs", "-R", f"cat {path}", partition], capture_output=True, text=True, check=False)
    raw.unlink()
    return None if "File not found" in shown.stderr else shown.stdout


def data_of(stack: standalone.Stack, repo: str, image_id: str) -> Path:
    from vdsm import record

    place = stack.storage_dir / repo
    known = record.read(record.Slot("", image_id, str(place / "images" / image_id), 0))
    return place / "data" / known["data"]["name"]


def boots(stack: standalone.Stack, machines: conftest.Machines, boot_files: dict[str, str], **spec: Any) -> str:
    """A VM of the guest that has said who it is."""
    vm_id = machines.create(
        memory=MEMORY_MIB, directKernel=boot_files, consoleLog=True, agentChannel=True, nics=[{"type": "user"}], **spec
    )
    log = stack.place.console / f"{vm_id}.log"
    until(
        lambda: machines.status(vm_id) == "Down" or (log.exists() and b"identity old-logs" in log.read_bytes()), BOOT_S
    )
    machines.wait(vm_id, "Up", BOOT_S)
    return vm_id


def identity(stack: standalone.Stack, vm_id: str) -> dict[str, str]:
    """What the guest said of itself on its console when it was up."""
    text = (stack.place.console / f"{vm_id}.log").read_text(errors="replace")
    return dict(re.findall(r"identity (\S+) (\S+)", text))


def changes_told(agent: transport.Client, count: int) -> set[tuple[str, str]]:
    """(image, what happened to it) of the next events, which are about images."""
    found = [agent.next_event(30) for _ in range(count)]
    return {(event["subject"], event["data"]["change"]) for event in found if event is not None}


def test_guest_boots_pauses_stops_from_within_and_is_backed_up(
    stack: standalone.Stack,
    machines: conftest.Machines,
    images: conftest.Images,
    boot_files: dict[str, str],
    repo: str,
    disk: str,
    tmp_path: Path,
) -> None:
    """What it wrote between two copies is what the second copy, the difference to the first, takes."""
    client = machines.client
    first = backup_test.copied(client, repo, disk)
    images.made.append(first)
    vm_id = boots(stack, machines, boot_files, disks=[{"imageId": disk, "repoId": repo}])
    assert machines.client.call("VM.pause", {"vmID": vm_id})["status"] == "Paused"
    assert machines.client.call("VM.cont", {"vmID": vm_id})["status"] == "Up"

    machines.client.call("VM.shutdown", {"vmID": vm_id})

    info = machines.wait(vm_id, "Down", 120)
    assert (info["exitCode"], info["exitReason"]) in ((0, 6), (0, 7))
    second = backup_test.copied(client, repo, disk, baseImageId=first)
    images.made.append(second)
    sums = [backup_test.checksum(stack, repo, image_id, tmp_path) for image_id in (second, disk)]
    assert sums[0] == sums[1]
    sizes = [
        client.call("Storage.getImage", {"repositoryId": repo, "imageId": one})["storedSize"] for one in images.made
    ]
    assert 1 << 20 < sizes[1] < 256 << 20, "what the boot wrote, not the guest"


def test_sysprep_cleans_one_disk(
    stack: standalone.Stack, agent: transport.Client, repo: str, disk: str, down_vm: str, tmp_path: Path
) -> None:
    before = file_in(stack, repo, disk, "/etc/machine-id", tmp_path)
    assert before
    started = agent.call("VM.sysprep", {"vmID": down_vm, "leaseRepoId": repo})

    job = conftest.done(agent, started["jobId"])

    assert job["stage"] == job["stages"]
    assert file_in(stack, repo, disk, "/etc/machine-id", tmp_path) != before
    assert file_in(stack, repo, disk, "/etc/ssh/ssh_host_ed25519_key", tmp_path) is None
    assert file_in(stack, repo, disk, "/root/.bash_history", tmp_path) is None
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
    vm_id = make_down(machines, repo, [disk, data_disk])
    before = {image: images.status(image)["generation"] for image in (disk, data_disk)}
    agent.subscribe(["image"])

    conftest.done(agent, agent.call("VM.seal", {"vmID": vm_id, "leaseRepoId": repo})["jobId"])

    assert changes_told(agent, 2) == {(disk, "changed"), (data_disk, "changed")}
    assert {image: images.status(image)["generation"] for image in before} == {
        image: generation + 1 for image, generation in before.items()
    }
    assert file_in(stack, repo, disk, "/etc/ssh/ssh_host_ed25519_key", tmp_path) is None


@pytest.mark.parametrize("stage", ["overlay", "examine", "sysprep", "commit"])
def test_sysprep_aborted_in_stage_leaves_the_vm_untouched(
    stack: standalone.Stack, agent: transport.Client, repo: str, disk: str, down_vm: str, stage: str
) -> None:
    """In the stage "commit" it is too late: the job ends as done."""
    before, data = listing(stack, repo), data_of(stack, repo, disk)
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
    assert listing(stack, repo) == before
    assert data_of(stack, repo, disk) == data
    assert agent.call("Storage.getImageStatus", {"repositoryId": repo, "imageId": disk})["status"] == "optimized"


def test_template_gives_guests_of_their_own(
    stack: standalone.Stack,
    agent: transport.Client,
    repo: str,
    images: conftest.Images,
    machines: conftest.Machines,
    boot_files: dict[str, str],
    disk: str,
) -> None:
    """The original is untouched; guests from the template have their own machine id and host keys, and no old logs."""
    first = boots(stack, machines, boot_files, disks=[{"imageId": disk, "repoId": repo}])
    mine = identity(stack, first)
    machines.client.call("VM.shutdown", {"vmID": first})
    machines.wait(first, "Down", 120)
    machines.destroy(first)
    data, template_id = data_of(stack, repo, disk), ids.new()
    agent.subscribe(["image"])

    started = agent.call(
        "VM.makeTemplate",
        {
            "vmID": first,
            "leaseRepoId": repo,
            "options": {"imageIds": {disk: template_id}},
            "userData": {"os": "debian"},
        },
    )
    images.made.append(template_id)
    conftest.done(agent, started["jobId"])

    assert changes_told(agent, 1) == {(template_id, "created")}
    assert started["images"] == [{"sourceId": disk, "imageId": template_id}]
    template = agent.call("Storage.getImage", {"repositoryId": repo, "imageId": template_id})
    assert (template["kind"], template["status"], template["userData"]) == ("snapshot", "optimized", {"os": "debian"})
    assert data_of(stack, repo, disk) == data
    second_disk = images.disk(0, baseSnapshotId=template_id)
    second = boots(stack, machines, boot_files, disks=[{"imageId": second_disk, "repoId": repo}])
    its = identity(stack, second)
    assert [name for name in ("machine-id", "host-key", "old-logs") if mine[name] == its[name]] == []
    assert (mine["old-logs"], its["old-logs"]) == ("2", "0")
