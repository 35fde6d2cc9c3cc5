"""Fixes of what VM jobs leave, of what waits in another host's queue, and of what is half there: from the records."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import errors, ids, leased_exec, leases, record
from vdsm.storage import repository
from vdsm.storage.bodies import copying, overlays
from vdsm.storage.files import imageheader
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import chain, findings, models
from vdsm.storage.steps import checking, fences, fixclaims, intents, vmclaims, vmrecords

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service = storage_fixture.Shelf, storage_fixture.Service

ANOTHER_BOOT = {"host_id": 1, "boot_id": ids.new()}  # of this host: its work is known to be dead


def check(service: Service, repo_id: str = "main") -> dict[str, list[dict[str, Any]]]:
    """The fixes by image or VM."""
    found: dict[str, list[dict[str, Any]]] = {}
    for fix in service.storage.check_storage_repository(repo_id):
        found.setdefault(fix["image_id"] or fix["vm_id"], []).append(fix)
    return found


def fix_all(service: Service, repo_id: str = "main") -> None:
    """Checks and fixes until nothing is found; fails when that does not end."""
    for _ in range(5):
        found = service.storage.check_storage_repository(repo_id)
        if not found:
            return
        for fix in found:
            try:
                job_id = service.storage.fix_storage_repository(repo_id, fix)["job_id"]
            except errors.FixOutdated:  # one before it has changed what it is about
                continue
            if job_id:
                service.ended(job_id)
    raise AssertionError(found)


# -- VMs ---------------------------------------------------------------------------------------------------------------


class Machine:
    """A VM that runs nowhere, whose job died."""

    def __init__(self, shelf: Shelf, repo_name: str, disk: str, kind: str) -> None:
        self.shelf = shelf
        self.id = ids.new()
        self.where = {"repo": shelf.repo.name, "id": self.id}
        self.work = {**models.work(kind, 1, {}, job_id=ids.new()), "state": "running", **ANOTHER_BOOT}
        fields = {"name": "web", "disks": [{"repo": repo_name, "image_id": disk}]}
        vmrecords.ensure_vm(shelf.repo, shelf.session, {"vm_id": self.id, "fields": fields})

    def stands(self, names: dict[str, Any], **work: Any) -> None:
        changes = {"work": {**self.work, "names": names, **work}}
        vmrecords.change_vm(self.shelf.repo, self.shelf.session, {"vm_id": self.id, "changes": changes})

    @property
    def record(self) -> record.Record:
        found = self.shelf.repo.find_vm(self.id)
        assert found is not None
        return found


@pytest.fixture(params=["main", "other"])
def place(request: pytest.FixtureRequest, shelf: Shelf, world: storage_fixture.World) -> Shelf:
    """Where the VM's disk is; its record is in "main"."""
    return Shelf(getattr(world, request.param), shelf.session)


def sysprepped(vm: Machine, place: Shelf, disk: str, change: overlays.Change, *, committed: bool) -> None:
    """The VM's host died around the commit point: all is claimed, and no lease held."""
    with place.session.holding([place.repo.slot(disk).data_lease()], 1):
        overlays.begin(place.repo, place.session, disk, change, vm.work, vm.where)
        storage_fixture.qemu_io(Path(place.repo.data_path(change["data"])), "qcow2", "write -P 9 0 65536")
        overlays.claim(place.repo, place.session, disk, change, vm.work, vm.where)
        place.session.release([place.repo.slot(change["hidden"]).data_lease()])
    place.change(disk, work={**place.image(disk)["work"], **ANOTHER_BOOT})
    done = {"state": "committing", "committed": True} if committed else {}
    vm.stands({"disks": {disk: change}, "repos": {disk: place.repo.name}}, **done)


