"""A repository without any space left can still be written to where that matters, and emptied (trap 20)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import loopfs, sanlock_fixture, storage_fixture
from tests.until import until
from vdsm import errors, ids, leases, record
from vdsm.storage import formats, repository
from vdsm.storage.steps import intents

world = storage_fixture.world
Shelf = storage_fixture.Shelf


@pytest.fixture(scope="module")
def small(world: storage_fixture.World) -> Iterator[repository.Repository]:
    """A joined repository on a file system of 64 MiB."""
    sanlock_fixture.use(world.run_dir)
    with loopfs.mounted(64 << 20) as place:
        repo = formats.open(storage_fixture.describe(place, "small"))
        repo.format_(1)
        leases.join(repo.lockspace(), 1)
        until(lambda: leases.state(repo.lockspace()) == "joined")
        try:
            yield repo
        finally:
            leases.leave(repo.lockspace())


@pytest.fixture
def shelf(small: repository.Repository) -> Iterator[Shelf]:
    with leases.Session() as session:
        yield Shelf(small, session)
    for place in ("ballast", "images", "data"):
        for path in Path(small.place).glob(f"{place}/*" if place != "ballast" else place):
            path.unlink()


def full(shelf: Shelf) -> None:
    loopfs.fill(Path(shelf.repo.place))
    with pytest.raises(OSError, match="No space"):
        Path(shelf.repo.place, "nothing more").write_bytes(b"x" * 4096)
    Path(shelf.repo.place, "nothing more").unlink()


def test_full_repository_is_emptied(shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    full(shelf)
    assert shelf.remove(snapshot) == []
    assert shelf.remove(disk) == [disk, snapshot]
    assert shelf.files() == set()
    Path(shelf.repo.place, "ballast").unlink()
    shelf.disk()


def test_records_are_written_in_a_full_repository(shelf: Shelf) -> None:
    """Both areas, to their very end: nothing of a record needs space that was not given to it when it was made."""
    disk = shelf.disk()
    full(shelf)
    for number in range(4):
        data = {"number": number, "x": "y" * 30_000}
        shelf.change(disk, user_data=data)
        assert shelf.image(disk)["user_data"] == data


def test_new_image_in_a_full_repository_is_refused_and_leaves_nothing(shelf: Shelf) -> None:
    disk = shelf.disk()
    before = shelf.image(disk), shelf.files()
    full(shelf)
    for act in (shelf.disk, lambda: shelf.snapshot(disk), shelf.begin_copy):
        with pytest.raises(errors.RepositoryFull):
            act()
    assert (shelf.image(disk), shelf.files()) == before


def test_disk_that_does_not_fit_leaves_nothing(shelf: Shelf) -> None:
    with pytest.raises(errors.RepositoryFull):
        shelf.disk(1 << 30, strategy="performance")
    assert shelf.files() == set()


def test_copy_that_cannot_fit_is_refused_before_it_is_begun(shelf: Shelf) -> None:
    with pytest.raises(errors.RepositoryFull):
        shelf.begin_copy(size_bytes=1 << 30, strategy="performance")
    assert shelf.files() == set()


def test_snapshot_that_finds_no_room_for_its_overlay_is_withdrawn(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot still fits, the overlay does not."""
    disk = shelf.disk()
    shelf.write(disk, 4)
    before = shelf.image(disk)
    spare = shelf.repo.allocate(shelf.session, ids.new())
    full(shelf)
    Path(spare.path).unlink()
    files = shelf.files()
    left = Path(shelf.repo.place, "left")
    free_bytes = shelf.repo.space().free_bytes
    left.write_bytes(bytes(max(0, free_bytes - record.SLOT_BYTES - 8192)))
    withdrawn: list[object] = []
    real = intents._withdraw
    monkeypatch.setattr(intents, "_withdraw", lambda *given: withdrawn.append(real(*given)))
    with pytest.raises(errors.RepositoryFull):
        shelf.snapshot(disk)
    left.unlink()
    assert withdrawn, "it failed before the overlay: the test has left too little room"
    assert shelf.files() == files
    assert storage_fixture.content(shelf.image(disk)) == storage_fixture.content(before)
    shelf.shows(disk, 4)
    intents.roll_forward(shelf.repo, shelf.session, {"image_id": disk})
