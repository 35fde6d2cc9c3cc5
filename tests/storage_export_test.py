"""exportImage: a file of this host, whole or not there, and only where the configuration allows it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import loopfs, storage_fixture
from tests.until import opened, until
from vdsm import config, errors, ids, leases
from vdsm.storage.files import hostfiles

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service, World = storage_fixture.Shelf, storage_fixture.Service, storage_fixture.World

MIB = 1 << 20


@pytest.fixture
def place(world: World) -> Iterator[Path]:
    """Where exports go; empty."""
    yield world.export_dir
    for left in world.export_dir.iterdir():
        left.unlink()


def export(service: Service, image_id: str, path: Path | str, kind: str = "raw", **options: Any) -> str:
    return str(service.storage.export_image("main", image_id, str(path), kind, options)["job_id"])


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_file_holds_what_the_image_shows(service: Service, shelf: Shelf, place: Path, kind: str) -> None:
    disk = shelf.disk(64 * MIB, strategy="performance")
    shelf.write(disk, 1, 0, MIB)
    shelf.snapshot(disk)
    shelf.write(disk, 2, 40 * MIB, MIB)
    before = shelf.image(disk)

    info = service.ended(export(service, disk, place / "out", kind))

    assert (info["entity"], info["stages"], info["progress"]) == (
        {"type": "file", "id": str(place / "out"), "repo_id": "main"},
        2,
        100,
    )
    for pattern, offset in ((1, 0), (0, MIB), (2, 40 * MIB), (0, 63 * MIB)):
        storage_fixture.qemu_io(place / "out", kind, f"read -P {pattern} {offset} {MIB}")
    found = (place / "out").stat()
    assert found.st_blocks * 512 < 4 * MIB, "sparse"
    if kind == "raw":
        assert found.st_size == 64 * MIB
    else:
        said = subprocess.run(["qemu-img", "info", "-f", kind, place / "out"], capture_output=True, check=True)
        assert b"backing" not in said.stdout
    assert [path.name for path in place.iterdir()] == ["out"]
    assert shelf.image(disk) == before


def test_existing_file_is_replaced_only_when_asked(service: Service, shelf: Shelf, place: Path) -> None:
    disk, path = shelf.disk(), place / "out"
    path.write_text("precious")
    with pytest.raises(errors.HostFileExists):
        export(service, disk, path)
    assert path.read_text() == "precious"
    service.ended(export(service, disk, path, overwrite=True))
    assert path.stat().st_size == MIB


def test_links_are_neither_followed_nor_replaced(service: Service, shelf: Shelf, world: World, place: Path) -> None:
    disk, victim = shelf.disk(), world.directory / "victim"
    victim.write_text("precious")
    (place / "link").symlink_to(victim)
    (place / "away").symlink_to(world.directory)
    for overwrite in (False, True):
        with pytest.raises(errors.HostFileExists):
            export(service, disk, place / "link", overwrite=overwrite)
        with pytest.raises(errors.PathNotAllowed):
            export(service, disk, place / "away" / "victim", overwrite=overwrite)
    assert victim.read_text() == "precious"
    victim.unlink()


@pytest.mark.parametrize("path", ["/etc/out", "{place}/../import/out", "{place}", "{place}/missing/../../out"])
def test_other_places_are_refused(service: Service, shelf: Shelf, place: Path, path: str) -> None:
    with pytest.raises(errors.PathNotAllowed) as refused:
        export(service, shelf.disk(), path.format(place=place))
    assert str(place) in refused.value.facts["allowed"]


@pytest.mark.parametrize("path", ["out", "", "{place}/", "{place}/..", "{place}/a\0b"])
def test_paths_that_name_no_file_are_refused(service: Service, shelf: Shelf, place: Path, path: str) -> None:
    with pytest.raises(errors.InvalidParameters):
        export(service, shelf.disk(), path.format(place=place))


def test_without_configuration_nothing_is_exported() -> None:
    assert config.Storage().export_dirs == ()
    with pytest.raises(errors.PathNotAllowed), hostfiles.new_file("/var/lib/x", "token", ()):
        pass


def test_missing_directory_is_said_at_once(service: Service, shelf: Shelf, place: Path) -> None:
    with pytest.raises(errors.HostFileFailed, match="No such file"):
        export(service, shelf.disk(), place / "missing" / "out")


def test_file_that_came_meanwhile_stays(place: Path) -> None:
    path = place / "out"
    with hostfiles.new_file(str(path), "token", [str(place)]) as file:
        with file.making() as made:
            Path(made).write_bytes(b"image")
        check_free = file.check_free

        def late(*, overwrite: bool) -> None:  # between the last look and the name
            check_free(overwrite=overwrite)
            path.write_text("precious")

        file.check_free = late  # type: ignore[method-assign]  # one step of this one object
        with pytest.raises(errors.HostFileExists):
            file.publish(overwrite=False)
        file.discard()
    assert [(found.name, found.read_text()) for found in place.iterdir()] == [("out", "precious")]


def test_request_again_after_a_death_behind_the_name_leaves_one_name(place: Path) -> None:
    """The file is whole; without this its hidden name would stay for good, and with it the space of a removed file."""

    def dies() -> None:
        with hostfiles.new_file(str(place / "out"), "token", [str(place)]) as file:
            with file.making() as made:
                Path(made).write_bytes(b"image")
            storage_fixture.dies_before(os, "unlink")
            file.publish(overwrite=False)

    storage_fixture.killed(dies)
    assert len(list(place.iterdir())) == 2
    with (
        hostfiles.new_file(str(place / "out"), "token", [str(place)]) as again,
        pytest.raises(errors.HostFileExists),
    ):
        again.check_free(overwrite=False)
    assert [(found.name, found.read_text()) for found in place.iterdir()] == [("out", "image")]


def test_directory_that_is_swapped_for_a_link_meanwhile_is_refused(
    world: World, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, opened = place / "sub", os.open
    inside.mkdir()

    def late(path: str, *given: Any, **named: Any) -> int:  # nothing else comes between the look and the opening
        if path == str(inside):
            inside.rmdir()
            inside.symlink_to(world.import_dir)
        return opened(path, *given, **named)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(errors.PathNotAllowed), hostfiles.new_file(str(inside / "out"), "token", [str(place)]):
        pass


def test_bad_requests(service: Service, shelf: Shelf, place: Path) -> None:
    disk = shelf.disk()
    with pytest.raises(errors.NoSuchImage):
        export(service, ids.new(), place / "out")
    with pytest.raises(errors.GenerationMismatch):
        export(service, disk, place / "out", generation=8)
    with pytest.raises(errors.InvalidParameters):
        export(service, disk, place / "out", "vmdk")
    with leases.Session() as vm, vm.holding([shelf.repo.slot(disk).data_lease()], 1), pytest.raises(errors.ImageInUse):
        export(service, disk, place / "out")
    assert list(place.iterdir()) == []


# -- while it runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def large(shelf: Shelf) -> str:
    disk = shelf.disk(256 * MIB, strategy="performance")
    with shelf.data(disk).open("r+b") as guest:
        for _ in range(256):
            guest.write(b"\x5a" * MIB)
    return disk


@contextlib.contextmanager
def halted(service: Service, place: Path, disk: str) -> Iterator[tuple[str, int]]:
    """An export that stands still while it writes: (its job, its worker)."""
    job_id = export(service, disk, place / "out")
    until(lambda: any(path.name.startswith(".") for path in place.iterdir()))
    (worker,) = [pid for pid in children(service.server.pid) if f"{job_id}.part" in " ".join(opened(pid))]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield job_id, worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def children(server: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


@pytest.mark.parametrize("end", ["aborted", "killed", "done"])
def test_image_is_held_and_the_file_is_whole_or_not_there(
    service: Service, shelf: Shelf, place: Path, large: str, end: str
) -> None:
    with halted(service, place, large) as (job_id, worker):
        with pytest.raises(errors.ImageInUse) as refused:
            service.storage.plan_disk(large, "main", True)
        assert refused.value.facts["holder"] == f"job {job_id}"
        with pytest.raises(errors.RepositoryInUse, match=job_id):
            service.storage.disconnect_storage_repository("main")
        assert not (place / "out").exists()
        if end == "killed":
            os.kill(worker, signal.SIGKILL)
        elif end == "aborted":
            service.jobs.abort(job_id)
    info = service.jobs.wait(job_id, 60)
    assert info["status"] == {"killed": "failed"}.get(end, end)
    assert [path.name for path in place.iterdir()] == (["out"] if end == "done" else [])
    with shelf.session.holding([shelf.repo.slot(large).data_lease()], 5.0):
        pass


def test_file_that_does_not_fit_is_not_begun(service: Service, shelf: Shelf, world: World) -> None:
    disk = shelf.disk(16 * MIB)
    shelf.write(disk, 1, 0, 16 * MIB)
    with loopfs.mounted(8 * MIB, place=world.export_dir / "small") as small:
        before = set(small.iterdir())
        small.chmod(0o777)
        info = service.ended(export(service, disk, small / "out"), "failed")
        assert set(small.iterdir()) == before
    (world.export_dir / "small").rmdir()
    assert info["error"]["data"]["key"] == "host_file_failed"
    assert "space" in info["error"]["message"]
    assert info["stage_name"] == "measure"