@pytest.mark.parametrize("committed", [False, True], ids=["taken back", "finished"])
def test_sysprep_that_died(service: Service, shelf: Shelf, place: Shelf, committed: bool) -> None:
    disk = place.disk()
    place.write(disk, 1)
    vm, change = Machine(shelf, place.repo.name, disk, "sysprep"), overlays.plan(disk)
    sysprepped(vm, place, disk, change, committed=committed)
    for repo_id in ("main", "other"):
        assert check(service, repo_id).keys() == ({vm.id} if repo_id == "main" else set()), "only as a whole"
    (fix,) = check(service)[vm.id]
    assert (fix["type"], fix["image_id"]) == ("mend", None)

    job_id = service.storage.fix_storage_repository("main", fix)["job_id"]
    service.ended(job_id)

    place.shows(disk, 9 if committed else 1)
    image = place.image(disk)
    assert image["base"] == (change["hidden"] if committed else None)
    assert vm.record["work"]["state"] == "done" and not chain.counts(vm.record)
    assert vm.record["work"]["kind"] == ("sysprep" if committed else "mendVm")
    assert service.storage.fix_storage_repository("main", fix) == {"job_id": None}
    for repo_id in ("main", "other"):
        fix_all(service, repo_id)  # a finished one leaves its hidden snapshot to be merged
    place.shows(disk, 9 if committed else 1)
    assert place.image(disk)["base"] is None and len(place.repo.data_names()) == 1


@pytest.mark.parametrize("fate", ["removed", "in use"])
def test_sysprep_is_finished_for_the_disks_that_await_it(
    service: Service, shelf: Shelf, place: Shelf, fate: str
) -> None:
    """One was switched before the host died: it is its user's again, who may run on it, or has removed it."""
    done, waiting = place.disk(), place.disk()
    vm, changes = Machine(shelf, place.repo.name, done, "sysprep"), {}
    for disk in (done, waiting):
        place.write(disk, 1)
        changes[disk] = overlays.plan(disk)
        sysprepped(vm, place, disk, changes[disk], committed=True)
    vm.stands({"disks": changes, "repos": dict.fromkeys(changes, place.repo.name)}, state="committing", committed=True)
    with place.session.holding([place.repo.slot(done).data_lease()], 1):
        overlays.commit(place.repo, place.session, done, changes[done])
    using = [done] if fate == "in use" else []
    if fate == "removed":
        assert done in place.remove(done)
    with place.repo.owning(place.session, exclusive=using):
        (fix,) = check(service)[vm.id]
        service.ended(service.storage.fix_storage_repository("main", fix)["job_id"])

    place.shows(waiting, 9)
    assert vm.record["work"]["state"] == "done" and not chain.counts(vm.record)
    for repo_id in ("main", "other"):
        fix_all(service, repo_id)
    place.shows(waiting, 9)
    left = {waiting} if fate == "removed" else {done, waiting}
    assert set(place.repo.image_ids()) == {models.maker(name) for name in place.repo.data_names()} == left


def test_disk_of_a_committed_sysprep_is_nobody_elses(service: Service, shelf: Shelf, place: Shelf) -> None:
    """What another VM wrote there would be hidden when the sysprep is finished, whenever that is (trap 39)."""
    disk = place.disk()
    place.write(disk, 1)
    repo_id = place.repo.repo_id
    vm, change = Machine(shelf, place.repo.name, disk, "sysprep"), overlays.plan(disk)
    planned = service.storage.plan_disk(disk, repo_id, writable=True)
    sysprepped(vm, place, disk, change, committed=True)

    with pytest.raises(errors.ImageBusy) as refused:
        leased_exec._check(planned.records[0])
    assert refused.value.facts["job_id"] == vm.work["job_id"]
    storage = service.storage
    for use in (
        lambda: storage.plan_disk(disk, repo_id, writable=True),
        lambda: storage.plan_disk(disk, repo_id, writable=False),
        lambda: storage.create_snapshot(repo_id, disk, {}),
        lambda: storage.resize_virtual_disk(repo_id, disk, 2 << 20),
        lambda: storage.copy_image("main", disk),
        lambda: storage.remove_image(repo_id, disk),
    ):
        with pytest.raises(errors.ImageBusy):
            use()
    fence = {"lease_id": disk, "generation": None, "job_id": None}
    with pytest.raises(errors.WorkCommitted):
        fences.fence(place.repo, place.session, fence)
    assert service.storage.get_image_status(repo_id, disk)["verdict"]["state"] == "interrupted"
    place.shows(disk, 1)

    (fix,) = check(service)[vm.id]
    service.ended(service.storage.fix_storage_repository("main", fix)["job_id"])
    plan = service.storage.plan_disk(disk, repo_id, writable=True)
    assert Path(plan.path).name == change["data"]
    for checked in plan.records:
        leased_exec._check(checked)
    status = service.storage.get_image_status(repo_id, disk)
    assert (status["verdict"]["state"], status["work"]["job_id"]) == ("done", vm.work["job_id"])
    place.shows(disk, 9)


