"""Who wrote a record is compared with who owned its lease, before others' work is taken over (trap 30)."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import sanlock

from tests import storage_fixture
from tests.until import until
from vdsm import errors, ids, leader, leases, record
from vdsm.storage.rules import models
from vdsm.storage.steps import checking, fences, fixclaims, intents, removal, vmrecords

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf

pytestmark = pytest.mark.usefixtures("generation")


@pytest.fixture(scope="module")
def generation(world: storage_fixture.World) -> None:
    """sanlock knows it some seconds after the join."""
    until(lambda: bool(leases.hosts(world.main.name)), 60)


# What a record of somebody who did not own its lease may say of its writer, by what it says when it is right.
FORGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another host": lambda right: {"host_id": 77},
    "another life of the host": lambda right: {"host_generation": right["host_generation"] + 1},
    "a later owner": lambda right: {"lease_version": right["lease_version"] + 100},
}


def last_owner(slot: record.Slot) -> leader.Owner | None:
    return leader.last_owner(slot.path, slot.record_lease().offset)


def fence(shelf: Shelf, lease_id: str, **given: Any) -> None:
    fences.fence(shelf.repo, shelf.session, {"lease_id": lease_id, "generation": None, "job_id": None, **given})


def fix(shelf: Shelf, image_id: str) -> None:
    """The only one that a check lists, asked for."""
    (found,) = checking.check(shelf.repo, {"active": [], "takeover": False})
    asked = {name: found[name] for name in ("fix", "entity", "guard")}
    argument = {**asked, "job_id": ids.new(), "active": [], "takeover": False}
    fixclaims.begin_fix(shelf.repo, shelf.session, argument)


def test_each_write_says_which_owner_of_the_lease_it_was(shelf: Shelf) -> None:
    """Also a job's write, which changes nothing but its work; the first record has had no owner yet."""
    target = shelf.begin_copy()
    assert shelf.image(target["image_id"])["writer"].keys() == {"host_id", "boot_id"}
    slot, seen = shelf.repo.slot(target["image_id"]), []
    for stage in (1, 2):
        said = shelf.change(slot.name, work={**shelf.image(slot.name)["work"], "stage": stage})["writer"]
        assert (said["host_id"], said["boot_id"]) == (1, record.boot_id())
        seen.append(leader.Owner(said["host_id"], said["host_generation"], said["lease_version"]))
        assert seen[-1] == last_owner(slot)
    assert seen[1].version == seen[0].version + 1


