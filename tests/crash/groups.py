"""A volume group as somebody finds it on its disk who shares no code with the agent, and asks LVM nothing: LVM's text
at the disk's beginning, lvmlockd's leases, `docs/clvm-format.md`.

A scene is kept as bytes, and laid out so: LVM's text, the leases of its locks, slots, data. Hosts look at all of these
anew each time. What they hold while nobody works is left alone: their lockspaces, the group's own lock, the lock of the
volume with the slots.
"""

import mmap
import os
import re
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.crash import outside, places

KIB, MIB = 1 << 10, 1 << 20
SLOTS, LOCKS = "vdsm", "lvmlock"

# A ring behind a sector of its own, which tells how long both are, where the text is in them, and how long that is.
_TEXT_AREA, _RING_HEAD, _WHERE, _WHERE_AT = 4 * KIB, 512, struct.Struct("<QQQ"), 32
_SECTION, _NUMBER = re.compile(r"([\w.+-]+) \{"), re.compile(r"(\w+) = \"?([\w.:]+)")
_STRIPE = re.compile(r'"pv0", (\d+)')
_LOCK_AT = re.compile(r":(\d+)$")

_SLOT, _KINDS = 3 * MIB, {"images": 1, "vms": 2}
_TABLE, _ENTRY = 2 * MIB + 64 * KIB, struct.Struct("<8sII16s32x")
_PIECE = 64 * KIB  # holds all of a lease that few hosts use, and a record's both areas
_FIRST_LOCK, _LOCKED = 67, 48  # MiB into LVM's volume of leases; volumes that a scene has at most


class Segment(NamedTuple):
    begin: int
    length: int


class Volume(NamedTuple):
    """Where it is on the disk, and where its lock is in the volume of the locks."""

    segments: list[Segment]
    lock_at: int

    @property
    def size_bytes(self) -> int:
        return sum(segment.length for segment in self.segments)


class Disk:
    """Read and written past all caches: other hosts have it too."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        begin, end = offset // KIB // 4 * 4 * KIB, -(-(offset + length) // (4 * KIB)) * 4 * KIB
        found = bytearray()
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, min(end - begin, MIB)) as piece:
                while begin + len(found) < end:
                    view = memoryview(piece)[: end - begin - len(found)]
                    done = os.preadv(fd, [view], begin + len(found))
                    view.release()
                    assert done, f"{self._path} ends at {begin + len(found)}"
                    found += piece[:done]
        finally:
            os.close(fd)
        return bytes(found[offset - begin : offset - begin + length])

    def write(self, offset: int, data: bytes) -> None:
        """Of whole blocks."""
        fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, len(data)) as piece:
                piece[:] = data
                assert os.pwritev(fd, [piece], offset) == len(data)
        finally:
            os.close(fd)


def volumes(read: places.Read) -> dict[str, Volume]:
    """Of a group with one disk, by LVM's text on it."""
    found: dict[str, dict[str, int]] = {}
    segments: dict[str, list[Segment]] = {}
    section: list[str] = []
    known = {"extent_size": 0, "pe_start": 0, "extent_count": 0}
    for line in _text(read).splitlines():
        if head := _SECTION.search(line):
            section.append(head[1])
        elif line.strip() == "}":
            section.pop()
        elif stripe := _STRIPE.search(line):
            extent = known["extent_size"] * 512
            begin = known["pe_start"] * 512 + int(stripe[1]) * extent
            segments.setdefault(section[2], []).append(Segment(begin, known["extent_count"] * extent))
        elif (number := _NUMBER.search(line)) and number[1] in known:
            if number[1] != "extent_count" or section[-1].startswith("segment"):
                known[number[1]] = int(number[2])
        elif number and number[1] == "lock_args" and len(section) == 3:
            at = _LOCK_AT.search(number[2])
            found[section[2]] = {"lock_at": int(at[1]) if at else 0}
    return {name: Volume(parts, found.get(name, {}).get("lock_at", 0)) for name, parts in segments.items()}


def _text(read: places.Read) -> str:
    return b"".join(read(*piece) for piece in _text_pieces(read)).rstrip(b"\0").decode()


