"""Volumes of disks that begin small and grow: what verbs and jobs give them, and what a VM is given while it writes.

The volumes are files (`file_volumes.py`), which fail a test when more is written than the volume has room for. With
QEMU: `virt_growing_test.py`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import file_volumes, sanlock_fixture, storage_blocks_test, storage_fixture
from tests.storage_blocks_test import Blocks, Service, job
from vdsm import errors

world = storage_fixture.world
blocks, service = storage_blocks_test.blocks, storage_blocks_test.service
MIB = 1 << 20
CHUNK, EXTENT = file_volumes.CHUNK_BYTES, file_volumes.EXTENT_BYTES
DISK = 200 * MIB


@pytest.fixture(scope="module")
def made(world: storage_fixture.World) -> file_volumes.FileBlocks:
    sanlock_fixture.use(world.run_dir)
    return file_volumes.make(world.directory / "growing", "blocks")


def disk(service: Service, size_bytes: int = DISK, strategy: str = "space") -> str:
    return str(service.storage.create_virtual_disk("blocks", size_bytes, options={"strategy": strategy})["image_id"])


def room(blocks: Blocks, image_id: str) -> int:
    """Of the image's volume."""
    return blocks.repo.allocated_bytes(blocks.image(image_id)["data"]["name"])


def widen(blocks: Blocks, image_id: str, room_bytes: int) -> None:
    with blocks.repo.changing(blocks.image(image_id)["data"]["name"], room_bytes):
        pass


@contextlib.contextmanager
def full(blocks: Blocks, free_bytes: int = 0) -> Iterator[None]:
    """Inside the block no more than that is free in the group."""
    total, free = blocks.repo._group.space()
    told = Path(blocks.repo.place, "size")
    told.write_text(str(total - free + free_bytes))
    yield
    told.unlink()


@contextlib.contextmanager
def running(service: Service, image_id: str) -> Iterator[None]:
    """A VM has the disk open inside the block."""
    with service.storage.keeping([service.storage.plan_disk(image_id, "blocks", writable=True)]):
        yield


# -- what volumes begin with -------------------------------------------------------------------------------------------


def test_new_disk_begins_with_a_chunk(service: Service, blocks: Blocks) -> None:
    assert room(blocks, disk(service)) == CHUNK
    assert room(blocks, disk(service, MIB)) == EXTENT, "all that it can take"
    assert room(blocks, disk(service, DISK, "performance")) == DISK, "raw data does not grow"


def test_disk_on_a_snapshot_begins_with_a_chunk(service: Service, blocks: Blocks) -> None:
    one = disk(service, DISK, "performance")
    service.storage.create_snapshot("blocks", one)
    assert room(blocks, one) == CHUNK


def test_copy_takes_what_it_needs(service: Service, blocks: Blocks) -> None:
    source = disk(service)
    blocks.write(source, 7, 100 * MIB, 9 * MIB)
    copy = job(service, service.storage.copy_image("blocks", source))
    assert room(blocks, copy) == 12 * MIB
    blocks.shows(copy, 7, 100 * MIB, 9 * MIB)