def test_claim_that_its_vm_has_forgotten_is_ended(service: Service, shelf: Shelf, place: Shelf) -> None:
    """As when taking it back failed. One that the VM's record speaks of is not ended, whoever asks for it."""
    disk = place.disk()
    place.write(disk, 1)
    repo_id = place.repo.repo_id
    vm, change = Machine(shelf, place.repo.name, disk, "sysprep"), overlays.plan(disk)
    sysprepped(vm, place, disk, change, committed=True)
    named = vm.record["work"]["names"]
    vm.stands({}, state="failed")
    (fix,) = check(service, repo_id)[disk]
    assert fix["type"] == "mend" and change["hidden"] not in check(service, repo_id)
    vm.stands(named, state="committing", committed=True)
    assert disk not in check(service, repo_id)
    with pytest.raises((errors.FixOutdated, errors.ImageBusy)):
        service.storage.fix_storage_repository(repo_id, fix)
    assert chain.claim(place.image(disk)) is not None
    vm.stands({}, state="failed")
    fix_all(service, repo_id)
    models.check_usable(place.image(disk))
    place.shows(disk, 1)
    assert place.files() >= {f"images/{disk}"} and place.repo.find(change["hidden"]) is None


@pytest.mark.parametrize("committed", [False, True], ids=["taken back", "finished"])
def test_template_making_that_died(service: Service, shelf: Shelf, place: Shelf, committed: bool) -> None:
    disk = shelf.disk()
    vm = Machine(shelf, shelf.repo.name, disk, "makeTemplate")
    fields = copying.snapshot_fields(shelf.image(disk), {"id": ids.new(), "user_data": {}}, "space")
    image = copying.begin(place.repo, shelf.session, fields, vm.work, vm.where)
    with place.repo.making(image["data"]["name"], 1) as path:
        Path(path).write_bytes(shelf.data(disk).read_bytes())
    shelf.session.release([place.repo.slot(image["id"]).data_lease()])
    done = {"state": "committing", "committed": True} if committed else {}
    vm.stands({"images": {image["id"]: image["data"]["name"]}, "repo": place.repo.name}, **done)

    (fix,) = check(service)[vm.id]
    service.ended(service.storage.fix_storage_repository("main", fix)["job_id"])

    if committed:
        assert place.image(image["id"])["status"] == "optimized"
    else:
        assert place.repo.find(image["id"]) is None and image["data"]["name"] not in place.repo.data_names()
    assert check(service) == check(service, "other") == {}


@pytest.mark.parametrize("died", [False, True], ids=["gone", "half gone"])
def test_template_of_which_an_image_was_removed_is_finished(service: Service, shelf: Shelf, died: bool) -> None:
    """One whose data is gone must not look whole again: a copy of that snapshot would undelete it (trap 38)."""
    disk = shelf.disk()
    vm, names = Machine(shelf, shelf.repo.name, disk, "makeTemplate"), {}
    for _ in range(2):
        fields = copying.snapshot_fields(shelf.image(disk), {"id": ids.new(), "user_data": {}}, "space")
        image = copying.begin(shelf.repo, shelf.session, fields, vm.work, vm.where)
        names[image["id"]] = image["data"]["name"]
        with shelf.repo.making(image["data"]["name"], 1) as path:
            Path(path).write_bytes(shelf.data(disk).read_bytes())
        shelf.session.release([shelf.repo.slot(image["id"]).data_lease()])
    vm.stands({"images": names, "repo": shelf.repo.name}, state="committing", committed=True)
    removed, kept = names

    def remove() -> None:
        with leases.Session() as session:
            if died:
                storage_fixture.dies_before(filelayout.FileLayout, "free")
            Shelf(shelf.repo, session).remove(removed)

    storage_fixture.killed(remove) if died else remove()

    (fix,) = check(service)[vm.id]
    service.ended(service.storage.fix_storage_repository("main", fix)["job_id"])

    left = shelf.repo.find(removed)
    assert left is None or (left["status"], left["deleted"]) == ("broken", True)
    assert shelf.image(kept)["status"] == "optimized" and not chain.counts(vm.record)
    fix_all(service)
    assert set(shelf.repo.image_ids()) == {models.maker(name) for name in shelf.repo.data_names()} == {disk, kept}


