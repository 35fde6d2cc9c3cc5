"""The verbs of images as the agent has them: finding, reading, planning for VMs, events, refusals with names."""

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest

from tests import sanlock_fixture, storage_fixture
from vdsm import errors, ids, leases
from vdsm.storage.files import qemuimg
from vdsm.storage.rules import models
from vdsm.storage.steps import reading

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service = storage_fixture.Shelf, storage_fixture.Service

MIB = 1 << 20


def both(service: Service, shelf: Shelf) -> str:
    """A snapshot that is in both repositories."""
    snapshot = shelf.snapshot(shelf.disk())
    service.ended(service.storage.copy_image("other", snapshot)["job_id"])
    return snapshot


# -- finding ---------------------------------------------------------------------------------------------------------


def test_image_is_found_wherever_it_is(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    assert service.storage.plan_disk(disk, None, True).repo_id == "main"
    with pytest.raises(errors.NoSuchImage) as missing:
        service.storage.plan_disk(ids.new(), None, True)
    assert {"main", "other"} <= set(missing.value.facts["where"].split(", "))


@pytest.mark.parametrize("spoilt", [{"deleted": True}, {"status": "broken"}], ids=["deleted", "broken"])
def test_whole_copies_are_preferred(service: Service, shelf: Shelf, spoilt: dict[str, Any]) -> None:
    snapshot = both(service, shelf)
    shelf.change(snapshot, **spoilt)
    for _ in range(5):
        assert service.storage._connections.find(snapshot) == "other"


def test_search_is_narrowed_by_repositories_and_hints(service: Service, shelf: Shelf) -> None:
    snapshot, disk = both(service, shelf), shelf.disk()
    find = service.storage._connections.find
    for repo_id in ("main", "other"):
        assert find(snapshot, among=[repo_id]) == repo_id
        assert find(snapshot, hints={snapshot: repo_id}) == repo_id
    for narrow in ({"among": ["other"]}, {"hints": {disk: "other"}}):
        with pytest.raises(errors.NoSuchImage):
            find(disk, **narrow)
    with pytest.raises(errors.NoSuchImage):
        service.storage.copy_image("other", disk, options={"participating_repositories": ["other"]})
    with pytest.raises(errors.NoSuchRepository):
        find(disk, among=["nowhere"])


# -- reading ---------------------------------------------------------------------------------------------------------


def test_image_is_shown_without_what_it_is_based_on(service: Service, shelf: Shelf) -> None:
    disk = service.storage.create_virtual_disk("main", 3 * MIB, user_data={"a": [1, "ü"]})["image_id"]
    shown = service.storage.get_image("main", disk)
    assert {**shown, "created": 0, "stored_size": 0} == {
        **{"image_id": disk, "repo_id": "main", "kind": "disk", "status": "optimized", "size": 3 * MIB},
        **{"stored_size": 0, "generation": 1, "user_data": {"a": [1, "ü"]}, "created": 0},
    }
    assert 0 < shown["stored_size"] < MIB and shown["created"] > 0
    service.storage.create_snapshot("main", disk)
    shown = service.storage.list_images("main")
    assert [image["kind"] for image in shown].count("snapshot") == 1
    assert not any("base" in image for image in shown)


def test_status_of_a_finished_image(service: Service, shelf: Shelf) -> None:
    status = service.storage.get_image_status("main", shelf.disk())
    assert (status["status"], status["generation"], status["host_id"]) == ("optimized", 1, 1)
    assert (status["percent_complete"], status["last_error"], status["work"]["state"]) == (100, None, "done")


def test_owner_is_read_before_the_record(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that ends between the two reads must look finished, not interrupted (trap 22)."""
    target = shelf.begin_copy()["image_id"]
    real = leases.owners

    def owners(lease: leases.Lease) -> list[dict[str, int]]:
        found = real(lease)
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(leases, "owners", real)  # taking a lease may ask for owners too
            shelf.change(target, status="optimized", work={**shelf.image(target)["work"], "state": "done"})
        return found

    monkeypatch.setattr(leases, "owners", owners)
    answer = reading.status(shelf.repo, {"image_id": target})
    assert (answer["owners"], answer["record"]["work"]["state"]) == ([], "done")


def test_job_that_begins_between_the_reads_looks_alive(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody owned the image, then the record says running: the owner is asked again (trap 22)."""
    target = shelf.begin_copy()["image_id"]
    real, begun = leases.owners, leases.Session()

    def owners(lease: leases.Lease) -> list[dict[str, int]]:
        found = real(lease)
        if shelf.image(target)["work"]["state"] == "queued":
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(leases, "owners", real)  # taking a lease may ask for owners too
                begun.acquire([lease], 1)
                shelf.change(target, work={**shelf.image(target)["work"], "state": "running"})
        return found

    monkeypatch.setattr(leases, "owners", owners)
    with begun:
        answer = reading.status(shelf.repo, {"image_id": target})
    assert answer["record"]["work"]["state"] == "running"
    assert [owner["host_id"] for owner in answer["owners"]] == [1]


def test_lease_of_a_life_before_is_nobodys(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash of the host its name stays on storage; only sanlock knows that no process has the lease."""
    disk = shelf.disk()
    own, other = {"host_id": 1, "generation": 1}, {"host_id": 7, "generation": 3}
    monkeypatch.setattr(leases, "owners", lambda lease: [own, other])  # a crash of this host cannot be had here
    assert reading.status(shelf.repo, {"image_id": disk})["owners"] == [other]
    with leases.Session() as holder, holder.holding([shelf.repo.slot(disk).data_lease()], 1):
        assert reading.status(shelf.repo, {"image_id": disk})["owners"] == [own, other]


def test_reading_works_without_sanlock(shelf: Shelf, world: storage_fixture.World, tmp_path: Path) -> None:
    disk = shelf.disk()
    sanlock_fixture.use(tmp_path)
    try:
        assert reading.status(shelf.repo, {"image_id": disk})["owners"] is None
        assert reading.image(shelf.repo, {"image_id": disk})["id"] == disk
        assert reading.layers(shelf.repo, {"image_id": disk})["holder"] is None
    finally:
        sanlock_fixture.use(world.run_dir)


def test_missing_images(service: Service) -> None:
    missing = ids.new()
    for ask in (service.storage.get_image, service.storage.get_image_status, service.storage.remove_image):
        with pytest.raises(errors.NoSuchImage) as refused:
            ask("main", missing)
        assert refused.value.facts == {"image_id": missing, "where": "main"}
    with pytest.raises(errors.NoSuchImage):
        service.storage.set_image_user_data("main", missing, {})


@pytest.mark.parametrize(
    "options", [{"colour": "red"}, {"strategy": "luck"}, {"image_id": "../main"}, {"job_id": "x"}], ids=str
)
def test_wrong_options_are_refused(service: Service, shelf: Shelf, options: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidParameters):
        service.storage.create_virtual_disk("main", MIB, options=options)
    assert shelf.files() == set()


@pytest.mark.parametrize("bad", ["../repository", "..", "", "6d0fb0a1", "/etc/passwd", "a" * 5000])
def test_ids_do_not_lead_out_of_the_repository(service: Service, shelf: Shelf, bad: str) -> None:
    """They become names of files."""
    door = service.storage
    for act in (
        *(lambda: door.get_image("main", bad), lambda: door.get_image_status("main", bad)),
        *(lambda: door.remove_image("main", bad), lambda: door.copy_image("other", bad)),
        *(lambda: door.set_image_user_data("main", bad, {}), lambda: door.create_snapshot("main", bad)),
        *(lambda: door.create_virtual_disk("main", MIB, bad), lambda: door.plan_disk(bad, None, True)),
        *(lambda: door.read_vm("main", bad), lambda: door.ensure_vm("main", bad, {}), lambda: shelf.repo.slot(bad)),
        lambda: shelf.repo.data_path(bad),
    ):
        with pytest.raises(errors.InvalidParameters):
            act()
    assert shelf.files() == set()


def test_ids_are_the_same_in_capitals(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    assert service.storage.get_image("main", disk.upper())["image_id"] == disk


# -- events ----------------------------------------------------------------------------------------------------------


def test_every_change_is_told(service: Service, shelf: Shelf) -> None:
    begin = service.events.sequence
    disk = service.storage.create_virtual_disk("main", MIB)["image_id"]
    service.storage.set_image_user_data("main", disk, {"x": 1})
    snapshot = service.storage.create_snapshot("main", disk)["image_id"]
    copy = service.storage.copy_image("other", snapshot)
    service.ended(copy["job_id"])
    service.storage.remove_image("main", disk)
    happened, _ = service.events.since(service.events.instance_id, begin)
    told = [(event.subject, event.params["change"]) for event in happened if event.topic == "image"]
    assert told == [
        *((disk, "created"), (disk, "user_data"), (snapshot, "created"), (disk, "snapshot")),
        *((snapshot, "begun"), (snapshot, "done"), (disk, "removed")),
    ]


# -- many at once ----------------------------------------------------------------------------------------------------


def test_many_disks_are_made_at_once(service: Service, shelf: Shelf) -> None:
    """They meet at the repository lease, and wait for it."""
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: service.storage.create_virtual_disk("main", MIB)["image_id"], range(16)))
    assert len(set(made)) == len(service.storage.list_images("main")) == 16


def test_one_id_asked_for_many_times_at_once_is_one_disk(service: Service, shelf: Shelf) -> None:
    image_id = ids.new()

    def ask(_: int) -> str:
        try:
            service.storage.create_virtual_disk("main", MIB, options={"image_id": image_id})
        except (errors.ImageBusy, errors.ImageInUse) as busy:
            return busy.key
        return "made"

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(8)))
    assert "made" in answers
    assert shelf.image(image_id)["generation"] == 1 and len(shelf.files()) == 2


# -- for VMs ---------------------------------------------------------------------------------------------------------


def test_plan_of_a_writable_disk(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk(strategy="performance")
    lower, upper = shelf.snapshot(disk), shelf.snapshot(disk)

    plan = service.storage.plan_disk(disk, "main", True)

    images = [shelf.image(image_id) for image_id in (disk, upper, lower)]
    assert plan.path == str(shelf.data(disk))
    assert (plan.format, plan.size_bytes, plan.repo_name) == ("qcow2", MIB, shelf.repo.name)
    assert plan.backing == [
        {"path": str(shelf.data(upper)), "format": "qcow2", "size_bytes": MIB},
        {"path": str(shelf.data(lower)), "format": "raw", "size_bytes": MIB},
    ]
    assert [(lease.name, lease.shared) for lease in plan.leases] == [(disk, False), (upper, True), (lower, True)]
    for check, image in zip(plan.records, images, strict=True):
        assert check["slot"] == list(shelf.repo.slot(image["id"]))
        assert check["expect"] == {name: image[name] for name in ("status", "data", "base", "deleted")}
    with shelf.session.holding(plan.leases, 1):
        pass


def test_snapshots_are_for_reading_only(service: Service, shelf: Shelf) -> None:
    snapshot = shelf.snapshot(shelf.disk())
    assert [lease.shared for lease in service.storage.plan_disk(snapshot, "main", False).leases] == [True]
    with pytest.raises(errors.WrongKind):
        service.storage.plan_disk(snapshot, "main", True)


def test_removed_disk_has_no_plan(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    shelf.change(disk, deleted=True)
    with pytest.raises(errors.NoSuchImage):
        service.storage.plan_disk(disk, "main", True)


def test_held_disk_is_refused_with_its_holder(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    with leases.Session() as holder, holder.holding([shelf.repo.slot(disk).data_lease()], 1):
        with pytest.raises(errors.ImageInUse, match="process"):
            service.storage.plan_disk(disk, "main", True)
        service.storage.set_holder_lookup(lambda image_id: "VM web")
        with pytest.raises(errors.ImageInUse, match="VM web"):
            service.storage.plan_disk(disk, "main", True)
        service.storage.set_holder_lookup(lambda image_id: None)


def test_half_made_snapshot_is_finished_before_a_start(service: Service, shelf: Shelf) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    shelf.write(disk, 4)

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(qemuimg, "run")
            Shelf(shelf.repo, session).snapshot(disk, image_id=snapshot)

    storage_fixture.killed(act)
    plan = service.storage.plan_disk(disk, "main", True)
    assert [lease.name for lease in plan.leases] == [disk, snapshot]
    shelf.shows(disk, 4)


# -- records of VMs --------------------------------------------------------------------------------------------------


def test_vm_record_is_made_once_and_changed(service: Service, shelf: Shelf) -> None:
    vm_id = ids.new()
    with pytest.raises(errors.NoRecord):
        service.storage.read_vm("main", vm_id)
    with pytest.raises(errors.NoRecord):
        service.storage.finish_vm("main", vm_id, {"exit_code": 1})
    disks = [{"repo": shelf.repo.name, "image_id": ids.new()}]
    made = service.storage.ensure_vm("main", vm_id, {"name": "web", "disks": disks})
    assert made["slot"] == list(shelf.repo.vm_slot(vm_id))
    assert (made["record"]["kind"], made["record"]["name"], made["record"]["disks"]) == ("vm", "web", disks)
    assert made["record"]["generation"] == 0 and made["record"]["work"] is None
    again = service.storage.ensure_vm("main", vm_id, {"name": "other"})
    assert again == made, "an existing record is left alone"
    changed = service.storage.finish_vm("main", vm_id, {"exit_code": 0, "last_host": "h"})
    assert service.storage.read_vm("main", vm_id) == changed
    assert (changed["exit_code"], changed["last_host"], changed["name"]) == (0, "h", "web")
    assert service.storage.find_vm(vm_id, None) == "main"
    with pytest.raises(errors.NoSuchVm):
        service.storage.find_vm(ids.new(), None)


def test_record_of_a_running_vm_is_changed_under_its_record_lease(service: Service, shelf: Shelf) -> None:
    vm_id = ids.new()
    service.storage.ensure_vm("main", vm_id, {"name": "web"})
    with leases.Session() as qemu, qemu.holding([shelf.repo.vm_slot(vm_id).data_lease()], 1):
        assert service.storage.finish_vm("main", vm_id, {"exit_code": 3})["exit_code"] == 3


def test_vm_slot_that_died_is_taken_over(service: Service, shelf: Shelf) -> None:
    vm_id = ids.new()
    shelf.repo.allocate_vm(shelf.session, vm_id)
    assert shelf.repo.vms() == {}
    assert service.storage.ensure_vm("main", vm_id, {"name": "web"})["record"]["name"] == "web"


def test_vm_is_claimed_by_one_job(service: Service, shelf: Shelf) -> None:
    vm_id, job_id = ids.new(), ids.new()
    service.storage.ensure_vm("main", vm_id, {"name": "web"})
    asked = {"job_id": job_id, "kind": "sysprep", "generation": 0, "names": {}}
    assert service.storage.claim_vm("main", vm_id, **asked) == list(shelf.repo.vm_slot(vm_id))
    assert service.storage.read_vm("main", vm_id)["work"]["state"] == "queued"
    with pytest.raises(errors.VmRuns, match=job_id):
        service.storage.claim_vm("main", vm_id, **{**asked, "job_id": ids.new()})
    service.storage.unclaim_vm("main", vm_id, job_id)
    with pytest.raises(errors.GenerationMismatch):
        service.storage.claim_vm("main", vm_id, **{**asked, "generation": 4})
    lease = shelf.repo.vm_slot(vm_id).data_lease()
    with leases.Session() as qemu, qemu.holding([lease], 1), pytest.raises(errors.VmRuns):
        service.storage.claim_vm("main", vm_id, **asked)


def test_user_data_is_limited_before_anything_is_done(service: Service, shelf: Shelf) -> None:
    large = {"x": "y" * models.MAX_USER_DATA_BYTES}
    for act in (
        lambda: service.storage.create_virtual_disk("main", MIB, user_data=large),
        lambda: service.storage.create_snapshot("main", ids.new(), large),
        lambda: service.storage.copy_image("main", ids.new(), large),
        lambda: service.storage.import_image("main", "/x", "raw", large),
    ):
        with pytest.raises(errors.InvalidParameters):
            act()
    assert shelf.files() == set()
