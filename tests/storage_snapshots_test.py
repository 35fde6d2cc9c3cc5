"""createSnapshot: nothing is renamed, and whatever kills it, the records tell what is there (trap 31)."""

from collections.abc import Callable

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


def test_snapshot_takes_over_the_data_and_the_disk_goes_on_an_overlay(shelf: Shelf) -> None:
    disk = shelf.disk(user_data={"of": "disk"})
    shelf.write(disk, 1)
    before = shelf.image(disk)

    snapshot = shelf.snapshot(disk, user_data={"of": "snapshot"})

    shelf.write(disk, 2)
    shelf.shows(snapshot, 1)
    shelf.shows(disk, 2)
    shelf.shows(disk, 0, 65536)
    frozen, after = shelf.image(snapshot), shelf.image(disk)
    assert (frozen["kind"], frozen["status"], frozen["data"]) == ("snapshot", "optimized", before["data"])
    assert (after["status"], after["base"], after["generation"]) == ("optimized", snapshot, before["generation"] + 1)
    assert after["data"]["name"] != before["data"]["name"]
    assert (frozen["user_data"], after["user_data"]) == ({"of": "snapshot"}, {"of": "disk"})


def test_snapshots_stand_on_each_other(shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshots = []
    for pattern in (1, 2, 3):
        shelf.write(disk, pattern)
        snapshots.append(shelf.snapshot(disk))
    shelf.write(disk, 4)
    for pattern, snapshot in enumerate(snapshots, 1):
        shelf.shows(snapshot, pattern)
    assert [shelf.image(snapshot)["base"] for snapshot in snapshots] == [None, *snapshots[:2]]


def test_snapshot_of_a_raw_disk_keeps_it_raw(shelf: Shelf) -> None:
    """The overlay must say that what lies below is raw: a guest may have written the header of another format there."""
    disk = shelf.disk(strategy="performance")
    header = b"QFI\xfb\0\0\0\3" + bytes(8)
    with shelf.data(disk).open("r+b") as guest:
        guest.write(header)
    snapshot = shelf.snapshot(disk)
    assert shelf.image(snapshot)["data"]["format"] == "raw"
    assert (shelf.image(snapshot)["status"], shelf.image(disk)["status"]) == ("optimized", "degraded")
    shelf.shows(disk, 0xFB, 3, 1)
    shelf.shows(disk, ord("Q"), 0, 1)


def test_same_request_again_is_the_same_snapshot(shelf: Shelf) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.snapshot(disk, image_id=snapshot)
    before = shelf.image(disk), shelf.image(snapshot)
    assert shelf.snapshot(disk, image_id=snapshot) == snapshot
    assert (shelf.image(disk), shelf.image(snapshot)) == before
    with pytest.raises(errors.ImageExists):
        shelf.snapshot(disk, image_id=snapshot, digest="another")


@pytest.mark.parametrize("held", ["exclusive", "shared"])
def test_disk_in_use_is_refused(shelf: Shelf, held: str) -> None:
    disk = shelf.disk()
    before = shelf.image(disk)
    with leases.Session() as user:
        user.acquire([shelf.repo.slot(disk).data_lease(shared=held == "shared")], 1)
        with pytest.raises(errors.ImageInUse) as refused:
            shelf.snapshot(disk)
    assert refused.value.facts["image_id"] == disk
    assert "process" in refused.value.facts["holder"]
    assert shelf.image(disk) == before
    assert shelf.repo.data_names() == [before["data"]["name"]]


def test_only_disks_have_snapshots(shelf: Shelf) -> None:
    with pytest.raises(errors.WrongKind):
        shelf.snapshot(shelf.snapshot(shelf.disk()))
    with pytest.raises(errors.NoSuchImage):
        shelf.snapshot(ids.new())


@pytest.mark.parametrize("so_far", ["done", "died before the overlay"])
def test_same_request_that_was_quicker_is_not_done_twice(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, so_far: str
) -> None:
    """Between this one's first look and its leases: the snapshot there must not be made anew, of the new data."""
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 5)
    real = filelayout.FileLayout.allocate

    def late(*given: object) -> None:
        monkeypatch.setattr(filelayout.FileLayout, "allocate", real)
        if so_far == "done":
            shelf.snapshot(disk, image_id=snapshot)
            shelf.write(disk, 6)
        else:
            kill(shelf, "before the overlay", lambda inside: inside.snapshot(disk, image_id=snapshot))
        real(*given)  # type: ignore[arg-type]  # whatever is given

    monkeypatch.setattr(filelayout.FileLayout, "allocate", late)
    assert shelf.snapshot(disk, image_id=snapshot) == snapshot
    images = shelf.image(snapshot), shelf.image(disk)
    assert [(image["status"], image["generation"]) for image in images] == [("optimized", 1), ("optimized", 2)]
    shelf.shows(snapshot, 5)
    shelf.shows(disk, 6 if so_far == "done" else 5)