@pytest.mark.parametrize("state", ["failed", "aborted", "fenced", "interrupted"])
def test_committed_work_claims_its_vm_until_it_is_done(shelf: Shelf, state: str) -> None:
    """However the mend of it ended: what a guest would write now would be gone with the next one."""
    vm = Machine(shelf, shelf.repo.name, shelf.disk(), "sysprep")
    vm.stands({}, state=state, committed=True)
    slot = shelf.repo.vm_slot(vm.id)
    asked = {"active": [], "takeover": False}
    assert [found["fix"] for found in checking.check(shelf.repo, asked)] == ["mendVm"]
    with pytest.raises(errors.ImageBusy):
        leased_exec._check({"slot": list(slot), "expect": {}})
    claim = {"vm_id": vm.id, "job_id": ids.new(), "kind": "sysprep", "generation": None, "names": {}}
    with pytest.raises(errors.VmRuns):
        vmclaims.claim_vm(shelf.repo, shelf.session, claim)
    vm.stands({}, state="done", committed=True)
    assert checking.check(shelf.repo, asked) == []
    leased_exec._check({"slot": list(slot), "expect": {}})


def test_overlay_is_left_to_its_vm_in_another_repository(
    service: Service, shelf: Shelf, world: storage_fixture.World
) -> None:
    """That the VM's record has forgotten it must be seen, and is looked at again when it is cleaned."""
    place = Shelf(world.other, shelf.session)
    disk = place.disk()
    vm, change = Machine(shelf, place.repo.name, disk, "sysprep"), overlays.plan(disk)
    with shelf.session.holding([place.repo.slot(disk).data_lease()], 1):
        overlays.begin(place.repo, shelf.session, disk, change, vm.work, vm.where)
        shelf.session.release([place.repo.slot(change["hidden"]).data_lease()])
    vm.stands({}, state="failed")
    (fix,) = check(service, "other")[change["hidden"]]
    assert fix["type"] == "clean"
    vm.stands({"disks": {disk: change}}, state="committing", committed=True)
    assert check(service, "other") == {}
    job_id = service.storage.fix_storage_repository("other", fix)["job_id"]
    assert service.ended(job_id, "failed")["error"]["data"]["key"] == "fix_outdated"
    vm.stands({}, state="failed")
    fix_all(service, "other")
    assert place.files() == {f"images/{disk}", f"data/{place.image(disk)['data']['name']}"}


# -- whose work it is (trap 24) ----------------------------------------------------------------------------------------