def test_disk_that_gets_another_size_has_room_for_its_tables(service: Service, blocks: Blocks) -> None:
    """Three clusters of its volume are left, and a table of 15 TiB takes four."""
    one = disk(service)
    blocks.write(one, 3, 0, 31 * MIB // 2)
    service.storage.resize_virtual_disk("blocks", one, 15 << 40)
    blocks.shows(one, 3, 0, 31 * MIB // 2)
    assert room(blocks, one) == 2 * CHUNK


def test_disk_stays_as_it_is_when_its_tables_have_no_room(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    blocks.write(one, 3, 0, 31 * MIB // 2)
    with full(blocks), pytest.raises(errors.RepositoryFull):
        service.storage.resize_virtual_disk("blocks", one, 15 << 40)
    image = blocks.image(one)
    assert (image["status"], image["size_bytes"]) == ("optimized", DISK)
    blocks.shows(one, 3, 0, 31 * MIB // 2)


def test_pull_has_room_for_zeros_that_took_none(service: Service, blocks: Blocks) -> None:
    """What was zeroed takes no space in a qcow2 of its own, and is written out when that is merged upwards."""
    one = disk(service)
    widen(blocks, one, 48 * MIB)
    blocks.write(one, 1, 0, 40 * MIB)
    service.storage.create_snapshot("blocks", one)
    blocks._do(one, f"write -z 0 {40 * MIB}")
    lower = service.storage.create_snapshot("blocks", one)["image_id"]
    widen(blocks, one, 20 * MIB)  # so that pulling seems to write less
    blocks.write(one, 2, 0, MIB)
    service.storage.remove_image("blocks", lower)
    (fix,) = [found for found in service.storage.check_storage_repository("blocks") if found["type"] == "merge"]
    service.ended(service.storage.fix_storage_repository("blocks", fix)["job_id"])
    blocks.shows(one, 2, 0, MIB)
    blocks.shows(one, 0, MIB, 39 * MIB)


# -- a VM's disk -------------------------------------------------------------------------------------------------------


def test_vm_begins_with_a_step_of_room(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    blocks.write(one, 5, 0, 14 * MIB)
    with running(service, one):
        assert 14 * MIB + CHUNK <= room(blocks, one) <= 16 * MIB + CHUNK
        before = room(blocks, one)
    with running(service, one):
        assert room(blocks, one) == before, "it has it already"
    blocks.shows(one, 5, 0, 14 * MIB)


def test_vm_that_only_reads_gets_none(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    blocks.write(one, 5, 0, 14 * MIB)
    with service.storage.keeping([service.storage.plan_disk(one, "blocks", writable=False)]):
        assert room(blocks, one) == CHUNK


def test_disk_grows_a_step_ahead_of_what_is_written(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    with running(service, one):
        asks_at = service.storage.grow_disk("blocks", one, 0)
        assert asks_at == CHUNK // 2 and room(blocks, one) == CHUNK, "there is enough"
        for _ in range(3):
            assert asks_at is not None
            again = service.storage.grow_disk("blocks", one, asks_at)
            assert again is not None and again >= asks_at + CHUNK // 2
            assert room(blocks, one) == again + CHUNK // 2
            asks_at = again


def test_full_disk_grows_whatever_was_written(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    with running(service, one):
        service.storage.grow_disk("blocks", one, None)
        assert room(blocks, one) == 2 * CHUNK


def test_disk_grows_to_all_that_it_can_take_and_asks_no_more(service: Service, blocks: Blocks) -> None:
    one = disk(service, 20 * MIB)
    with running(service, one):
        assert service.storage.grow_disk("blocks", one, CHUNK) == room(blocks, one) == 24 * MIB
        service.storage.grow_disk("blocks", one, 20 * MIB)
        assert room(blocks, one) == 24 * MIB


def test_full_group_is_told_and_grows_on_when_there_is_room(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    blocks.write(one, 5, 0, 14 * MIB)
    with full(blocks, EXTENT), running(service, one):
        assert room(blocks, one) == CHUNK, "it starts all the same"
        with pytest.raises(errors.RepositoryFull):
            service.storage.grow_disk("blocks", one, CHUNK)
    with running(service, one):
        asks_at = service.storage.grow_disk("blocks", one, CHUNK)
        assert asks_at is not None and asks_at > CHUNK


def test_file_never_asks(service: Service, blocks: Blocks) -> None:
    made = service.storage.create_virtual_disk("main", MIB)["image_id"]
    assert service.storage.grow_disk("main", made, MIB) is None
    assert service.storage.grow_disk("blocks", disk(service, MIB, "performance"), MIB) is None, "nor does raw data"
    service.world.empty()


def test_other_host_sees_what_was_grown(service: Service, blocks: Blocks) -> None:
    one = disk(service)
    name = blocks.image(one)["data"]["name"]
    elsewhere = file_volumes.FileGroup(blocks.repo.place, 2)
    with running(service, one):
        service.storage.grow_disk("blocks", one, CHUNK)
        assert elsewhere.activate(name) == room(blocks, one) > CHUNK
        elsewhere.deactivate(name)