# -- killed ----------------------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[object, str, int]] = {
    "before the slot": (filelayout.FileLayout, "allocate", 1),
    "before the leases": (repository.Repository, "owning", 1),
    "before the snapshot's record": (record, "create", 1),
    "before the disk's record": (repository.Repository, "update", 1),
    "before the overlay": (filelayout.FileLayout, "making", 1),
    "before the overlay is filled": (qemuimg, "run", 1),
    "before the snapshot is done": (repository.Repository, "update", 2),
    "before the disk is done": (repository.Repository, "update", 3),
}
COMMITTED = list(STEPS)[4:]


def kill(shelf: Shelf, step: str, act: Callable[[Shelf], object]) -> None:
    def inside() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            act(Shelf(shelf.repo, session))

    storage_fixture.killed(inside)


@pytest.mark.parametrize("step", STEPS)
def test_killed_snapshot_tells_the_truth(shelf: Shelf, step: str) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 5)
    before = shelf.image(disk)

    kill(shelf, step, lambda inside: inside.snapshot(disk, image_id=snapshot))

    known, after = shelf.repo.find(snapshot), shelf.image(disk)
    assert after["data"] == before["data"], "until the end the disk has its old data"
    shelf.shows(disk, 5)
    if step not in COMMITTED:
        assert after == before
        assert known is None or (known["status"], known["work"]["names"]) == ("broken", {"disk": disk})
    else:
        assert (after["status"], after["work"]["state"]) == ("broken", "running")
        assert after["work"]["names"]["snapshot"] == snapshot
        assert known is not None and known["data"] == before["data"]
        with pytest.raises(errors.ImageNotUsable):
            models.check_usable(after)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", ["asked again", "rolled forward"])
def test_killed_snapshot_is_finished(shelf: Shelf, step: str, way: str) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 5)
    kill(shelf, step, lambda inside: inside.snapshot(disk, image_id=snapshot))

    if way == "rolled forward" and step in COMMITTED:
        intents.roll_forward(shelf.repo, shelf.session, {"image_id": disk})
    else:
        assert shelf.snapshot(disk, image_id=snapshot) == snapshot

    images = shelf.image(snapshot), shelf.image(disk)
    assert [image["status"] for image in images] == ["optimized", "optimized"]
    assert [image["generation"] for image in images] == [1, 2]
    assert images[1]["base"] == snapshot
    shelf.write(disk, 6)
    shelf.shows(snapshot, 5)
    shelf.shows(disk, 6)
    names = {image["data"]["name"] for image in images}
    assert shelf.files() == {*(f"images/{name}" for name in (disk, snapshot)), *(f"data/{name}" for name in names)}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("order", ["disk first", "snapshot first"])
