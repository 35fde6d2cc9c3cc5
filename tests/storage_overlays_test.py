"""Hidden overlays and images made in parts: what VM jobs are built of (trap 39)."""

from collections.abc import Callable

import pytest

from tests import storage_fixture
from vdsm import errors, ids, leases, record
from vdsm.storage import repository
from vdsm.storage.bodies import copying, overlays
from vdsm.storage.files import qemuimg
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import chain, models

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf

VM = {"repo": ids.new(), "id": ids.new()}
WORK = {**models.work("sysprep", 1, {}, job_id="the job"), "state": "running"}


def overlaid(shelf: Shelf, disk: str) -> overlays.Change:
    """An overlay with something written on it."""
    change = overlays.plan(disk)
    overlays.begin(shelf.repo, shelf.session, disk, change, WORK, VM)
    path = shelf.repo.data_path(change["data"])
    storage_fixture.qemu_io(storage_fixture.Path(path), "qcow2", "write -P 9 0 65536")
    return change


def claim(shelf: Shelf, disk: str, change: overlays.Change) -> None:
    overlays.claim(shelf.repo, shelf.session, disk, change, WORK, VM)


@pytest.fixture
def disk(shelf: Shelf) -> str:
    made = shelf.disk()
    shelf.write(made, 1)
    return made


def held(shelf: Shelf, disk: str) -> leases.Lease:
    return shelf.repo.slot(disk).data_lease()


def test_overlay_leaves_the_disk_alone_until_it_is_committed(shelf: Shelf, disk: str) -> None:
    before = shelf.image(disk)
    with shelf.session.holding([held(shelf, disk)], 1):
        change = overlaid(shelf, disk)
        assert shelf.image(disk) == before
        shelf.shows(disk, 1)
        hidden = shelf.image(change["hidden"])
        assert (hidden["status"], hidden["deleted"], hidden["data"]) == ("broken", True, before["data"])
        claim(shelf, disk, change)
        overlays.commit(shelf.repo, shelf.session, disk, change)
        assert {lease[1] for lease in shelf.session.held()} == {disk}
    after, hidden = shelf.image(disk), shelf.image(change["hidden"])
    assert (after["data"]["name"], after["base"], after["generation"]) == (change["data"], change["hidden"], 2)
    assert (after["work"]["kind"], after["work"]["state"], after["work"]["names"]) == ("sysprep", "done", {})
    assert (hidden["status"], hidden["deleted"]) == ("optimized", True)
    shelf.shows(disk, 9)
    assert shelf.remove(disk) == [disk, change["hidden"]]
    assert shelf.files() == set()


def test_dropped_overlay_leaves_nothing(shelf: Shelf, disk: str) -> None:
    before, files = shelf.image(disk), shelf.files()
    with shelf.session.holding([held(shelf, disk)], 1):
        change = overlaid(shelf, disk)
        for _ in range(2):
            overlays.drop(shelf.repo, shelf.session, disk, change)
    assert (shelf.image(disk), shelf.files()) == (before, files)
    shelf.shows(disk, 1)


def test_dropping_what_was_never_begun_is_fine(shelf: Shelf, disk: str) -> None:
    overlays.drop(shelf.repo, shelf.session, disk, overlays.plan(disk))
    shelf.shows(disk, 1)


def test_claimed_disk_gets_its_work_back_with_the_drop(shelf: Shelf, disk: str) -> None:
    before, files = shelf.image(disk), shelf.files()
    with shelf.session.holding([held(shelf, disk)], 1):
        change = overlaid(shelf, disk)
        for _ in range(2):
            claim(shelf, disk, change)
    claimed = shelf.image(disk)
    assert storage_fixture.content(claimed, "work") == storage_fixture.content(before, "work")
    assert (claimed["work"]["job_id"], claimed["work"]["state"]) == ("the job", "running")
    overlays.drop(shelf.repo, shelf.session, disk, overlays.plan(disk))
    assert shelf.image(disk) == claimed, "of another change"
    for _ in range(2):
        overlays.drop(shelf.repo, shelf.session, disk, change)
    assert storage_fixture.content(shelf.image(disk)) == storage_fixture.content(before)
    assert shelf.files() == files


def test_disk_that_was_switched_is_left_as_it_is_now(shelf: Shelf, disk: str) -> None:
    """By whoever finishes the job for the VM's other disks, after this one was used again."""
    with shelf.session.holding([held(shelf, disk)], 1):
        change = overlaid(shelf, disk)
        claim(shelf, disk, change)
        overlays.commit(shelf.repo, shelf.session, disk, change)
    shelf.snapshot(disk)
    shelf.write(disk, 5)
    now = shelf.image(disk)
    with shelf.session.holding([held(shelf, disk)], 1):
        overlays.commit(shelf.repo, shelf.session, disk, change)
    assert shelf.image(disk) == now
    shelf.shows(disk, 5)


