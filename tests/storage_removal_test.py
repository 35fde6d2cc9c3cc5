"""removeImage: the flag, what is cleaned when, and in which order (traps 36, 37, 38)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import errors, ids, leases, record
from vdsm.storage import repository
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import models
from vdsm.storage.steps import copyintents, reading, removal, vmrecords

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf


def test_removed_disk_leaves_nothing(shelf: Shelf) -> None:
    disk = shelf.disk()
    assert shelf.remove(disk) == [disk]
    assert shelf.files() == set()
    with pytest.raises(errors.NoSuchImage):
        shelf.remove(disk)


def test_removed_image_is_gone_for_callers_although_others_need_it(shelf: Shelf) -> None:
    disk = shelf.disk()
    shelf.write(disk, 3)
    snapshot = shelf.snapshot(disk)

    assert shelf.remove(snapshot) == []

    shelf.shows(disk, 3)
    assert [image["id"] for image in reading.images(shelf.repo, {})] == [disk]
    for ask in (reading.image, reading.status):
        with pytest.raises(errors.NoSuchImage):
            ask(shelf.repo, {"image_id": snapshot})
    with pytest.raises(errors.ImageNotUsable):
        shelf.disk(0, base=snapshot)


def test_deleted_bases_go_with_their_last_dependent(shelf: Shelf) -> None:
    disk = shelf.disk()
    lower = shelf.snapshot(disk)
    upper = shelf.snapshot(disk)
    clone = shelf.disk(0, base=upper)
    assert shelf.remove(lower) == shelf.remove(upper) == []
    assert shelf.remove(disk) == [disk]
    assert shelf.remove(clone) == [clone, upper, lower]
    assert shelf.files() == set()


def test_what_a_sysprep_has_made_goes_with_its_disk(shelf: Shelf) -> None:
    """Its VM's record may still name the disk's data, as older agents left it: that is nobody's claim."""
    disk = shelf.disk()
    vm_id, names = ids.new(), {"disks": {disk: {"hidden": ids.new(), "data": shelf.data(disk).name}}}
    vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {}})
    work = {**models.work("sysprep", 1, names, job_id=ids.new()), "state": "done", "committed": True}
    vmrecords.change_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "changes": {"work": work}})
    assert shelf.remove(disk) == [disk]
    assert shelf.files() == {f"vms/{vm_id}"}


