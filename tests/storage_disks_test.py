"""createVirtualDisk and userData, step by step on a real repository."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import errors, ids, leases, record
from vdsm.storage import repository
from vdsm.storage.files import qemuimg
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import models
from vdsm.storage.steps import intents

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf

MIB = 1 << 20


def info(path: Path) -> dict[str, Any]:
    said = subprocess.run(["qemu-img", "info", "--output", "json", path], capture_output=True, check=True).stdout
    return dict(json.loads(said))


@pytest.mark.parametrize(("strategy", "expected"), [("space", "qcow2"), ("performance", "raw")])
def test_empty_disk_is_stored_as_its_strategy_says(shelf: Shelf, strategy: str, expected: str) -> None:
    disk = shelf.disk(3 * MIB, strategy=strategy, user_data={"mine": [1, None]})

    image = shelf.image(disk)
    assert (image["kind"], image["status"], image["generation"]) == ("disk", "optimized", 1)
    assert (image["size_bytes"], image["data"]["format"], image["base"]) == (3 * MIB, expected, None)
    assert image["user_data"] == {"mine": [1, None]}
    assert info(shelf.data(disk))["format"] == expected
    assert info(shelf.data(disk))["virtual-size"] == 3 * MIB
    shelf.shows(disk, 0, 0, 3 * MIB)


def test_performance_is_preallocated(shelf: Shelf) -> None:
    disk = shelf.disk(8 * MIB, strategy="performance")
    assert shelf.repo.allocated_bytes(shelf.image(disk)["data"]["name"]) >= 8 * MIB


def test_qemu_reaches_the_data_by_group_whatever_the_umask_is(shelf: Shelf) -> None:
    disk = shelf.disk()
    slot = Path(shelf.repo.slot(disk).path)
    assert [path.stat().st_mode & 0o7777 for path in (shelf.data(disk), slot)] == [0o660, 0o660]


@pytest.mark.parametrize(("asked", "given"), [(1, 4096), (4096, 4096), (4097, 8192), (MIB - 1, MIB)])
def test_sizes_are_whole_blocks(asked: int, given: int) -> None:
    assert models.size(asked) == given


@pytest.mark.parametrize("asked", [0, -1, 16 << 40])
def test_impossible_sizes_are_refused(asked: int) -> None:
    with pytest.raises(errors.InvalidParameters):
        models.size(asked)


def test_the_largest_disk_can_be_made(shelf: Shelf) -> None:
    disk = shelf.disk(models.MAX_SIZE_BYTES)
    assert info(shelf.data(disk))["virtual-size"] == models.MAX_SIZE_BYTES


def test_disk_on_a_snapshot_shows_what_that_holds(shelf: Shelf) -> None:
    origin = shelf.disk()
    shelf.write(origin, 7)
    base = shelf.snapshot(origin)

    disk = shelf.disk(0, base=base)

    assert (shelf.image(disk)["base"], shelf.image(disk)["size_bytes"]) == (base, MIB)
    shelf.shows(disk, 7)
    shelf.write(disk, 8)
    shelf.shows(base, 7)
    shelf.shows(origin, 7)


def test_performance_on_a_snapshot_is_degraded(shelf: Shelf) -> None:
    base = shelf.snapshot(shelf.disk())
    assert shelf.image(shelf.disk(0, base=base, strategy="performance"))["status"] == "degraded"


def test_larger_disk_on_a_snapshot_ends_with_zeros(shelf: Shelf) -> None:
    origin = shelf.disk()
    shelf.write(origin, 7, 0, MIB)
    disk = shelf.disk(2 * MIB, base=shelf.snapshot(origin))
    shelf.shows(disk, 7, 0, MIB)
    shelf.shows(disk, 0, MIB, MIB)


def test_bases_that_cannot_carry_a_disk_are_refused_and_leave_nothing(shelf: Shelf) -> None:
    origin = shelf.disk()
    base = shelf.snapshot(origin)
    broken = shelf.begin_copy(image_id=ids.new())["image_id"]
    before = shelf.files()
    with pytest.raises(errors.WrongKind):
        shelf.disk(0, base=origin)
    with pytest.raises(errors.NoSuchImage):
        shelf.disk(0, base=ids.new())
    with pytest.raises(errors.InvalidParameters):
        shelf.disk(MIB - 4096, base=base)
    with pytest.raises(errors.WrongKind):
        shelf.disk(0, base=broken)
    assert shelf.files() == before


def test_same_request_again_is_the_same_disk(shelf: Shelf) -> None:
    image_id = ids.new()
    shelf.disk(image_id=image_id, digest="request")
    shelf.write(image_id, 9)
    before = shelf.image(image_id)

    assert shelf.disk(image_id=image_id, digest="request") == image_id

    assert shelf.image(image_id) == before
    shelf.shows(image_id, 9)


def test_another_request_for_a_known_id_is_refused(shelf: Shelf) -> None:
    image_id = shelf.disk(digest="request")
    before = shelf.image(image_id)
    with pytest.raises(errors.ImageExists):
        shelf.disk(image_id=image_id, digest="another")
    assert shelf.image(image_id) == before


STEPS = {
    "before the slot": (filelayout.FileLayout, "allocate", 1),
    "before the slot's leases": (leases, "initialise", 1),
    "before the lease": (repository.Repository, "owning", 2),
    "before the record": (record, "create", 1),
    "before the data": (qemuimg, "run", 1),
    "before the end": (repository.Repository, "update", 1),
}
EARLY = ("before the slot", "before the slot's leases", "before the lease", "before the record")


@pytest.mark.parametrize("step", STEPS)
def test_killed_disk_is_nothing_or_broken_and_the_same_request_finishes_it(shelf: Shelf, step: str) -> None:
    image_id = ids.new()

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            Shelf(shelf.repo, session).disk(image_id=image_id)

    storage_fixture.killed(act)

    known = shelf.repo.find(image_id)
    if step in EARLY:
        assert known is None and not shelf.repo.data_names()
    else:
        assert known is not None
        assert (known["status"], known["work"]["kind"], known["work"]["state"]) == (
            *("broken", "createVirtualDisk"),
            "running",
        )
    shelf.disk(image_id=image_id)
    assert shelf.image(image_id)["status"] == "optimized"
    shelf.shows(image_id, 0)
    assert len(shelf.files()) == 2


@pytest.mark.parametrize("step", STEPS)
def test_killed_disk_can_be_removed(shelf: Shelf, step: str) -> None:
    image_id = ids.new()

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            Shelf(shelf.repo, session).disk(image_id=image_id)

    storage_fixture.killed(act)
    if shelf.repo.find(image_id) is None:
        with pytest.raises(errors.NoSuchImage):
            shelf.remove(image_id)
    else:
        assert shelf.remove(image_id) == [image_id]
        assert shelf.files() == set()


def test_failed_disk_leaves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    # No qemu-img fails on request at this point.
    monkeypatch.setattr(qemuimg, "create", lambda *given: ["false"])
    with pytest.raises(errors.ToolFailed):
        shelf.disk()
    assert shelf.files() == set()


def test_allocation_that_died_is_taken_over_without_touching_a_held_lease(shelf: Shelf) -> None:
    """Writing the leases of a slot anew while somebody holds one would give it away (trap 12)."""
    image_id = ids.new()
    slot = shelf.repo.allocate(shelf.session, image_id)
    with shelf.session.holding([slot.data_lease()], 1), leases.Session() as second:
        with pytest.raises(errors.ImageInUse):
            Shelf(shelf.repo, second).disk(image_id=image_id)
        assert leases.owners(slot.data_lease())
        with pytest.raises(errors.LeaseHeld):
            second.acquire([slot.data_lease()], 0)
    assert shelf.repo.find(image_id) is None
    shelf.disk(image_id=image_id)
    assert shelf.image(image_id)["status"] == "optimized"


def test_user_data_is_replaced_while_somebody_writes_the_disk(shelf: Shelf) -> None:
    disk = shelf.disk(user_data={"old": True})
    with leases.Session() as writer, writer.holding([shelf.repo.slot(disk).data_lease()], 1):
        intents.set_user_data(
            shelf.repo, shelf.session, {"image_id": disk, "user_data": {"new": "ü"}, "generation": None}
        )
    assert shelf.image(disk)["user_data"] == {"new": "ü"}


def test_user_data_leaves_room_for_the_record(shelf: Shelf) -> None:
    largest = {"x": "y" * (models.MAX_USER_DATA_BYTES - len('{"x": ""}'))}
    models.check_user_data(largest)
    disk = shelf.disk(user_data=largest)
    snapshot = shelf.snapshot(disk, user_data=largest)
    assert shelf.image(disk)["user_data"] == shelf.image(snapshot)["user_data"] == largest
    with pytest.raises(errors.InvalidParameters):
        models.check_user_data({"x": largest["x"] + "y"})


def test_generation_is_checked_before_anything_changes(shelf: Shelf) -> None:
    disk = shelf.disk()
    before = shelf.image(disk)
    with pytest.raises(errors.GenerationMismatch):
        intents.set_user_data(shelf.repo, shelf.session, {"image_id": disk, "user_data": {}, "generation": 5})
    with pytest.raises(errors.GenerationMismatch):
        shelf.snapshot(disk, generation=5)
    assert shelf.image(disk) == before
    assert len(shelf.files()) == 2
