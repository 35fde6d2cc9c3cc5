"""A repository in a directory: formatting, the header, slots, and places that lead elsewhere."""

import concurrent.futures
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests import sanlock_fixture, storage_fixture
from vdsm import config, errors, ids, leases, record
from vdsm.storage import formats, lockspaces, repository
from vdsm.storage.formats import filelayout

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf


@pytest.fixture
def place(world: storage_fixture.World, tmp_path: Path) -> Path:
    """An empty directory."""
    sanlock_fixture.use(world.run_dir)
    found = tmp_path / "place"
    found.mkdir()
    return found


def opened(place: Path) -> repository.Repository:
    return formats.open(storage_fixture.describe(place, "test"))


def test_formatted_place_is_a_repository(place: Path) -> None:
    made = opened(place).format_(sanlock_fixture.IO_TIMEOUT_S)
    header = opened(place).header()
    assert header == {**made, "place": str(place)}
    assert (header["format"], header["io_timeout_s"], header["sector_bytes"]) == ("localfs-1.0", 1, 512)
    assert sorted(path.name for path in place.iterdir()) == ["data", "images", "repository", "vms"]
    assert (place / "repository").stat().st_size == record.SLOT_BYTES
    assert opened(place).image_ids() == opened(place).vm_ids() == opened(place).data_names() == []


def test_names_differ(place: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    names = {opened(found).format_(1)["name"] for found in (place, tmp_path / "second")}
    assert len(names) == 2


def test_modes_do_not_depend_on_the_umask(place: Path) -> None:
    before = os.umask(0o077)
    try:
        opened(place).format_(1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in place.iterdir()}
    assert modes == {"repository": 0o660, "images": 0o2770, "vms": 0o2770, "data": 0o2770}


@pytest.mark.parametrize("there", ["a file", "images/a file", ".hidden"])
def test_place_that_is_not_empty_is_not_formatted(place: Path, there: str) -> None:
    (place / "images").mkdir()
    (place / there).write_text("precious")
    with pytest.raises(errors.NotEmpty):
        opened(place).format_(1)
    assert (place / there).read_text() == "precious"
    assert not (place / "repository").exists()


def test_repository_is_not_formatted_again(place: Path) -> None:
    """Its hosts would lose their leases (trap 56)."""
    header = opened(place).format_(1)
    before = (place / "repository").read_bytes()
    with pytest.raises(errors.NotEmpty):
        opened(place).format_(1)
    assert (place / "repository").read_bytes() == before
    assert opened(place).header()["name"] == header["name"]


FORMATTING = {
    "before the directories": (filelayout, "_make_directory", 1),
    "before the lockspace": (leases, "write_lockspace", 1),
    "before the lease": (leases, "initialise", 1),
    "before the header": (record, "create", 1),
    "before it is linked": (os, "link", 1),
}


@pytest.mark.parametrize("step", FORMATTING)
def test_killed_formatter_leaves_an_empty_place(place: Path, step: str) -> None:
    def act() -> None:
        storage_fixture.dies_before(*FORMATTING[step])
        opened(place).format_(1)

    storage_fixture.killed(act)
    with pytest.raises(errors.NotARepository):
        opened(place).header()
    opened(place).format_(1)
    assert sorted(path.name for path in place.iterdir()) == ["data", "images", "repository", "vms"]


def test_formatter_killed_behind_its_last_step_leaves_a_name_that_the_next_one_takes_away(place: Path) -> None:
    def act() -> None:
        storage_fixture.dies_before(filelayout.FileLayout, "_unlink_made")
        opened(place).format_(1)

    storage_fixture.killed(act)
    (place / ".repository.of another").touch()
    header = opened(place).header()
    with pytest.raises(errors.NotEmpty):
        opened(place).format_(1)
    assert opened(place).header() == header
    assert {path.name for path in place.glob(".*")} == {".repository.of another"}


def test_of_two_formatters_one_wins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, winner = os.link, opened(place)

    def late(*given: object, **named: object) -> None:
        monkeypatch.setattr(os, "link", real)
        winner.format_(1)
        real(*given, **named)  # type: ignore[arg-type]  # whatever is given

    monkeypatch.setattr(os, "link", late)  # the second one runs in the first one's gap
    with pytest.raises(errors.NotEmpty):
        opened(place).format_(1)
    assert opened(place).header()["name"] == winner.name


@pytest.mark.parametrize("what", ["nothing", "no directory", "another format"])
def test_other_places_are_no_repository(place: Path, what: str) -> None:
    if what == "no directory":
        place.rmdir()
    elif what == "another format":
        opened(place).format_(1)
        slot = record.Slot("", "repository", str(place / "repository"), 0)
        record.create(slot, {**record.read(slot), "format": "localfs-2.0"})
    with pytest.raises(errors.NotARepository):
        opened(place).header()


def test_directory_that_is_not_there_is_not_formatted(place: Path) -> None:
    place.rmdir()
    with pytest.raises(errors.NotARepository):
        opened(place).format_(1)


# -- places ----------------------------------------------------------------------------------------------------------


def test_link_out_of_the_configured_directories_is_refused(place: Path, tmp_path: Path) -> None:
    opened(place).format_(1)
    inside = tmp_path / "allowed"
    inside.mkdir()
    (inside / "link").symlink_to(place)
    description = storage_fixture.describe(inside / "link", "test")
    with pytest.raises(errors.PathNotAllowed):
        formats.open(description).header()
    with pytest.raises(errors.PathNotAllowed):
        formats.open(description).format_(1)


def test_link_within_the_configured_directories_is_the_place_it_leads_to(place: Path, tmp_path: Path) -> None:
    opened(place).format_(1)
    (tmp_path / "link").symlink_to(place)
    assert opened(tmp_path / "link").header()["place"] == str(place)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"path": 5}, {"path": "/srv/a/../b"}, {"path": "/srv/a/"}, {"path": "/srv/a", "more": 1}],
    ids=["none", "no text", "dots", "slash", "more"],
)
def test_parameters_of_localfs_are_checked(parameters: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidParameters):
        formats.describe("localfs-1.0", parameters, "r", 1, config.Storage(localfs_dirs=("/srv",)))


