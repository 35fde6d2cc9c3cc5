"""docs/clvm-format.md says what is on disk: a reader written from it alone reads the stored sample; so does the code.

The reader knows the page and nothing of the agent.
"""

import gzip
import hashlib
import json
import re
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests import file_volumes
from vdsm.storage.formats import blocklayout, clvm, slottable

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "clvm-format.md").read_text()
SAMPLE = ROOT / "tests" / "data" / "formats" / "clvm-1.2"
EXPECTED: dict[str, Any] = json.loads((SAMPLE / "expected.json").read_text())

MIB = 1 << 20
SLOT = 3 * MIB
TABLE = 2 * MIB + (64 << 10)
KINDS = {1: "images", 2: "vms"}


class Reader:
    """Of the volume `vdsm`."""

    def __init__(self, volume: bytes) -> None:
        self.volume = volume
        self.header = self.record(0) or {}

    def record(self, slot: int) -> dict[str, Any] | None:
        areas = [self.area(slot + 2 * MIB), self.area(slot + 2 * MIB + (32 << 10))]
        return max((one for one in areas if one), key=lambda one: int(one["version"]), default=None)

    def area(self, at: int) -> dict[str, Any] | None:
        magic, version, length, _ = struct.unpack_from("<8sQII", self.volume, at)
        if magic != b"VDSMREC1":
            return None
        payload = self.volume[at + 56 : at + 56 + length]
        if hashlib.sha256(self.volume[at : at + 24] + payload).digest() != self.volume[at + 24 : at + 56]:
            return None
        found: dict[str, Any] = json.loads(payload)
        return found if found["version"] == version else None

    def entries(self) -> list[tuple[int, int, str]]:
        """(slot's offset, kind, id)"""
        found = []
        for number in range(15360):
            raw = self.volume[TABLE + number * 64 : TABLE + number * 64 + 64]
            if raw == bytes(64):
                break
            magic, said, kind, owner = struct.unpack_from("<8sII16s", raw)
            checksum = hashlib.sha256(self.header["name"].encode() + raw[:48]).digest()[:16]
            assert (magic, said, raw[32:48], raw[48:]) == (b"VDSMSLT1", number, bytes(16), checksum)
            found.append((number * SLOT, kind, str(uuid.UUID(bytes=owner))))
        return found

    def lease(self, at: int) -> tuple[int, str, str]:
        """(magic, lockspace, resource)"""
        (magic,) = struct.unpack_from("<I", self.volume, at)
        lockspace, name = struct.unpack_from("48s48s", self.volume, at + 56)
        return magic, lockspace.rstrip(b"\0").decode(), name.rstrip(b"\0").decode()


@pytest.fixture(scope="module")
def volume() -> bytes:
    return gzip.decompress((SAMPLE / "vdsm.gz").read_bytes())


@pytest.fixture(scope="module")
def reader(volume: bytes) -> Reader:
    return Reader(volume)


def test_page_alone_reads_the_sample(reader: Reader) -> None:
    assert reader.header == EXPECTED["header"]
    own, *others = reader.entries()
    assert own == (0, 3, EXPECTED["header"]["name"])
    slots: dict[str, dict[str, int]] = {"images": {}, "vms": {}}
    for offset, kind, owner in others:
        if kind:
            slots[KINDS[kind]][owner] = offset
            assert reader.record(offset) == EXPECTED[KINDS[kind]][owner]
        else:
            assert reader.record(offset) is None and offset in EXPECTED["freed"]
    assert slots == EXPECTED["slots"]


def test_leases_are_where_the_page_says(reader: Reader) -> None:
    name = EXPECTED["header"]["name"]
    assert reader.lease(MIB) == (0x06152010, name, "repository.record")
    for owner, offset in {**EXPECTED["slots"]["images"], **EXPECTED["slots"]["vms"]}.items():
        assert reader.lease(offset) == (0x06152010, name, owner)
        assert reader.lease(offset + MIB) == (0x06152010, name, f"{owner}.record")
    for offset in EXPECTED["freed"]:
        assert {reader.lease(offset)[0], reader.lease(offset + MIB)[0]} & {0x06152010} == set()


class Sample(file_volumes.FileBlocks):
    format = clvm.Clvm.format


def test_code_reads_the_sample(volume: bytes, tmp_path: Path) -> None:
    group = file_volumes.FileGroup(str(tmp_path), 1)
    group.create(blocklayout.SLOTS_VOLUME, len(volume))
    group.activate(blocklayout.SLOTS_VOLUME)
    Path(group.path(blocklayout.SLOTS_VOLUME)).write_bytes(volume)
    repo = Sample({**file_volumes.describe(tmp_path, "sample"), "name": EXPECTED["header"]["name"]})
    assert repo.header() == {**EXPECTED["header"], "place": str(tmp_path)}
    assert (repo.images(), repo.vms()) == (EXPECTED["images"], EXPECTED["vms"])
    slots = {"images": {one: repo.slot(one).offset for one in repo.image_ids()}}
    assert {**slots, "vms": {one: repo.vm_slot(one).offset for one in repo.vm_ids()}} == EXPECTED["slots"]
    for image_id, image in EXPECTED["images"].items():
        assert repo.get(image_id) == image


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (r"Slots of 3 MiB \((\d+) bytes\)", blocklayout.SLOT_BYTES),
        (r"(\d+) entries of 64 bytes", (blocklayout.SLOT_BYTES - blocklayout.TABLE_OFFSET) // slottable.ENTRY_BYTES),
        (r"SHA-256 of the repository's name .* and bytes 0 to (\d+) \|", 47),
    ],
)
def test_numbers_of_the_page_are_the_codes(words: str, value: int) -> None:
    (said,) = re.findall(words, PAGE)
    assert int(said) == value


def test_names_of_the_page_are_the_codes() -> None:
    assert f"| `{blocklayout.SLOTS_VOLUME}` |" in PAGE and f"# The format {clvm.Clvm.format}" in PAGE
