"""Jobs that find their volume too short, on loop devices (`loop_volumes.py`), which end where a volume does."""

import subprocess
from collections.abc import Iterator

import pytest

from tests import file_volumes, loop_volumes, sanlock_fixture, storage_fixture
from tests.until import until
from vdsm import leases

world = storage_fixture.world
MIB = 1 << 20
DISK = 200 * MIB
CHUNK = file_volumes.CHUNK_BYTES

Service = storage_fixture.Service


class Loops:
    """The repository, with short words for its images' content."""

    def __init__(self, repo: loop_volumes.LoopBlocks, service: Service) -> None:
        self.repo = repo
        self.service = service

    def disk(self) -> str:
        return str(self.service.storage.create_virtual_disk("loops", DISK)["image_id"])

    def copied(self, image_id: str, base: str) -> str:
        begun = self.service.storage.copy_image("loops", image_id, base_image_id=base)
        self.service.ended(begun["job_id"])
        return str(begun["image_id"])

    def write(self, image_id: str, pattern: int, offset: int, length: int) -> None:
        with self.repo.changing(self.name(image_id), 128 * MIB):
            self._do(image_id, f"write -P {pattern} {offset} {length}")

    def shows(self, image_id: str, pattern: int, offset: int, length: int) -> None:
        names, found = [], self.repo.find(image_id)
        while found is not None:
            names.append(found["data"]["name"])
            found = self.repo.find(found["base"]) if found["base"] else None
        with self.repo.reading(names):
            self._do(image_id, f"read -P {pattern} {offset} {length}")

    def room(self, image_id: str) -> int:
        return self.repo.allocated_bytes(self.name(image_id))

    def name(self, image_id: str) -> str:
        return str(self.repo.get(image_id)["data"]["name"])

    def _do(self, image_id: str, command: str) -> None:
        argv = ["qemu-io", "-f", "qcow2", "-c", command, self.repo.data_path(self.name(image_id))]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def loops(world: storage_fixture.World) -> Iterator[Loops]:
    """A repository whose lockspace this host has joined, one for all tests here."""
    try:
        loop_volumes.losetup("--find")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    sanlock_fixture.use(world.run_dir)
    place = world.directory / "loops"
    repo = loop_volumes.LoopBlocks({**file_volumes.describe(place, "loops"), "format": loop_volumes.FORMAT})
    repo.format_(sanlock_fixture.IO_TIMEOUT_S)
    leases.join(repo.lockspace(), sanlock_fixture.IO_TIMEOUT_S)
    until(lambda: leases.state(repo.lockspace()) == "joined")
    with Service(world, loop_volumes.__name__).running() as service:
        service.storage.connect_storage_repository("loops", loop_volumes.FORMAT, {"path": str(place)})
        until(lambda: service.repository("loops")["state"] == "joined")
        yield Loops(repo, service)
        for name in repo.data_names():
            repo.remove_data(name)
    leases.leave(repo.lockspace())


def test_difference_that_finds_no_room_is_made_anew_with_more(loops: Loops) -> None:
    base, disk = loops.disk(), loops.disk()
    loops.write(base, 1, 0, 20 * MIB)
    loops.write(disk, 2, 20 * MIB, 30 * MIB)
    copy = loops.copied(disk, base)
    assert loops.room(copy) == 4 * CHUNK, "zeros over the base's 20 MiB, and 30 MiB"
    loops.shows(copy, 0, 0, 20 * MIB)
    loops.shows(copy, 2, 20 * MIB, 30 * MIB)
    loops.shows(copy, 0, 50 * MIB, 150 * MIB)


def test_difference_takes_no_more_than_it_needs(loops: Loops) -> None:
    base, disk = loops.disk(), loops.disk()
    for image_id in (base, disk):
        loops.write(image_id, 1, 0, 60 * MIB)
    loops.write(disk, 2, 59 * MIB, 2 * MIB)
    copy = loops.copied(disk, base)
    assert loops.room(copy) == CHUNK
    loops.shows(copy, 1, 0, 59 * MIB)
    loops.shows(copy, 2, 59 * MIB, 2 * MIB)