def test_killed_snapshot_can_be_removed(shelf: Shelf, step: str, order: str) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    kill(shelf, step, lambda inside: inside.snapshot(disk, image_id=snapshot))
    for image_id in (disk, snapshot) if order == "disk first" else (snapshot, disk):
        if shelf.repo.find(image_id) is not None:
            shelf.remove(image_id)
    slots = {name for name in shelf.files() if shelf.repo.find(name.partition("/")[2]) is not None}
    assert slots == set() and shelf.repo.data_names() == []


def test_half_made_snapshot_that_was_removed_does_not_take_the_disk_with_it(shelf: Shelf) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 5)
    kill(shelf, "before the disk's record", lambda inside: inside.snapshot(disk, image_id=snapshot))
    assert shelf.remove(snapshot) == [snapshot]
    shelf.shows(disk, 5)
    shelf.snapshot(disk)


def test_snapshot_that_a_disk_still_needs_stays(shelf: Shelf) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 5)
    kill(shelf, "before the disk is done", lambda inside: inside.snapshot(disk, image_id=snapshot))
    assert shelf.remove(snapshot) == []
    intents.roll_forward(shelf.repo, shelf.session, {"image_id": disk})
    shelf.shows(disk, 5)
    assert shelf.image(disk)["base"] == snapshot


def test_snapshot_in_the_making_is_left_alone(shelf: Shelf) -> None:
    """While its maker lives it holds the leases: nobody rolls forward, starts another or removes."""
    disk, snapshot = shelf.disk(), ids.new()
    kill(shelf, "before the overlay", lambda inside: inside.snapshot(disk, image_id=snapshot))
    with leases.Session() as maker:
        maker.acquire([shelf.repo.slot(image_id).data_lease() for image_id in (disk, snapshot)], 1)
        before = shelf.image(disk), shelf.image(snapshot), shelf.files()
        for act in (
            lambda: intents.roll_forward(shelf.repo, shelf.session, {"image_id": disk}),
            lambda: shelf.snapshot(disk),
            lambda: shelf.remove(disk),
            lambda: shelf.remove(snapshot),
        ):
            with pytest.raises(errors.ImageBusy):
                act()
        assert (shelf.image(disk), shelf.image(snapshot), shelf.files()) == before


# -- failed ----------------------------------------------------------------------------------------------------------


def test_failed_snapshot_leaves_the_disk_as_it_was(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = shelf.disk()
    shelf.write(disk, 5)
    before, files = shelf.image(disk), shelf.files()
    # No qemu-img fails on request at this point.
    monkeypatch.setattr(qemuimg, "create", lambda *given: ["false"])
    with pytest.raises(errors.ToolFailed):
        shelf.snapshot(disk)
    after = shelf.image(disk)
    assert storage_fixture.content(after) == storage_fixture.content(before)
    assert shelf.files() == files
    shelf.shows(disk, 5)


@pytest.mark.parametrize("call", [1, 2, 3], ids=["intent", "snapshot", "disk"])
def test_failure_after_a_record_was_written_leaves_no_disk_without_its_snapshot(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """sanlock dies before the record's lease is given back: the step has failed and is on disk all the same."""
    disk = shelf.disk()
    shelf.write(disk, 1)
    before, files = shelf.image(disk), shelf.files()
    real, calls = record.update, []

    def told_wrong(*given: object) -> record.Record:
        written = real(*given)  # type: ignore[arg-type]  # whatever is given
        calls.append(written)
        if len(calls) == call:
            raise errors.LeaseFailed(call="release", resource="the record's lease", reason="Broken pipe", errno=32)
        return written

    monkeypatch.setattr(record, "update", told_wrong)
    with pytest.raises(errors.LeaseFailed):
        shelf.snapshot(disk)
    monkeypatch.undo()

    after = shelf.image(disk)
    if call == 3:
        assert shelf.image(after["base"])["status"] == after["status"] == "optimized"
    else:
        assert storage_fixture.content(after) == storage_fixture.content(before)
        assert shelf.files() == files
    shelf.shows(disk, 1)
    shelf.write(shelf.disk(base=shelf.snapshot(disk)), 2)
    shelf.shows(disk, 1)
