"""The real Debian guest: it boots, obeys, is copied and made a template."""

from pathlib import Path

from tests import backup_test, conftest, guests
from vdsm import ids, standalone
from vdsm.client import transport

pytestmark = guests.MARKS
library, disk = guests.library, guests.disk


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
    vm_id = guests.boots(stack, machines, boot_files, disks=[{"imageId": disk, "repoId": repo}])
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
    first = guests.boots(stack, machines, boot_files, disks=[{"imageId": disk, "repoId": repo}])
    mine = guests.identity(stack, first)
    machines.client.call("VM.shutdown", {"vmID": first})
    machines.wait(first, "Down", 120)
    machines.destroy(first)
    data, template_id = guests.data_of(stack, repo, disk), ids.new()
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

    assert guests.changes_told(agent, 1) == {(template_id, "created")}
    assert started["images"] == [{"sourceId": disk, "imageId": template_id}]
    template = agent.call("Storage.getImage", {"repositoryId": repo, "imageId": template_id})
    assert (template["kind"], template["status"], template["userData"]) == ("snapshot", "optimized", {"os": "debian"})
    assert guests.data_of(stack, repo, disk) == data
    second_disk = images.disk(0, baseSnapshotId=template_id)
    second = guests.boots(stack, machines, boot_files, disks=[{"imageId": second_disk, "repoId": repo}])
    its = guests.identity(stack, second)
    assert [name for name in ("machine-id", "host-key", "old-logs") if mine[name] == its[name]] == []
    assert (mine["old-logs"], its["old-logs"]) == ("2", "0")
