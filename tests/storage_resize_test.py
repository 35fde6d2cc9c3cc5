"""resizeVirtualDisk: a disk grows, and whatever kills that, its content is right and the rest is finished."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import errors, ids, leases
from vdsm.storage import repository
from vdsm.storage.files import qemuimg
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import models
from vdsm.storage.steps import intents

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service, World = storage_fixture.Shelf, storage_fixture.Service, storage_fixture.World

MIB = 1 << 20


def resize(shelf: Shelf, disk_id: str, size_bytes: int, generation: int | None = None) -> None:
    asked = {"image_id": disk_id, "size_bytes": size_bytes, "generation": generation}
    intents.resize_virtual_disk(shelf.repo, shelf.session, asked)


def virtual_size(shelf: Shelf, image_id: str) -> int:
    command = ["qemu-img", "info", "--output", "json", "-f", shelf.image(image_id)["data"]["format"]]
    said = subprocess.run([*command, shelf.data(image_id)], capture_output=True, check=True)
    return int(json.loads(said.stdout)["virtual-size"])


@pytest.mark.parametrize("strategy", ["space", "performance"])
def test_disk_grows_and_keeps_what_it_holds(service: Service, shelf: Shelf, strategy: str) -> None:
    disk = shelf.disk(4 * MIB, strategy=strategy)
    shelf.write(disk, 1, 3 * MIB, MIB)
    before = shelf.image(disk)

    service.storage.resize_virtual_disk("main", disk, 7 * MIB + 1, {"generation": before["generation"]})

    after = shelf.image(disk)
    assert after["size_bytes"] == 7 * MIB + 4096 == virtual_size(shelf, disk)
    assert (after["status"], after["generation"]) == ("optimized", before["generation"] + 1)
    assert (after["data"], after["work"]["state"]) == (before["data"], "done")
    shelf.shows(disk, 1, 3 * MIB, MIB)
    shelf.shows(disk, 0, 4 * MIB, 3 * MIB)
    if strategy == "performance":
        assert shelf.repo.allocated_bytes(after["data"]["name"]) >= after["size_bytes"], "still preallocated"
    assert service.storage.get_image("main", disk)["size"] == after["size_bytes"]


def test_overlay_grows_past_its_base(shelf: Shelf, world: World) -> None:
    """What lies below is not asked: its header names a stranger (trap 42)."""
    disk = shelf.disk()
    shelf.write(disk, 1)
    snapshot = shelf.snapshot(disk)
    relabel = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(world.directory / "nowhere"), "-F", "raw"]
    subprocess.run([*relabel, shelf.data(disk)], check=True)
    resize(shelf, disk, 3 * MIB)
    assert (shelf.image(disk)["size_bytes"], shelf.image(snapshot)["size_bytes"]) == (3 * MIB, MIB)
    header = subprocess.run(["qemu-img", "info", "-f", "qcow2", shelf.data(disk)], capture_output=True, check=False)
    assert b"virtual size: 3 MiB" in header.stdout


def refusals(shelf: Shelf) -> dict[str, tuple[Callable[[str], object], type[errors.VdsmError]]]:
    return {
        "smaller": (lambda disk: resize(shelf, disk, 4096), errors.InvalidParameters),
        "another generation": (lambda disk: resize(shelf, disk, 2 * MIB, 8), errors.GenerationMismatch),
        "a snapshot": (lambda disk: resize(shelf, shelf.snapshot(shelf.disk()), 2 * MIB), errors.WrongKind),
        "missing": (lambda disk: resize(shelf, ids.new(), 2 * MIB), errors.NoSuchImage),
        "half made": (lambda disk: resize(shelf, shelf.begin_copy()["image_id"], 2 * MIB), errors.ImageBusy),
    }


@pytest.mark.parametrize("case", ["smaller", "another generation", "a snapshot", "missing", "half made"])
def test_refused_with_nothing_changed(shelf: Shelf, case: str) -> None:
    disk = shelf.disk()
    before = shelf.image(disk)
    act, refusal = refusals(shelf)[case]
    with pytest.raises(refusal) as refused:
        act(disk)
    if case == "smaller":
        assert str(MIB) in str(refused.value)
    assert (shelf.image(disk), virtual_size(shelf, disk)) == (before, MIB)


def test_disk_in_use_is_refused_by_its_holder(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    before = shelf.image(disk)
    with leases.Session() as vm, vm.holding([shelf.repo.slot(disk).data_lease()], 1):
        service.storage.set_holder_lookup(lambda image_id: "VM web (4711)" if image_id == disk else None)
        with pytest.raises(errors.ImageInUse, match="VM web"):
            service.storage.resize_virtual_disk("main", disk, 2 * MIB)
        service.storage.set_holder_lookup(lambda image_id: None)
    assert shelf.image(disk) == before


def test_same_size_changes_nothing(shelf: Shelf) -> None:
    disk = shelf.disk()
    before = shelf.image(disk)
    resize(shelf, disk, MIB)
    assert shelf.image(disk) == before


# -- killed ----------------------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[object, str, int]] = {
    "before the intent": (repository.Repository, "update", 1),
    "before the data": (filelayout.FileLayout, "changing", 1),
    "before the tool": (qemuimg, "run", 1),
    "before the record": (repository.Repository, "update", 2),
}


def killed_at(shelf: Shelf, step: str, disk: str) -> None:
    def inside() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            resize(Shelf(shelf.repo, session), disk, 3 * MIB)

    storage_fixture.killed(inside)


@pytest.mark.parametrize("way", ["asked again", "planned for a VM", "copied"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_resize_is_finished(service: Service, shelf: Shelf, step: str, way: str) -> None:
    disk = shelf.disk(strategy="performance")
    shelf.write(disk, 1)
    before = shelf.image(disk)

    killed_at(shelf, step, disk)

    known = shelf.image(disk)
    if step == "before the intent":
        assert known == before
        return
    assert (known["status"], known["size_bytes"], known["generation"]) == ("broken", MIB, before["generation"])
    assert known["work"]["names"] == {"size_bytes": 3 * MIB} and models.is_open(known)
    with pytest.raises(errors.ImageNotUsable):
        models.check_usable(known)
    if way == "asked again":
        service.storage.resize_virtual_disk("main", disk, 3 * MIB)
    elif way == "planned for a VM":
        assert service.storage.plan_disk(disk, "main", True).size_bytes == 3 * MIB
    else:
        service.ended(service.storage.copy_image("other", disk)["job_id"])
    after = shelf.image(disk)
    assert (after["status"], after["size_bytes"], after["generation"]) == (
        "optimized",
        3 * MIB,
        before["generation"] + 1,
    )
    assert virtual_size(shelf, disk) == 3 * MIB
    assert shelf.repo.allocated_bytes(after["data"]["name"]) >= 3 * MIB, "still preallocated"
    shelf.shows(disk, 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["no space", "no quota"])
def test_failed_resize_is_taken_back(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    disk = shelf.disk(strategy="performance")
    before = shelf.image(disk)
    run, calls = qemuimg.run, []

    def grown_then_failed(argv: list[str], *given: Any) -> bytes:
        said = run(argv, *given)
        calls.append(argv[-1])
        if len(calls) == 1:  # no tool fails on request when it has done its work
            raise errors.ToolFailed(program="qemu-img", exit_code=1, reason="?", output=[f"x: {os.strerror(number)}"])
        return said

    monkeypatch.setattr(qemuimg, "run", grown_then_failed)
    with pytest.raises(errors.RepositoryFull):
        resize(shelf, disk, 3 * MIB)
    assert storage_fixture.content(shelf.image(disk)) == storage_fixture.content(before)
    assert calls == [str(3 * MIB), str(MIB)]
    assert Path(shelf.data(disk)).stat().st_size == MIB


def test_failure_behind_the_last_record_does_not_cut_what_has_grown(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record says has grown may be used from then on: cutting it would lose what is written there."""
    disk = shelf.disk(strategy="performance")
    real = repository.Repository.update

    def told_late(repo: Any, session: Any, image_id: str, change: Any) -> Any:
        written = real(repo, session, image_id, change)
        if written["size_bytes"] == 3 * MIB:  # sanlock does not die on request just when a lease is given back
            raise errors.LeaseFailed(call="release", resource=image_id, errno=-1, reason="?")
        return written

    monkeypatch.setattr(repository.Repository, "update", told_late)
    with pytest.raises(errors.LeaseFailed):
        resize(shelf, disk, 3 * MIB)
    grown = shelf.image(disk)
    assert (grown["size_bytes"], grown["status"]) == (3 * MIB, "optimized")
    assert Path(shelf.data(disk)).stat().st_size == 3 * MIB


def test_size_that_does_not_fit_is_refused_before_anything_is_changed(shelf: Shelf) -> None:
    disk = shelf.disk(strategy="performance")
    before = shelf.image(disk)
    with pytest.raises(errors.RepositoryFull):
        resize(shelf, disk, models.MAX_SIZE_BYTES)
    assert shelf.image(disk) == before