def _text_pieces(read: places.Read) -> list[Segment]:
    area, at, length = _WHERE.unpack(read(_TEXT_AREA + _WHERE_AT, _WHERE.size))
    first = min(length, area - at)
    return [Segment(_TEXT_AREA + at, first), Segment(_TEXT_AREA + _RING_HEAD, length - first)]


class Group(places.Place):
    """The repository in the group of this one disk. `made`: where it is kept as it was made; `scratch`: for data."""

    def __init__(self, disk: str, scratch: Path, made: Path) -> None:
        self._disk = Disk(disk)
        self._scratch = scratch
        self._made = made

    def slots(self, kind: str) -> dict[str, places.Read]:
        (slots,) = volumes(self._disk.read)[SLOTS].segments
        found: dict[str, places.Read] = {}
        table = self._disk.read(slots.begin + _TABLE, _PIECE)
        for number in range(1, _PIECE // _ENTRY.size):
            magic, said, owns, owner = _ENTRY.unpack_from(table, number * _ENTRY.size)
            if owns == _KINDS[kind]:
                assert (magic, said) == (b"VDSMSLT1", number), (magic, said, number)
                found[str(uuid.UUID(bytes=owner))] = self._slot(slots.begin + number * _SLOT)
        return found

    def _slot(self, begin: int) -> places.Read:
        return lambda offset, length: self._disk.read(begin + offset, length)

    def data_names(self) -> list[str]:
        return [name for name in volumes(self._disk.read) if name not in (SLOTS, LOCKS)]

    def data(self, name: str, image_format: str, size_bytes: int) -> Path | None:
        volume = volumes(self._disk.read).get(name)
        if volume is None:
            return None
        content = b"".join(self._disk.read(*segment) for segment in volume.segments)
        if image_format == "raw":
            content = content[:size_bytes]
        path = self._scratch / name
        with path.open("wb") as file:
            for at in range(0, len(content), _PIECE):
                piece = content[at : at + _PIECE]
                if piece.count(0) < len(piece):
                    file.seek(at)
                    file.write(piece)
            file.truncate(len(content))
        return path

    def busy(self) -> list[str]:
        found = volumes(self._disk.read)
        (locks,) = found[LOCKS].segments
        return [
            f"volume {name} is active on some host"
            for name, volume in found.items()
            if name not in (SLOTS, LOCKS)
            and outside.is_held(self._disk.read(locks.begin + volume.lock_at, outside.LEASE_BYTES))
        ]

    def empty(self) -> None:
        self.lay_out(self._made)

    def keep(self, kept: Path) -> None:
        with kept.open("wb") as file:
            for offset, length in _regions(self._disk.read):
                for at in range(offset, offset + length, _PIECE):
                    piece = self._disk.read(at, _PIECE)
                    if piece.count(0) < len(piece):
                        file.seek(at)
                        file.write(piece)
            found = volumes(self._disk.read).values()
            file.truncate(max(sum(segment) for volume in found for segment in volume.segments))

    def lay_out(self, kept: Path) -> None:
        assert self.busy() == []
        for old in self._scratch.iterdir():
            old.unlink()
        with kept.open("rb") as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            for offset, length in _regions(read):
                for at in range(offset, offset + length, _PIECE):
                    wanted = read(at, _PIECE)
                    if self._disk.read(at, _PIECE) != wanted:
                        self._disk.write(at, wanted)


def _regions(read: places.Read) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a scene consists of, by LVM's text in it; what tells where that is, last."""
    found = volumes(read)
    (locks,), (slots,) = found[LOCKS].segments, found[SLOTS].segments
    for number in range(_FIRST_LOCK, _FIRST_LOCK + _LOCKED):
        if number * MIB != found[SLOTS].lock_at:
            yield locks.begin + number * MIB, _PIECE
    yield slots.begin + 2 * MIB, 2 * _PIECE
    for begin in range(slots.begin + _SLOT, slots.begin + slots.length, _SLOT):
        yield from ((begin + at, _PIECE) for at in (0, MIB, 2 * MIB))
    for name, volume in found.items():
        if name not in (LOCKS, SLOTS):
            yield from volume.segments
    for begin, length in _text_pieces(read):
        start = begin // _PIECE * _PIECE
        yield start, -(-(begin + length - start) // _PIECE) * _PIECE
    yield 0, _PIECE
