"""The record of an image on disk: its bytes, and what is left of it when its writer dies (traps 19 and 20)."""

import errno
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from vdsm import errors, record

world, shelf = storage_fixture.world, storage_fixture.shelf
Shelf = storage_fixture.Shelf

AREAS = (record.RECORD_OFFSET, record.RECORD_OFFSET + record.AREA_BYTES)

SAMPLE: dict[str, Any] = {
    **{"id": "6d0fb0a1-6c22-4a5e-9a0f-3b6a1d0c7e11", "kind": "disk", "status": "optimized", "deleted": False},
    **{"size_bytes": 1 << 30, "data": {"name": "6d0fb0a1-6c22-4a5e-9a0f-3b6a1d0c7e11.0badcafe", "format": "qcow2"}},
    **{"base": None, "strategy": "space", "user_data": {"name": "größe"}, "digest": "ab" * 32, "created": 1700000000},
    **{"version": 3, "generation": 1, "work": None, "writer": {"host_id": 7, "boot_id": "b"}},
}
# As written by the first version of this format. A change here is a change of what is on everybody's disks.
SAMPLE_PAYLOAD = (
    b'{"base":null,"created":1700000000,"data":{"format":"qcow2","name":"6d0fb0a1-6c22-4a5e-9a0f-3b6a1d0c7e11.0badcafe"'
    b'},"deleted":false,"digest":"abababababababababababababababababababababababababababababababab","generation":1,"id":"'
    b'6d0fb0a1-6c22-4a5e-9a0f-3b6a1d0c7e11","kind":"disk","size_bytes":1073741824,"status":"optimized","strategy":"space"'
    b',"user_data":{"name":"gr\xc3\xb6\xc3\x9fe"},"version":3,"work":null,"writer":{"boot_id":"b","host_id":7}}'
)
SAMPLE_HEAD = bytes.fromhex("5644534d524543310300000000000000b401000000000000")
SAMPLE_SHA256 = bytes.fromhex("e1354dea703e3f4647dfdc60c31046eb2f5c0c5e9c70893168d44bfb75bc01bb")


def sample_area() -> bytes:
    return (SAMPLE_HEAD + SAMPLE_SHA256 + SAMPLE_PAYLOAD).ljust(4096, b"\0")


def test_record_is_written_byte_for_byte_as_the_stored_sample(shelf: Shelf) -> None:
    assert record.encode(SAMPLE) == sample_area()


def test_stored_sample_is_read_from_its_place_in_a_slot(shelf: Shelf) -> None:
    disk = shelf.disk()
    path = Path(shelf.repo.slot(disk).path)
    put(path, 1, sample_area())
    put(path, 0, bytes(4096))
    assert record.read(shelf.repo.slot(disk)) == SAMPLE
    assert path.stat().st_size == (2 << 20) + (64 << 10)


def put(path: Path, area: int, data: bytes) -> None:
    with path.open("r+b") as slot:
        slot.seek(AREAS[area])
        slot.write(data)


def versions(shelf: Shelf, image_id: str) -> list[int]:
    """Of both areas, 0 for one that is not valid."""
    found = []
    with Path(shelf.repo.slot(image_id).path).open("rb") as slot:
        for offset in AREAS:
            slot.seek(offset)
            known = record.decode(slot.read(record.AREA_BYTES))
            found.append(known["version"] if known else 0)
    return found


def test_only_the_older_area_is_written(shelf: Shelf) -> None:
    disk = shelf.disk()
    for _ in range(3):
        before = versions(shelf, disk)
        shelf.change(disk)
        after = versions(shelf, disk)
        assert max(before) in after and min(before) not in after
        assert max(after) == max(before) + 1


@pytest.mark.parametrize("torn", ["head", "middle", "checksum", "all"])
def test_torn_write_leaves_the_record_before(shelf: Shelf, torn: str) -> None:
    """A crash in the middle of a write to one area: the other one counts, and the next write heals both."""
    disk = shelf.disk()
    old = shelf.change(disk, user_data={"before": 1})
    new = shelf.change(disk, user_data={"after": "x" * 6000})
    path, area = Path(shelf.repo.slot(disk).path), new["version"] % 2
    whole = record.encode(new)
    damaged = {
        "head": bytes(512) + whole[512:],
        "middle": whole[:4096] + bytes(4096) + whole[8192:],
        "checksum": whole[:24] + bytes([whole[24] ^ 1]) + whole[25:],
        "all": b"\xff" * len(whole),
    }[torn]
    put(path, area, damaged)

    assert shelf.image(disk) == old
    healed = shelf.change(disk, user_data={"again": 2})
    assert 0 not in versions(shelf, disk)
    assert shelf.image(disk) == healed
    assert healed["version"] > old["version"]


def test_version_of_the_head_must_be_the_payloads(shelf: Shelf) -> None:
    """Two areas are ordered by it: a head from one write over the payload of another is no record."""
    payload = json.dumps({**SAMPLE, "version": 4}).encode()
    head = struct.pack("<8sQII", b"VDSMREC1", 5, len(payload), 0)
    assert record.decode(head + hashlib.sha256(head + payload).digest() + payload) is None


def test_both_areas_torn_is_no_image(shelf: Shelf) -> None:
    disk = shelf.disk()
    for area in (0, 1):
        put(Path(shelf.repo.slot(disk).path), area, os.urandom(4096))
    assert shelf.repo.find(disk) is None
    with pytest.raises(errors.NoSuchImage):
        shelf.image(disk)


def test_update_has_succeeded_when_only_healing_the_other_area_fails(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new record is on disk: a caller who was told otherwise would take back what others can see by now."""
    disk = shelf.disk()
    put(Path(shelf.repo.slot(disk).path), shelf.image(disk)["version"] % 2 ^ 1, os.urandom(4096))
    real, offsets = os.pwritev, []

    def once(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        if len(offsets) == 2:
            raise OSError(errno.EIO, "as a bad sector says")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", once)
    written = shelf.change(disk, user_data={"is": "there"})
    monkeypatch.undo()
    assert len(offsets) == 2
    assert shelf.image(disk) == written and written["user_data"] == {"is": "there"}
