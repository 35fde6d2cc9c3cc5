"""The storage API's flow of incremental backups: what a disk was written between two copies is all that the second
copy takes, and nobody makes a snapshot of the disk."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from vdsm import ids, record, standalone
from vdsm.client import failures, transport

MIB = 1 << 20


@pytest.fixture(scope="module")
def vault(stack: standalone.Stack) -> Iterator[str]:
    """A second repository, for the copies."""
    repo_id = conftest.connect_repository(stack, f"vault-{ids.new()[:8]}")
    yield repo_id
    with transport.connect(str(stack.socket_path)) as client:
        for image in client.call("Storage.listImages", {"repositoryId": repo_id}):
            client.call("Storage.removeImage", {"repositoryId": repo_id, "imageId": image["imageId"]})
        client.call("Storage.disconnectStorageRepository", {"repoId": repo_id})


def known(stack: standalone.Stack, repo: str, image_id: str) -> record.Record:
    return record.read(record.Slot("", image_id, str(stack.storage_dir / repo / "images" / image_id), 0))


def data(stack: standalone.Stack, repo: str, image_id: str) -> Path:
    return stack.storage_dir / repo / "data" / known(stack, repo, image_id)["data"]["name"]


def checksum(stack: standalone.Stack, repo: str, image_id: str, scratch: Path) -> str:
    """Of all that the image shows. The headers are asked what lies below, as any other program would."""
    out = scratch / "whole.raw"
    image_format = known(stack, repo, image_id)["data"]["format"]
    source = ["-f", image_format, str(data(stack, repo, image_id))]
    subprocess.run(["qemu-img", "convert", "-U", *source, "-O", "raw", str(out)], check=True)
    with out.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    out.unlink()
    return found


def write(stack: standalone.Stack, repo: str, image_id: str, *commands: str) -> None:
    """What a guest would write, while none runs."""
    given = [word for command in commands for word in ("-c", command)]
    image_format = known(stack, repo, image_id)["data"]["format"]
    argv = ["qemu-io", "-f", image_format, *given, str(data(stack, repo, image_id))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def copied(client: transport.Client, target: str, image_id: str, **given: Any) -> str:
    answer = client.call("Storage.copyImage", {"targetRepoId": target, "imageId": image_id, **given})
    conftest.done(client, answer["jobId"])
    return str(answer["imageId"])


def test_incremental_backup(
    stack: standalone.Stack,
    agent: transport.Client,
    repo: str,
    vault: str,
    images: conftest.Images,
    machines: conftest.Machines,
    tmp_path: Path,
) -> None:
    disk = images.bytes(ids.new().encode() * (256 << 10))  # 9 MiB
    machines.destroy(machines.started(disks=[{"imageId": disk, "repoId": repo}]))
    first = copied(agent, vault, disk)
    machines.destroy(machines.started(disks=[{"imageId": disk, "repoId": repo}]))
    write(stack, repo, disk, "write -P 1 1M 512k", "write -z 4M 1M", "write -P 2 8191k 3k")
    source, content = known(stack, repo, disk), checksum(stack, repo, disk, tmp_path)

    second = copied(agent, vault, disk, baseImageId=first)

    assert known(stack, repo, disk) == source, "no snapshot, nothing written"
    assert checksum(stack, repo, disk, tmp_path) == content == checksum(stack, vault, second, tmp_path)
    image = agent.call("Storage.getImage", {"repositoryId": vault, "imageId": second})
    assert (image["status"], image["size"]) == ("optimized", source["size_bytes"])
    assert 512 << 10 < image["storedSize"] < 2 * MIB

    # The first copy is a disk: it runs, is written, is gone. The second does not see any of it.
    machines.destroy(machines.started(disks=[{"imageId": first, "repoId": vault}]))
    write(stack, vault, first, "write -P 7 0 9M")
    assert checksum(stack, vault, second, tmp_path) == content
    agent.call("Storage.removeImage", {"repositoryId": vault, "imageId": first})
    assert checksum(stack, vault, second, tmp_path) == content
    # What the first has left below the second is given back when the two are merged.
    (fix,) = agent.call("Storage.checkStorageRepository", {"repositoryId": vault})
    assert fix["type"] == "merge"
    conftest.done(agent, agent.call("Storage.fixStorageRepository", {"repositoryId": vault, "fix": fix})["jobId"])
    assert agent.call("Storage.checkStorageRepository", {"repositoryId": vault}) == []
    assert checksum(stack, vault, second, tmp_path) == content
    machines.destroy(machines.started(disks=[{"imageId": second, "repoId": vault}]))
    listed = agent.call("Storage.listImages", {"repositoryId": vault})
    assert [image["imageId"] for image in listed] == [second]


def test_base_that_runs_is_refused_by_its_vm(
    agent: transport.Client, repo: str, vault: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    disk = images.disk()
    first = copied(agent, vault, disk)
    vm_id = machines.started(disks=[{"imageId": first, "repoId": vault}])
    with pytest.raises(failures.ClientError) as refused:
        agent.call("Storage.copyImage", {"targetRepoId": vault, "imageId": disk, "baseImageId": first})
    assert refused.value.data["key"] == "image_in_use"
    assert vm_id in refused.value.data["facts"]["holder"]