@pytest.mark.parametrize("path", ["/srv", "/srvother/x", "/etc", "srv/x"])
def test_paths_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(errors.PathNotAllowed):
        formats.describe("localfs-1.0", {"path": path}, "r", 1, config.Storage(localfs_dirs=("/srv",)))


def test_unknown_format_names_the_known() -> None:
    with pytest.raises(errors.UnknownFormat, match="nfs-9"):
        formats.describe("nfs-9", {}, "r", 1, config.Storage())


# -- slots -----------------------------------------------------------------------------------------------------------


def test_slot_is_whole_from_its_first_moment(shelf: Shelf) -> None:
    slot = shelf.repo.allocate(shelf.session, ids.new())
    found = Path(slot.path).stat()
    assert found.st_size == record.SLOT_BYTES
    assert found.st_blocks * 512 >= record.SLOT_BYTES
    assert shelf.repo.find(slot.name) is None


def test_slot_that_was_half_allocated_is_completed(shelf: Shelf) -> None:
    slot = shelf.repo.slot(ids.new())
    Path(slot.path).write_bytes(bytes(5000))
    shelf.repo.allocate(shelf.session, slot.name)
    with shelf.session.holding([slot.data_lease(), slot.record_lease()], 1):
        assert Path(slot.path).stat().st_size == record.SLOT_BYTES


def test_freed_slot_takes_its_lease_with_it(shelf: Shelf) -> None:
    slot = shelf.repo.slot(shelf.disk())
    with shelf.repo.owning(shelf.session, exclusive=[slot.name]):
        shelf.repo.free(shelf.session, slot)
    assert not Path(slot.path).exists()
    assert shelf.session.held() == set()


@pytest.mark.parametrize(("first", "second"), [("slot", "allocate_vm"), ("vm_slot", "allocate")], ids=["image", "VM"])
def test_id_is_given_out_once(shelf: Shelf, first: str, second: str) -> None:
    """To an image or to a VM, also when both are asked for at once: the one that has the repository lease first."""
    taken = getattr(shelf.repo, first)(ids.new())
    waits = threading.Event()

    class Second(leases.Session):
        def acquire(self, wanted: Iterable[leases.Lease], wait_s: float, *, patient: bool = False) -> None:
            waits.set()
            super().acquire(wanted, wait_s, patient=patient)

    with Second() as session, concurrent.futures.ThreadPoolExecutor(1) as thread:
        with shelf.session.holding([shelf.repo.lease()], 1):
            late = thread.submit(getattr(shelf.repo, second), session, taken.name)
            assert waits.wait(10)
            Path(taken.path).write_bytes(bytes(record.SLOT_BYTES))
        with pytest.raises(errors.IdTaken) as refused:
            late.result()
    assert refused.value.facts["owner"] == {"slot": "an image", "vm_slot": "a VM"}[first]
    assert shelf.files() == {f"{Path(taken.path).parent.name}/{taken.name}"}
    own = {"slot": shelf.repo.allocate, "vm_slot": shelf.repo.allocate_vm}[first]
    assert own(shelf.session, taken.name) == taken  # again: as ever


def test_host_id_is_told_to_be_another_hosts(shelf: Shelf, place: Path) -> None:
    """Two hosts with one id: sanlock refuses the second, after a long look; the name says at once who it is."""
    assert lockspaces.holder(shelf.repo.lockspace(), storage_fixture.HOST_NAME) is None
    assert lockspaces.holder(shelf.repo.lockspace(), "otherhost") == storage_fixture.HOST_NAME
    repo = opened(place)
    repo.format_(1)
    assert lockspaces.holder(repo.lockspace(), "otherhost") is None, "nobody has joined it"