@pytest.fixture
def queued(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy in the queue of host 2, which lives. There is no second host here, so sanlock is made to say so."""
    target = str(shelf.begin_copy()["image_id"])
    work = {**shelf.image(target)["work"], "host_id": 2, "boot_id": ids.new(), "host_generation": 1}
    shelf.change(target, work=work)
    monkeypatch.setattr(leases, "hosts", lambda name: {2: leases.Host("live", 1)})
    return target


def test_work_in_another_hosts_queue_is_taken_only_on_request(shelf: Shelf, queued: str) -> None:
    assert checking.check(shelf.repo, {"active": [], "takeover": False}) == []
    (found,) = checking.check(shelf.repo, {"active": [], "takeover": True})
    assert (found["type"], found["fix"]) == ("mend", "copyImage")

    asked = {**{name: found[name] for name in ("fix", "entity", "guard")}, "job_id": ids.new(), "active": []}
    with pytest.raises(errors.ImageBusy):
        fixclaims.begin_fix(shelf.repo, shelf.session, {**asked, "takeover": False})
    fixclaims.begin_fix(shelf.repo, shelf.session, {**asked, "takeover": True})
    work = shelf.image(queued)["work"]
    assert (work["job_id"], work["host_id"], work["state"]) == (asked["job_id"], 1, "queued")


def test_queue_of_a_host_that_has_gone_is_nobodys(shelf: Shelf, queued: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "hosts", lambda name: {2: leases.Host("dead", 1)})
    (found,) = checking.check(shelf.repo, {"active": [], "takeover": False})
    assert found["entity"] == queued


def test_work_of_this_agents_jobs_is_not_found(shelf: Shelf) -> None:
    target = str(shelf.begin_copy()["image_id"])
    job_id = shelf.image(target)["work"]["job_id"]
    assert checking.check(shelf.repo, {"active": [job_id], "takeover": False}) == []
    (found,) = checking.check(shelf.repo, {"active": [], "takeover": False})
    assert found["entity"] == target


# -- what is half there ------------------------------------------------------------------------------------------------


def test_data_is_listed_before_the_records_are_read(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data whose record comes a moment later is no orphan (trap 37)."""
    listed = shelf.repo.data_names

    def then_made() -> list[str]:
        names = listed()
        shelf.disk()
        return names

    monkeypatch.setattr(shelf.repo, "data_names", then_made)
    assert checking.check(shelf.repo, {"active": [], "takeover": False}) == []


def test_slot_whose_maker_holds_it_is_not_found(service: Service, shelf: Shelf) -> None:
    image_id = ids.new()
    shelf.repo.allocate(shelf.session, image_id)
    with shelf.repo.owning(shelf.session, exclusive=[image_id]):
        assert check(service) == {}
    (fix,) = check(service)[image_id]
    assert fix["type"] == "clean"
    fix_all(service)
    assert shelf.files() == set()


@pytest.mark.parametrize("length", [0, None], ids=["just begun", "with its leases"])
def test_slot_of_a_vm_without_a_record_is_cleaned(service: Service, shelf: Shelf, length: int | None) -> None:
    vm_id = ids.new()
    shelf.repo.allocate_vm(shelf.session, vm_id)
    if length is not None:
        os.truncate(shelf.repo.vm_slot(vm_id).path, length)
    (fix,) = check(service)[vm_id]
    assert (fix["type"], fix["vm_id"]) == ("clean", vm_id)
    fix_all(service)
    assert shelf.files() == set()


def test_snapshot_that_was_never_begun_is_cleaned_and_its_disk_left_alone(service: Service, shelf: Shelf) -> None:
    disk, snapshot = shelf.disk(), ids.new()
    before = shelf.image(disk)

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(repository.Repository, "update")
            Shelf(shelf.repo, session).snapshot(disk, image_id=snapshot)

    storage_fixture.killed(act)
    (fix,) = check(service)[snapshot]
    assert (fix["type"], fix["freed_bytes"]) == ("clean", 0)
    fix_all(service)
    assert shelf.repo.find(snapshot) is None and shelf.image(disk) == before
    shelf.data(disk).stat()


def test_snapshot_whose_fix_failed_is_kept_for_its_disk(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    shelf.write(disk, 5)
    snapshot = shelf.snapshot(disk, auto_fix=False)
    for state in ("wanted", "failed", "interrupted", "aborted"):
        shelf.change(disk, work={**shelf.image(disk)["work"], "state": state})
        assert [fix["fix"] for fix in checking.check(shelf.repo, {"active": [], "takeover": False})] == [
            "createSnapshot"
        ]
        assert chain.dependents(snapshot, shelf.repo.images().values()) == [disk]
    fix_all(service)
    shelf.shows(disk, 5)
    assert shelf.image(disk)["base"] == snapshot


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", "aborted", "fenced", "wanted"])
def test_broken_image_of_unknown_work_is_told_and_can_be_removed(service: Service, shelf: Shelf, state: str) -> None:
    """Of another version of the agent, or of a kind that somebody has added: nobody here knows how to finish it."""
    disk = shelf.disk()
    work = {**models.work("encryptImage", 1, {"key": "a"}, job_id=ids.new()), "state": state, **ANOTHER_BOOT}
    shelf.change(disk, status=models.BROKEN, work=work)
    before = shelf.image(disk)
    (fix,) = check(service)[disk]
    assert fix["type"] == "mend" and "encryptImage" in fix["obstacle"] and "removeImage" in fix["description"]
    with pytest.raises(errors.CannotMend):
        service.storage.fix_storage_repository("main", fix)
    assert shelf.image(disk) == before

    service.storage.remove_image("main", disk)
    assert shelf.files() == set() and check(service) == {}


def test_copy_whose_source_is_not_connected_can_be_mended_once_it_is(service: Service, shelf: Shelf) -> None:
    copy = str(shelf.begin_copy(source={"repo": ids.new(), "image_id": ids.new()})["image_id"])
    shelf.change(copy, work={**shelf.image(copy)["work"], "state": "failed"})
    (fix,) = check(service)[copy]
    assert "connected" in fix["obstacle"] and "removeImage" not in fix["description"]
    with pytest.raises(errors.NoSuchRepository):
        service.storage.fix_storage_repository("main", fix)


def test_cleaning_that_died_is_found(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()

    def act() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(filelayout.FileLayout, "remove_data")
            Shelf(shelf.repo, session).remove(disk)

    storage_fixture.killed(act)
    assert [fix["type"] for fix in check(service)[disk]] == ["clean"]
    fix_all(service)
    assert shelf.files() == set()


def test_dead_work_on_a_whole_image_is_ended(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    shelf.change(disk, work={**models.work("something", 1, {}, job_id=ids.new()), "state": "running", **ANOTHER_BOOT})
    (fix,) = check(service)[disk]
    assert fix["type"] == "mend"
    fix_all(service)
    models.check_usable(shelf.image(disk))


def test_data_that_only_ended_work_names_is_cleaned(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    left = models.data_name(disk)
    with shelf.repo.making(left, 1):
        pass
    for state, found in (("interrupted", False), ("failed", True)):
        work = {**models.work("optimizeImage", 1, {"data": left}, job_id=ids.new()), "state": state, **ANOTHER_BOOT}
        shelf.change(disk, work=work)
        kinds = {fix["type"] for fix in check(service)[disk]}
        assert ("clean" in kinds) == found
    fix_all(service)
    assert shelf.repo.data_names() == [shelf.image(disk)["data"]["name"]]


def test_two_on_a_deleted_image_are_not_merged_with_it(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    clone = shelf.disk(0, base=snapshot)
    shelf.remove(snapshot)
    assert check(service) == {}
    shelf.remove(clone)
    assert [fix["fix"] for fix in checking.check(shelf.repo, {"active": [], "takeover": False})] == ["mergeImage"]


def test_findings_are_the_same_each_time(shelf: Shelf) -> None:
    for _ in range(3):
        shelf.disk(auto_fix=False)
    asked = {"active": [], "takeover": False}
    found = checking.check(shelf.repo, asked)
    assert found == checking.check(shelf.repo, asked) and len(found) == 3
    assert {one["type"] for one in found} == {findings.MEND}


def test_header_that_names_something_else_is_written_anew(service: Service, shelf: Shelf) -> None:
    """As those above a merged image do when the merge died last of all (trap 42)."""
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    relinked = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", str(shelf.data(disk))]
    subprocess.run(relinked, check=True)
    (fix,) = check(service)[disk]
    assert fix["type"] == "mend"
    with shelf.repo.owning(shelf.session, exclusive=[disk]), pytest.raises(errors.ImageInUse):
        service.storage.fix_storage_repository("main", fix)
    fix_all(service)
    header = imageheader.read(str(shelf.data(disk)))
    assert (header.backing_name, header.backing_format) == (shelf.image(snapshot)["data"]["name"], "qcow2")


def test_relinking_that_died_is_no_snapshot_to_be_finished(shelf: Shelf) -> None:
    """What ended work has named stays in the record: going on with that would empty the disk's data."""
    disk = shelf.disk()
    snapshot = shelf.snapshot(disk)
    shelf.write(disk, 5)
    data = shelf.image(disk)["data"]["name"]
    mended = {**shelf.image(disk)["work"], "job_id": ids.new(), "names": {"snapshot": snapshot, "data": data}}
    shelf.change(disk, work=mended)
    below = ["-b", shelf.data(snapshot).name, "-F", "raw"]  # its format is qcow2
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", *below, str(shelf.data(disk))], check=True)
    asked = {"active": [], "takeover": False}
    (found,) = checking.check(shelf.repo, asked)
    wanted = {name: found[name] for name in ("fix", "entity", "guard")}
    fixclaims.begin_fix(shelf.repo, shelf.session, {**asked, **wanted, "job_id": ids.new()})
    shelf.change(disk, work={**shelf.image(disk)["work"], **ANOTHER_BOOT, "state": "interrupted"})
    assert not chain.is_unfinished(shelf.image(disk))
    intents.roll_forward(shelf.repo, shelf.session, {"image_id": disk})
    shelf.shows(disk, 5)
    (found,) = checking.check(shelf.repo, asked)
    assert found["fix"] == findings.END_WORK