def test_base_that_was_not_removed_stays(shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    assert shelf.remove(disk) == [disk]
    assert shelf.image(snapshot)["status"] == "optimized"
    assert len(shelf.files()) == 2


def test_disk_in_use_is_not_removed(shelf: Shelf) -> None:
    disk = shelf.disk()
    lease = shelf.repo.slot(disk).data_lease()
    with leases.Session() as user, user.holding([lease], 1), pytest.raises(errors.ImageInUse):
        shelf.remove(disk)
    assert not shelf.image(disk)["deleted"]


def test_snapshot_is_removed_while_a_vm_runs_on_top(shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    slots = shelf.repo.slot(disk), shelf.repo.slot(snapshot)
    with leases.Session() as vm, vm.holding([slots[0].data_lease(), slots[1].data_lease(shared=True)], 1):
        assert shelf.remove(snapshot) == []
    assert shelf.image(snapshot)["deleted"]
    assert shelf.remove(disk) == [disk, snapshot]


def test_generation_is_checked(shelf: Shelf) -> None:
    disk = shelf.disk()
    with pytest.raises(errors.GenerationMismatch):
        removal.remove_image(shelf.repo, shelf.session, {"image_id": disk, "generation": 9})
    assert not shelf.image(disk)["deleted"]


def test_image_queued_on_another_host_is_left_to_it(shelf: Shelf) -> None:
    target = shelf.begin_copy()["image_id"]
    shelf.change(target, work={**shelf.image(target)["work"], "host_id": 7})
    with pytest.raises(errors.ImageBusy):
        shelf.remove(target)


# -- killed ----------------------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[object, str, int]] = {
    "before the flag": (record, "update", 1),
    "before cleaning": (record, "update", 2),
    "before the data goes": (filelayout.FileLayout, "remove_data", 1),
    "before the slot goes": (filelayout.FileLayout, "free", 1),
    "before the file goes": (filelayout, "_remove", 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_killed_removal_is_seen_and_finished(shelf: Shelf, step: str) -> None:
    disk = shelf.disk()

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            Shelf(shelf.repo, session).remove(disk)

    storage_fixture.killed(act)

    known = shelf.repo.find(disk)
    if step == "before the file goes":
        assert known is None and shelf.files() == {f"images/{disk}"}
        shelf.disk(image_id=disk)
        assert shelf.image(disk)["status"] == "optimized"
        return
    assert known is not None
    assert known["deleted"] == (step != "before the flag")
    if not shelf.repo.data_names():
        assert known["status"] == "broken", "a record without its data must not look whole"
    assert shelf.remove(disk) == [disk]
    assert shelf.files() == set()


# -- order -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noting(monkeypatch: pytest.MonkeyPatch, repo: repository.Repository) -> Iterator[list[str]]:
    """The order in which a removal touches storage."""
    noted: list[str] = []
    watched: dict[str, Any] = {"data_names": "list data", "images": "list records", "remove_data": "remove data"}
    with monkeypatch.context() as patch:
        for name, word in watched.items():
            real = getattr(repo, name)

            def note(*given: Any, word: str = word, real: Any = real) -> Any:
                noted.append(word)
                return real(*given)

            patch.setattr(repo, name, note)
        real_acquire = leases.Session.acquire

        def acquire(session: leases.Session, wanted: Any, *given: Any, **named: Any) -> None:
            real_acquire(session, wanted, *given, **named)
            noted.extend(f"lease {lease.name}" for lease in wanted if not lease.name.endswith(".record"))

        patch.setattr(leases.Session, "acquire", acquire)
        yield noted


def test_dependents_are_listed_under_the_exclusive_lease(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed before, a dependent that is made in between would lose its base (trap 36). Nobody else makes data for the
    image, or comes to rely on it, while that lease is held: the data may be listed later (trap 37)."""
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    shelf.remove(disk)
    with noting(monkeypatch, shelf.repo) as noted:
        shelf.remove(snapshot)
    assert noted == [f"lease {snapshot}", "list records", "list data", "remove data"]


def test_a_disk_goes_without_a_look_at_the_others(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is based on a disk; what lies below it accounts for the data that it once had."""
    disk = shelf.disk()
    shelf.snapshot(disk)
    with noting(monkeypatch, shelf.repo) as noted:
        shelf.remove(disk)
    assert "remove data" in noted and "list records" not in noted
    assert noted.count("list data") == 1  # on a volume group that is a command of LVM


def test_data_that_those_below_do_not_account_for_is_not_taken_for_the_disks_own(shelf: Shelf) -> None:
    """A disk's data may be another image's by now, whose record says so; then the disk's removal leaves it."""
    disk = shelf.disk()
    kept = shelf.snapshot(disk)
    name = shelf.image(kept)["data"]["name"]
    shelf.change(disk, base=None)  # whatever has done that
    shelf.remove(disk)
    assert f"data/{name}" in shelf.files()
    assert shelf.image(kept)["data"]["name"] == name


def test_dependent_that_is_being_made_keeps_its_base(shelf: Shelf) -> None:
    """Its maker holds the base shared from before the check: cleaning cannot begin."""
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    shelf.remove(disk)
    with leases.Session() as maker, maker.holding([shelf.repo.slot(snapshot).data_lease(shared=True)], 1):
        assert shelf.remove(snapshot) == []
    assert shelf.image(snapshot)["deleted"] and len(shelf.files()) == 2
    assert shelf.remove(snapshot) == [snapshot]


def test_base_is_held_until_the_dependents_record_is_there(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = shelf.snapshot(shelf.disk())
    seen: list[object] = []
    real = record.create

    def create(*given: Any) -> record.Record:
        with leases.Session() as cleaner:
            try:
                cleaner.acquire([shelf.repo.slot(snapshot).data_lease()], 0)
            except errors.LeaseHeld:
                seen.append("held")
        return real(*given)

    monkeypatch.setattr(record, "create", create)
    shelf.disk(0, base=snapshot)
    assert seen == ["held"]


def test_data_that_no_record_names_goes_with_the_image_whose_lease_made_it(shelf: Shelf) -> None:
    disk, other = shelf.disk(), shelf.disk()
    for image_id in (disk, other):
        with shelf.repo.making(models.data_name(image_id), 1):
            pass
    shelf.remove(disk)
    assert {models.maker(name) for name in shelf.repo.data_names()} == {other}
    assert len(shelf.repo.data_names()) == 2


# -- deletion taken back (trap 38) -----------------------------------------------------------------------------------


def deleted_snapshot(shelf: Shelf) -> str:
    """Deleted, but needed by its disk."""
    snapshot = shelf.snapshot(shelf.disk())
    assert shelf.remove(snapshot) == []
    return snapshot


def test_copying_a_deleted_snapshot_back_brings_it_back(shelf: Shelf) -> None:
    snapshot = deleted_snapshot(shelf)
    data = shelf.image(snapshot)["data"]
    again = shelf.begin_copy(image_id=snapshot, kind=models.SNAPSHOT, user_data={"new": 1})
    assert again == {"image_id": snapshot, "job_id": None, "undeleted": True}
    image = shelf.image(snapshot)
    assert (image["deleted"], image["data"], image["user_data"]) == (False, data, {"new": 1})


def test_snapshot_that_is_being_cleaned_is_not_brought_back(shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    shelf.remove(disk)

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(filelayout.FileLayout, "free")
            Shelf(shelf.repo, session).remove(snapshot)

    storage_fixture.killed(act)
    with pytest.raises(errors.ImageNotUsable):
        shelf.begin_copy(image_id=snapshot, kind=models.SNAPSHOT)
    assert shelf.remove(snapshot) == [snapshot]
    fresh = shelf.begin_copy(image_id=snapshot, kind=models.SNAPSHOT)
    assert fresh["job_id"] is not None


def test_snapshot_that_is_there_is_taken_as_it_is(shelf: Shelf) -> None:
    snapshot = shelf.snapshot(shelf.disk())
    before = shelf.image(snapshot)
    assert shelf.begin_copy(image_id=snapshot, kind=models.SNAPSHOT)["job_id"] is None
    assert shelf.image(snapshot) == before


def test_refused_job_takes_its_target_with_it(shelf: Shelf) -> None:
    job_id = ids.new()
    target = shelf.begin_copy(job_id=job_id)["image_id"]
    copyintents.withdraw_copy(shelf.repo, shelf.session, {"image_id": target, "job_id": ids.new()})
    assert shelf.image(target)["work"]["job_id"] == job_id
    copyintents.withdraw_copy(shelf.repo, shelf.session, {"image_id": target, "job_id": job_id})
    assert shelf.files() == set()
