"""copyImage and importImage as jobs: content, formats, chains, failures, aborts, deaths of the worker."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from tests.until import until
from vdsm import errors, ids, leases, record
from vdsm.jobs import job
from vdsm.storage import holders
from vdsm.storage.bodies import copying, importing
from vdsm.storage.files import hostfiles
from vdsm.storage.rules import models
from vdsm.storage.steps import reading

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service = storage_fixture.Shelf, storage_fixture.Service

MIB = 1 << 20


def on(shelf: Shelf, world: storage_fixture.World) -> Shelf:
    """The same words for the other repository."""
    return Shelf(world.other, shelf.session)


def identical(one: tuple[Path, str], two: tuple[Path, str]) -> bool:
    compare = ["qemu-img", "compare", "-f", one[1], "-F", two[1], str(one[0]), str(two[0])]
    return subprocess.run(compare, capture_output=True, check=False).returncode == 0


def file_of(shelf: Shelf, image_id: str) -> tuple[Path, str]:
    return shelf.data(image_id), shelf.image(image_id)["data"]["format"]


@pytest.mark.parametrize(("strategy", "expected"), [("space", "qcow2"), ("performance", "raw")])
@pytest.mark.parametrize("source", ["space", "performance"])
def test_disk_is_copied_whole(
    service: Service, shelf: Shelf, world: storage_fixture.World, strategy: str, expected: str, source: str
) -> None:
    disk = shelf.disk(8 * MIB, strategy=source)
    shelf.write(disk, 1, 0, MIB)
    shelf.write(disk, 2, 7 * MIB, MIB)
    before = shelf.image(disk)

    copy = service.storage.copy_image("other", disk, {"is": "mine"}, {"strategy": strategy})
    info = service.ended(copy["job_id"])

    target = on(shelf, world)
    image = target.image(copy["image_id"])
    assert copy["image_id"] != disk
    assert (image["kind"], image["status"], image["generation"]) == ("disk", "optimized", 1)
    assert (image["data"]["format"], image["base"], image["user_data"]) == (expected, None, {"is": "mine"})
    assert image["work"]["state"] == "done" and image["work"]["job_id"] == copy["job_id"]
    assert (info["progress"], info["stage_name"], info["stages"]) == (100, "copy", 2)
    assert target.data(copy["image_id"]).stat().st_mode & 0o777 == 0o660
    for pattern, offset in ((1, 0), (0, MIB), (2, 7 * MIB)):
        target.shows(copy["image_id"], pattern, offset, MIB)
    assert shelf.image(disk) == before


def test_chain_becomes_one_image(service: Service, shelf: Shelf, world: storage_fixture.World) -> None:
    disk = shelf.disk(4 * MIB, strategy="performance")
    for pattern in (1, 2, 3):
        shelf.write(disk, pattern, pattern * MIB, MIB)
        shelf.snapshot(disk)
    shelf.write(disk, 4, 0, MIB)
    copy = service.storage.copy_image("other", disk)
    service.ended(copy["job_id"])
    for pattern, offset in ((4, 0), (1, MIB), (2, 2 * MIB), (3, 3 * MIB)):
        on(shelf, world).shows(copy["image_id"], pattern, offset, MIB)
    assert len(on(shelf, world).files()) == 2


def test_headers_are_not_asked_what_lies_below(service: Service, shelf: Shelf, world: storage_fixture.World) -> None:
    """Records rule (trap 42): the overlay's header names a stranger's file, the copy holds what the record says."""
    disk = shelf.disk()
    shelf.write(disk, 1)
    shelf.snapshot(disk)
    stranger = world.directory / "stranger"
    stranger.write_bytes(b"\xee" * MIB)
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(stranger), "-F", "raw", str(shelf.data(disk))]
    subprocess.run(rebase, check=True)
    shelf.shows(disk, 0xEE)

    copy = service.storage.copy_image("other", disk)
    service.ended(copy["job_id"])

    on(shelf, world).shows(copy["image_id"], 1)
    stranger.unlink()


def test_raw_data_that_looks_like_an_image_is_copied_as_it_is(
    service: Service, shelf: Shelf, world: storage_fixture.World
) -> None:
    disk = shelf.disk(strategy="performance")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw",
                    str(world.directory / "bait"), "1M"], check=True)  # fmt: skip
    bait = (world.directory / "bait").read_bytes()
    with shelf.data(disk).open("r+b") as guest:
        guest.write(bait[:65536])
    copy = service.storage.copy_image("other", disk, options={"strategy": "performance"})
    service.ended(copy["job_id"])
    assert on(shelf, world).data(copy["image_id"]).read_bytes() == shelf.data(disk).read_bytes()


def test_snapshot_keeps_its_id_and_is_copied_once(service: Service, shelf: Shelf, world: storage_fixture.World) -> None:
    snapshot = shelf.snapshot(shelf.disk())
    first = service.storage.copy_image("other", snapshot)
    assert first["image_id"] == snapshot
    service.ended(first["job_id"])
    made = on(shelf, world).image(snapshot)
    assert (made["kind"], made["work"]["state"], made["work"]["names"]) == ("snapshot", "done", {})
    assert service.storage.copy_image("other", snapshot) == {"image_id": snapshot, "job_id": None}
    assert service.storage.copy_image("main", snapshot) == {"image_id": snapshot, "job_id": None}
    with pytest.raises(errors.InvalidParameters):
        service.storage.copy_image("other", snapshot, options={"image_id": ids.new()})


def test_same_request_again_is_the_same_copy(service: Service, shelf: Shelf, world: storage_fixture.World) -> None:
    disk = shelf.disk()
    chosen = {"image_id": ids.new(), "job_id": ids.new()}
    first = service.storage.copy_image("other", disk, options=chosen)
    again = service.storage.copy_image("other", disk, options=chosen)
    assert first == chosen
    assert again["image_id"] == chosen["image_id"] and again["job_id"] in (chosen["job_id"], None)
    service.ended(chosen["job_id"])
    before = on(shelf, world).image(chosen["image_id"])
    assert service.storage.copy_image("other", disk, options=chosen) == {**chosen, "job_id": None}
    assert on(shelf, world).image(chosen["image_id"]) == before
    with pytest.raises(errors.ImageExists):
        service.storage.copy_image("other", disk, {"another": "request"}, chosen)


def test_source_in_use_is_refused_with_nothing_begun(
    service: Service, shelf: Shelf, world: storage_fixture.World
) -> None:
    disk = shelf.disk()
    with leases.Session() as vm, vm.holding([shelf.repo.slot(disk).data_lease()], 1):
        service.storage.set_holder_lookup(lambda image_id: "VM web (4711)" if image_id == disk else None)
        with pytest.raises(errors.ImageInUse) as refused:
            service.storage.copy_image("other", disk)
        service.storage.set_holder_lookup(lambda image_id: None)
    assert refused.value.facts["holder"] == "VM web (4711)"
    assert on(shelf, world).files() == set()


def test_generation_of_the_source_is_checked(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk()
    with pytest.raises(errors.GenerationMismatch):
        service.storage.copy_image("other", disk, options={"generation": 8})


# -- while it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def large(shelf: Shelf) -> str:
    """A disk whose copy takes long enough to be met on the way."""
    disk = shelf.disk(192 * MIB, strategy="performance")
    with shelf.data(disk).open("r+b") as guest:
        for _ in range(192):
            guest.write(b"\x5a" * MIB)
    return disk


@contextlib.contextmanager
def halted(
    service: Service, world: storage_fixture.World, disk: str, stage: str = "measure"
) -> Iterator[tuple[dict[str, Any], int]]:
    """A copy to the other repository whose worker stands still at the stage: (what was begun, its pid)."""
    begun = service.storage.copy_image("other", disk, options={"strategy": "performance"})
    until(lambda: service.jobs.get(begun["job_id"])["stage_name"] in (stage, "copy"))
    (worker,) = leases.local_pids(world.other.slot(begun["image_id"]).data_lease())
    os.kill(worker, signal.SIGSTOP)
    try:
        yield begun, worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def test_source_and_target_are_held_while_it_runs(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str
) -> None:
    with halted(service, world, large) as (begun, _):
        for act in (
            lambda: service.storage.create_snapshot("main", large),
            lambda: service.storage.remove_image("main", large),
            lambda: service.storage.plan_disk(large, "main", True),
        ):
            with pytest.raises(errors.ImageInUse) as refused:
                act()
            assert refused.value.facts["holder"] == f"job {begun['job_id']}"
        for act in (
            lambda: service.storage.remove_image("other", begun["image_id"]),
            lambda: service.storage.create_snapshot("other", begun["image_id"]),
            lambda: service.storage.plan_disk(begun["image_id"], "other", True),
            lambda: service.storage.copy_image("main", begun["image_id"]),
        ):
            with pytest.raises(errors.ImageBusy) as busy:
                act()
            assert busy.value.facts["job_id"] == begun["job_id"]
        with pytest.raises(errors.RepositoryInUse, match=begun["job_id"]):
            service.storage.disconnect_storage_repository("other")
        with pytest.raises(errors.RepositoryInUse, match=begun["job_id"]):
            service.storage.disconnect_storage_repository("main")
        status = service.storage.get_image_status("other", begun["image_id"])
        assert (status["status"], status["work"]["state"], status["host_id"]) == ("broken", "running", 1)
    service.ended(begun["job_id"])


@pytest.mark.parametrize("moment", range(8))
def test_aborted_copy_leaves_nothing(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str, moment: int
) -> None:
    before, content = shelf.image(large), shelf.data(large).stat().st_mtime_ns
    begun = service.storage.copy_image("other", large, options={"strategy": random.choice(["space", "performance"])})
    until(lambda: (service.jobs.get(begun["job_id"])["progress"] or 0) >= moment * 12 or moment == 0)
    service.jobs.abort(begun["job_id"])
    info = service.jobs.wait(begun["job_id"], 30)
    if info["status"] == "done":  # it was writing its result already
        service.storage.remove_image("other", begun["image_id"])
    else:
        assert (info["status"], info["error"]) == ("aborted", None)
    assert on(shelf, world).files() == set()
    assert shelf.image(large) == before and shelf.data(large).stat().st_mtime_ns == content
    with shelf.session.holding([shelf.repo.slot(large).data_lease()], 2.0):
        pass


def test_copy_that_waits_is_aborted_too(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str
) -> None:
    """Two workers are busy, so the third job never had one."""
    with halted(service, world, large) as (one, _), halted(service, world, large) as (two, _):
        begun = service.storage.copy_image("other", large)
        assert service.jobs.get(begun["job_id"])["status"] == "pending"
        with pytest.raises(errors.ImageBusy):
            service.storage.remove_image("other", begun["image_id"])
        service.jobs.abort(begun["job_id"])
        service.ended(begun["job_id"], "aborted")
        assert world.other.find(begun["image_id"]) is None
    for other in (one, two):
        service.ended(other["job_id"])
        service.storage.remove_image("other", other["image_id"])
    assert on(shelf, world).files() == set()


@pytest.mark.parametrize("state", ["ended", "running"])
def test_refused_job_leaves_nothing(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str, state: str
) -> None:
    """The job's id is another job's: the target that was begun for it goes."""
    with halted(service, world, large) as (begun, worker):
        if state == "ended":
            os.kill(worker, signal.SIGCONT)
            service.ended(begun["job_id"])
        files = on(shelf, world).files()
        with pytest.raises(errors.JobExists):
            service.storage.copy_image("other", shelf.disk(), options={"job_id": begun["job_id"]})
        assert on(shelf, world).files() == files
    service.ended(begun["job_id"])
    assert service.storage.get_image_status("other", begun["image_id"])["status"] == "optimized"


def test_killed_worker_leaves_a_broken_target_that_can_be_removed(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str
) -> None:
    with halted(service, world, large, "copy") as (begun, worker):
        os.kill(worker, signal.SIGKILL)
    info = service.ended(begun["job_id"], "failed")
    assert info["error"]["data"]["key"] == "worker_died"
    image = on(shelf, world).image(begun["image_id"])
    assert (image["status"], image["work"]["state"]) == ("broken", "failed")
    assert world.other.data_names() == []
    status = service.storage.get_image_status("other", begun["image_id"])
    assert "worker" in status["last_error"]
    service.storage.remove_image("other", begun["image_id"])
    assert on(shelf, world).files() == set()


def test_failed_copy_says_why_in_its_record(service: Service, shelf: Shelf, world: storage_fixture.World) -> None:
    """The source's data is gone: nothing that a request could have seen from its record."""
    disk = shelf.disk()
    shelf.data(disk).unlink()
    begun = service.storage.copy_image("other", disk)
    info = service.ended(begun["job_id"], "failed")
    assert info["error"]["data"]["key"] == "tool_failed"
    image = on(shelf, world).image(begun["image_id"])
    assert (image["status"], image["work"]["state"]) == ("broken", "failed")
    assert "No such file" in service.storage.get_image_status("other", begun["image_id"])["last_error"]
    with pytest.raises(errors.ImageNotUsable):
        service.storage.plan_disk(begun["image_id"], "other", True)
    service.storage.remove_image("other", begun["image_id"])
    assert on(shelf, world).files() == set()