def test_process_without_the_lease_cannot_say_so(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that forgets the lease, or goes on without it: nothing is written."""
    disk = shelf.disk()
    before = shelf.image(disk)

    def forgets(session: leases.Session, *_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(leases.Session, "acquire", forgets)  # there is no such bug to be had otherwise
    with pytest.raises(errors.LeaseFailed):
        shelf.change(disk, user_data={"written": "without the lease"})
    monkeypatch.undo()
    assert shelf.image(disk) == before


def broken_disk(shelf: Shelf) -> str:
    """Its new size was begun, and is open."""
    disk = shelf.disk()
    work = models.work("resizeVirtualDisk", 1, {"size_bytes": 2 << 20})
    shelf.change(disk, status="broken", work=work)
    return disk


def written_disk(shelf: Shelf) -> str:
    disk = shelf.disk()
    shelf.change(disk, user_data={})
    return disk


def removed_base(shelf: Shelf) -> str:
    """Its one dependent is left: the two are merged, and it goes."""
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    shelf.remove(snapshot)
    return snapshot


def written_vm(shelf: Shelf) -> str:
    vm_id = ids.new()
    vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "fields": {}})
    vmrecords.change_vm(shelf.repo, shelf.session, {"vm_id": vm_id, "changes": {"name": "box"}})
    return vm_id


TAKEOVERS: dict[str, tuple[Callable[[Shelf], str], Callable[[Shelf, str], Any]]] = {
    "fence": (broken_disk, fence),
    "mend": (broken_disk, fix),
    "merge": (removed_base, fix),
    "start": (broken_disk, lambda shelf, it: intents.roll_forward(shelf.repo, shelf.session, {"image_id": it})),
    "removal": (written_disk, lambda shelf, it: removal.remove_image(shelf.repo, shelf.session, removing(it))),
    "removal of a VM's lease": (
        written_vm,
        lambda shelf, it: vmrecords.remove_vm(shelf.repo, shelf.session, {"vm_id": it}),
    ),
}


def removing(image_id: str) -> dict[str, Any]:
    return {"image_id": image_id, "generation": None}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("takeover", TAKEOVERS)
def test_takeover_stops_at_a_record_of_unknown_make(shelf: Shelf, takeover: str, forged: str) -> None:
    """It stays as it is and can be read; accepted by force, it is as good as any."""
    scene, take = TAKEOVERS[takeover]
    entity = scene(shelf)
    slot = shelf.repo.vm_slot(entity) if scene is written_vm else shelf.repo.slot(entity)
    files, right = shelf.files(), record.read(slot)
    storage_fixture.forge(slot, **FORGED[forged](right["writer"]))
    before = record.read(slot)

    with pytest.raises(errors.RecordNotOwned) as caught:
        take(shelf, entity)

    assert (record.read(slot), shelf.files()) == (before, files)
    assert f"host {right['writer']['host_id']} in generation" in str(caught.value)
    record.adopt(shelf.session, slot)
    assert storage_fixture.content(record.read(slot)) == storage_fixture.content(right)
    take(shelf, entity)


def test_later_owner_is_found_by_every_write(shelf: Shelf) -> None:
    """As when the lease was made anew beside its record, by hand: whoever held it has lost it without a word."""
    disk = shelf.disk()
    for count in range(5):
        shelf.change(disk, user_data={"count": count})
    lease = shelf.repo.slot(disk).record_lease()
    sanlock.write_resource(lease.lockspace.encode(), lease.name.encode(), lease.place, num_hosts=leases.MAX_HOSTS)
    before = shelf.image(disk)
    for _ in range(2):
        with pytest.raises(errors.RecordNotOwned):
            shelf.change(disk, user_data={"over": "it"})
    assert shelf.image(disk) == before
    fence(shelf, disk, force=True)
    assert shelf.change(disk, user_data={"over": "it"})["generation"] == before["generation"] + 1


def test_forced_fence_accepts_what_it_fences_and_says_so(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    target = shelf.begin_copy()
    shelf.change(target["image_id"])
    slot = shelf.repo.slot(target["image_id"])
    forged = storage_fixture.forge(slot, host_id=77)
    with pytest.raises(errors.GenerationMismatch):
        fence(shelf, slot.name, force=True, generation=forged["generation"] + 1)
    assert record.read(slot) == forged, "refused, so not accepted either"
    for _ in range(2):
        fence(shelf, slot.name, force=True, generation=forged["generation"], job_id=target["job_id"])
    assert record.read(slot)["work"]["state"] == "fenced"
    assert len([line for line in caplog.messages if "accepted by force" in line and "host 77" in line]) == 1


def dies_with_the_lease(shelf: Shelf, slot: record.Slot) -> None:
    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(record, "_change")
            record.update(session, slot, lambda known: known)

    storage_fixture.killed(act)


def takes_the_lease_alone(shelf: Shelf, slot: record.Slot) -> None:
    record.update(shelf.session, slot, lambda known: None)


def is_unsaid(shelf: Shelf, slot: record.Slot) -> None:
    """An older agent's write."""
    said = record.read(slot)["writer"]
    storage_fixture.forge(slot, lease_version=None, host_id=said["host_id"] + 1)


def is_unknown_to_sanlock(shelf: Shelf, slot: record.Slot) -> None:
    """A host does not know its own generation for some seconds after it has joined."""
    storage_fixture.forge(slot, host_generation=None)


@pytest.mark.parametrize(
    "happens",
    [dies_with_the_lease, takes_the_lease_alone, is_unsaid, is_unknown_to_sanlock],
    ids=lambda happens: happens.__name__.replace("_", " "),
)
def test_owners_that_wrote_nothing_are_no_alarm(shelf: Shelf, happens: Callable[[Shelf, record.Slot], None]) -> None:
    disk = written_disk(shelf)
    slot = shelf.repo.slot(disk)
    before = last_owner(slot)
    happens(shelf, slot)
    record.check_writer(slot)
    assert shelf.change(disk, user_data={"again": 1})["user_data"] == {"again": 1}
    record.check_writer(slot)
    now = last_owner(slot)
    assert before is not None and now is not None and now.version > before.version
