"""The real Debian guest for tests: disks with it, VMs of it, and what it says and holds.

A test module that wants the fixtures says

library, disk, down_vm = guests.library, guests.disk, guests.down_vm
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from tests.until import until
from vdsm import record, standalone
from vdsm.client import transport
from vdsm.tool import guestimage

MARKS = [pytest.mark.guest, pytest.mark.timeout(600)]

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