def test_source_that_changed_since_the_request_is_not_copied(shelf: Shelf) -> None:
    disk = shelf.disk()
    planned = [shelf.image(disk)]
    copying.check_unchanged(shelf.repo, planned)
    shelf.snapshot(disk)
    with pytest.raises(errors.RecordChanged):
        copying.check_unchanged(shelf.repo, planned)


def test_copy_cut_off_by_the_agents_end_is_told_by_the_record(
    service: Service, shelf: Shelf, world: storage_fixture.World, large: str
) -> None:
    with Service(world).running() as mortal:
        with halted(mortal, world, large, "copy") as (begun, _):
            assert not mortal.pool.stop(0.1), "the worker cannot have seen it yet"
        assert mortal.pool.stop(10)
        status = service.storage.get_image_status("other", begun["image_id"])
        assert (status["status"], status["work"]["state"]) == ("broken", "interrupted")
    service.storage.remove_image("other", begun["image_id"])
    assert on(shelf, world).files() == set()


def test_work_is_queued_from_its_record_on(service: Service, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the record and the job nobody may take it for a dead agent's (trap 24)."""
    source, target = shelf.disk(), ids.new()
    add, seen = service.jobs.add, []

    def look_and_add(request: job.JobRequest) -> job.Info:
        seen.append(service.storage.get_image_status("main", target)["verdict"]["state"])
        return add(request)

    with monkeypatch.context() as patch:
        patch.setattr(service.jobs, "add", look_and_add)
        copy = service.storage.copy_image("main", source, options={"image_id": target})
    service.ended(copy["job_id"])
    assert seen == ["queued"]


def test_job_that_ends_after_its_record_was_read_is_read_again(service: Service, shelf: Shelf) -> None:
    """The agent has seen it end, so the record that says running is an old one (trap 22)."""
    copy = service.storage.copy_image("main", shelf.disk())
    service.ended(copy["job_id"])
    now = reading.status(shelf.repo, {"image_id": copy["image_id"]})
    work = {**now["record"]["work"], "state": "running"}
    reads = [{**now, "record": {**now["record"], "work": work}}, now]
    told, verdict = holders.Holders(service.jobs, 1).judge(lambda: reads.pop(0))
    assert (told, verdict.state) == (now, "done")


def test_queued_work_of_a_dead_agent_is_no_work(service: Service, shelf: Shelf) -> None:
    """Its record says queued, by a job that nobody has."""
    target = shelf.begin_copy()["image_id"]
    assert shelf.image(target)["work"]["state"] == "queued"
    assert service.storage.get_image_status("main", target)["work"]["state"] == "interrupted"
    shelf.change(target, work={**shelf.image(target)["work"], "host_id": 9, "boot_id": "another host's"})
    status = service.storage.get_image_status("main", target)
    assert status["verdict"] == {"state": "interrupted", "final": True, "reason": "host 9 is not in the lockspace"}
    asked = service.storage.get_image_status("main", target, "another job")
    assert (asked["verdict"]["state"], asked["work"]["state"]) == ("superseded", "interrupted")


# -- durable before it is told (trap 27) -----------------------------------------------------------------------------


def test_data_is_flushed_before_the_record_speaks_of_it(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    fdatasync, fsync, update = os.fdatasync, os.fsync, record.update

    def note_data(fd: int) -> None:
        noted.append(f"flush {Path(f'/proc/self/fd/{fd}').readlink().parent.name}")
        fdatasync(fd)

    def note_name(fd: int) -> None:
        noted.append(f"flush name in {Path(f'/proc/self/fd/{fd}').readlink().name}")
        fsync(fd)

    def note_record(*given: Any) -> record.Record:
        found = update(*given)
        noted.append(f"record {found['status']}")
        return found

    monkeypatch.setattr(os, "fdatasync", note_data)
    monkeypatch.setattr(os, "fsync", note_name)
    monkeypatch.setattr(record, "update", note_record)
    shelf.disk()
    assert noted[-3:] == ["flush data", "flush name in data", "record optimized"]


def test_write_back_that_failed_is_no_success(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_disk(fd: int) -> None:  # nothing here can make a real disk lose its cache
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken_disk)
        with pytest.raises(OSError, match="Input/output"):
            shelf.disk()
    assert shelf.files() == set()


# -- importImage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(world: storage_fixture.World) -> Path:
    return world.import_dir / f"{ids.new()}"


@pytest.mark.parametrize("strategy", ["space", "performance"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_file_is_imported(service: Service, shelf: Shelf, file: Path, kind: str, strategy: str) -> None:
    raw = file.with_suffix(".raw")
    raw.write_bytes(b"head" + bytes(3 * MIB) + os.urandom(MIB - 4))
    subprocess.run(["qemu-img", "convert", "-O", kind, raw, file], check=True)

    begun = service.storage.import_image("main", str(file), kind, {"n": 1}, {"strategy": strategy})
    service.ended(begun["job_id"])

    image = shelf.image(begun["image_id"])
    assert (image["kind"], image["status"], image["size_bytes"]) == ("disk", "optimized", 4 * MIB)
    assert identical(file_of(shelf, begun["image_id"]), (raw, "raw"))


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_file_is_imported_from_where_nothing_passes_the_page_cache(
    service: Service, shelf: Shelf, undirect: Path, kind: str
) -> None:
    raw, file = undirect / "raw", undirect / f"file.{kind}"
    raw.write_bytes(os.urandom(MIB))
    subprocess.run(["qemu-img", "convert", "-O", kind, raw, file], check=True)
    assert not hostfiles.is_direct(str(file)) and hostfiles.is_direct(shelf.repo.place + "/repository")
    begun = service.storage.import_image("main", str(file), kind)
    service.ended(begun["job_id"])
    assert identical(file_of(shelf, begun["image_id"]), (raw, "raw"))


@pytest.fixture
def undirect(world: storage_fixture.World) -> Iterator[Path]:
    """A directory whose files have no direct I/O, as in a tmpfs before Linux 6.6."""
    place = world.import_dir / "memory"
    place.mkdir()
    mounted = subprocess.run(["mount", "-n", "-t", "ramfs", "memory", place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mounts here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-n", place], check=True)
    place.rmdir()


@pytest.mark.parametrize("length", [1, 511, 512, 4097, MIB + 513])
def test_odd_lengths_are_rounded_up_with_zeros(service: Service, shelf: Shelf, file: Path, length: int) -> None:
    content = os.urandom(length)
    file.write_bytes(content)
    for strategy in ("space", "performance"):
        begun = service.storage.import_image("main", str(file), "raw", options={"strategy": strategy})
        service.ended(begun["job_id"])
        size = models.size(length)
        assert shelf.image(begun["image_id"])["size_bytes"] == size
        padded = file.with_suffix(".padded")
        padded.write_bytes(content.ljust(size, b"\0"))
        assert identical(file_of(shelf, begun["image_id"]), (padded, "raw"))


def test_dangerous_files_are_refused_at_once(
    service: Service, shelf: Shelf, world: storage_fixture.World, file: Path
) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", file, "1M"],
                   check=True)  # fmt: skip
    for claimed in ("qcow2", "raw"):
        with pytest.raises(errors.BadImageFile):
            service.storage.import_image("main", str(file), claimed)
    link = world.import_dir / "link"
    link.symlink_to("/etc/passwd")
    for path in ("/etc/passwd", str(link), f"{world.import_dir}/../main/repository"):
        with pytest.raises(errors.PathNotAllowed):
            service.storage.import_image("main", path, "raw")
    with pytest.raises(errors.BadImageFile):
        service.storage.import_image("main", str(world.import_dir / "missing"), "raw")
    with pytest.raises(errors.InvalidParameters):
        service.storage.import_image("main", str(file), "vmdk")
    assert shelf.files() == set()


def test_file_that_changed_since_the_request_is_refused_by_the_job(service: Service, shelf: Shelf, file: Path) -> None:
    file.write_bytes(bytes(MIB))
    options = {"image_id": ids.new(), "job_id": ids.new()}
    argument = {"path": str(file), "format": "raw", "allowed_dirs": [str(file.parent)]}
    told = {"digest": "an import", "strategy": "space", "user_data": {}, **options}
    importing.begin_import(shelf.repo, shelf.session, {**argument, **told})
    file.write_bytes(bytes(2 * MIB))
    service.jobs.add(
        job.JobRequest(
            kind="importImage",
            job_id=options["job_id"],
            job_type="storage",
            description="a test",
            entity={"type": "image", "id": options["image_id"], "repo_id": "main"},
            argument={
                **argument,
                "image_id": options["image_id"],
                "target": service.storage.description("main"),
            },
        )
    )
    info = service.ended(options["job_id"], "failed")
    assert info["error"]["data"]["key"] == "bad_image_file"
    assert shelf.repo.data_names() == []