STEPS: dict[str, tuple[object, str, int]] = {
    "before the slot": (filelayout.FileLayout, "allocate", 1),
    "before the record": (record, "create", 1),
    "before the overlay": (qemuimg, "run", 1),
    "before the claim": (repository.Repository, "update", 1),
    "before the hidden one is done": (repository.Repository, "update", 2),
    "before the disk": (repository.Repository, "update", 3),
}


def kill(shelf: Shelf, step: str, act: Callable[[Shelf], object]) -> None:
    def inside() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            act(Shelf(shelf.repo, session))

    storage_fixture.killed(inside)


@pytest.mark.parametrize("step", STEPS)
def test_killed_work_is_dropped_or_committed_by_another_worker(shelf: Shelf, disk: str, step: str) -> None:
    """By the VM's record: dropped before that says "committing", committed from then on."""
    before, files = shelf.image(disk), shelf.files()
    change = overlays.plan(disk)

    def act(inside: Shelf) -> None:
        inside.session.acquire([held(inside, disk)], 1)
        overlays.begin(inside.repo, inside.session, disk, change, WORK, VM)
        claim(inside, disk, change)
        overlays.commit(inside.repo, inside.session, disk, change)

    kill(shelf, step, act)
    claimed = step not in list(STEPS)[:4]
    assert storage_fixture.content(shelf.image(disk), "work") == storage_fixture.content(before, "work")
    assert (chain.claim(shelf.image(disk)) is not None) == claimed
    with shelf.session.holding([held(shelf, disk)], 1):
        if not claimed:
            overlays.drop(shelf.repo, shelf.session, disk, change)
            assert shelf.files() == files
        else:
            for _ in range(2):
                overlays.commit(shelf.repo, shelf.session, disk, change)
            assert shelf.image(disk)["generation"] == before["generation"] + 1
            assert shelf.image(change["hidden"])["generation"] == 1
    shelf.shows(disk, 1)


def test_hidden_image_is_not_cleaned_while_its_job_lives(shelf: Shelf, disk: str) -> None:
    """Its lease is held; and once that is free, the VM's record names it."""
    with shelf.session.holding([held(shelf, disk)], 1):
        change = overlaid(shelf, disk)
        with leases.Session() as other, pytest.raises(errors.ImageBusy):
            Shelf(shelf.repo, other).change(change["hidden"])
            shelf.repo.keep(other, change["hidden"])
        shelf.session.release([shelf.repo.slot(change["hidden"]).data_lease()])
        vm = shelf.repo.allocate_vm(shelf.session, ids.new())
        names = {"disks": {disk: change}}
        record.create(vm, {"id": vm.name, "kind": "vm", "work": {**WORK, "names": names, "state": "committing"}})
        assert shelf.remove(change["hidden"]) == []
        claim(shelf, disk, change)
        overlays.commit(shelf.repo, shelf.session, disk, change)
    shelf.shows(disk, 9)


# -- images made in parts --------------------------------------------------------------------------------------------


def fields(shelf: Shelf, source: str) -> dict[str, object]:
    return copying.snapshot_fields(shelf.image(source), {"id": ids.new(), "user_data": {"t": 1}}, "space")


def filled(shelf: Shelf, wanted: dict[str, object], pattern: int) -> str:
    image = copying.begin(shelf.repo, shelf.session, wanted, WORK, VM)
    with shelf.repo.making(image["data"]["name"], 1) as path:
        qemuimg.run(qemuimg.create(qemuimg.Layer(path, "qcow2"), image["size_bytes"]), (), image["size_bytes"])
        storage_fixture.qemu_io(storage_fixture.Path(path), "qcow2", f"write -P {pattern} 0 65536")
    return str(image["id"])


def test_image_made_in_parts_is_whole_at_the_end(shelf: Shelf, disk: str) -> None:
    image_id = filled(shelf, fields(shelf, disk), 7)
    assert shelf.image(image_id)["status"] == "broken"
    with leases.Session() as other, pytest.raises(errors.ImageBusy):
        Shelf(shelf.repo, other).remove(image_id)
    for _ in range(2):
        copying.complete(shelf.repo, shelf.session, image_id)
    image = shelf.image(image_id)
    assert (image["kind"], image["status"], image["generation"]) == ("snapshot", "optimized", 1)
    assert (image["user_data"], image["size_bytes"]) == ({"t": 1}, 1 << 20)
    shelf.shows(image_id, 7)


def test_discarded_image_leaves_nothing(shelf: Shelf, disk: str) -> None:
    files = shelf.files()
    image_id = filled(shelf, fields(shelf, disk), 7)
    for _ in range(2):
        copying.discard(shelf.repo, shelf.session, image_id, "the job")
    assert shelf.files() == files


def test_image_of_somebody_else_is_neither_replaced_nor_discarded(shelf: Shelf, disk: str) -> None:
    taken = {**fields(shelf, disk), "id": disk}
    before = shelf.image(disk)
    with pytest.raises(errors.ImageExists):
        copying.begin(shelf.repo, shelf.session, taken, WORK, VM)
    copying.discard(shelf.repo, shelf.session, disk, "the job")
    assert shelf.image(disk) == before
    shelf.shows(disk, 1)
