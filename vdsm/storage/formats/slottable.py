"""Which slot of a repository on a volume is whose: a table in the third MiB of the volume's first slot.

    offset from the table's begin    size
    i * 64                           64     entry of slot i

An entry:

    0      8    magic "VDSMSLT1"
    8      4    i, unsigned little endian
    12     4    kind, unsigned little endian: 0 free, 1 image, 2 VM, 3 the repository's own slot (entry 0 alone)
    16     16   id: the UUID's bytes; zeros when it is free
    32     16   zeros
    48     16   the first bytes of the SHA-256 of the repository's name (36 letters) and bytes 0 to 47

64 zeros are the entry of a slot that was never used. Slots are given out from the first on, so the table ends where a
whole block of 4096 bytes is zero.

No entry lies across the border of two sectors, and a write leaves all other entries of its block as they were. So a
write that is cut off leaves the old table or the new one, also where the sectors of its block are written one by one.
An entry with a wrong checksum was written by nobody who keeps these rules. It is given to nobody, and an id that is not
found beside one is no "there is none": that raises.

Whoever writes holds the repository lease; anyone may read at any time. What was read may be another's a moment later:
leases are known by their names, records say whose they are.
"""

import errno
import functools
import hashlib
import mmap
import os
import struct
import uuid
from collections.abc import Iterator
from typing import NamedTuple

ENTRY_BYTES = 64
FREE, IMAGE, VM, OWN = range(4)

_MAGIC = b"VDSMSLT1"
_ENTRY = struct.Struct("<8sII16s16x")
_OWNER = struct.Struct("<I16s")
_OWNER_OFFSET = 12
_NOBODY = bytes(16)
_NEVER = bytes(ENTRY_BYTES)
# Direct I/O needs the sector's size; 4096 serves both kinds.
_BLOCK_BYTES = 4096
_END = bytes(_BLOCK_BYTES)
# What is read at once: the entries of 1,024 slots.
_CHUNK_BYTES = 64 << 10


class Damaged(OSError):
    """The table has an entry that nobody has written."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.EUCLEAN, f"entry {number} of the slot table is damaged")


class Entry(NamedTuple):
    number: int
    kind: int
    id: str


def encode(name: str, number: int, kind: int, owner: str | None) -> bytes:
    """The entry of slot `number` in the repository `name`."""
    content = _ENTRY.pack(_MAGIC, number, kind, uuid.UUID(owner).bytes if owner else _NOBODY)
    return content + _checksum(name, content)


@functools.lru_cache(maxsize=1 << 14)
def decode(name: str, number: int, data: bytes) -> Entry | None:
    """None when the slot was never used. Raises `Damaged`.

    What was decoded once is known by its bytes: who looks for an id that is not there decodes all entries.
    """
    if data == _NEVER:
        return None
    magic, said, kind, owner = _ENTRY.unpack_from(data)
    if (magic, said) != (_MAGIC, number) or kind > OWN or data[_ENTRY.size :] != _checksum(name, data[: _ENTRY.size]):
        raise Damaged(number)
    return Entry(number, kind, str(uuid.UUID(bytes=owner)))


def _checksum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()[: ENTRY_BYTES - _ENTRY.size]


class Table:
    """The table of repository `name` in the file or device `path`. Methods block as long as the storage does, and raise
    OSError."""

    def __init__(self, path: str, name: str, offset: int, size_bytes: int) -> None:
        self._path = path
        self._name = name
        self._offset = offset
        self.places = size_bytes // ENTRY_BYTES

    def find(self, kind: int, owner: str) -> Entry | None:
        """The entry of that owner. Raises `Damaged` when there is none, and one that cannot be read may be it."""
        data = self._read()
        wanted = _OWNER.pack(kind, uuid.UUID(owner).bytes)
        at = data.find(wanted)
        while at >= 0:
            number, inside = divmod(at, ENTRY_BYTES)
            if inside == _OWNER_OFFSET:
                return decode(self._name, number, data[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES])
            at = data.find(wanted, at + 1)
        for _ in self._decoded(data):
            pass
        return None

    def entries(self) -> list[Entry]:
        """All slots that were used ever, in their order. Raises `Damaged`."""
        return list(self._decoded(self._read()))

    def unused(self) -> tuple[int, bool] | None:
        """(number of a slot that is nobody's, whether it was somebody's before); None when all are taken. Damaged ones
        are passed over."""
        data = self._read()
        for number in range(self.places):
            raw = data[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES]
            if raw == _NEVER:
                return number, False
            try:
                entry = decode(self._name, number, raw)
            except Damaged:
                continue
            if entry is not None and entry.kind == FREE:
                return number, True
        return None

    def write(self, number: int, kind: int, owner: str | None) -> None:
        """Writes one entry, on stable storage at return. The caller holds the repository lease."""
        begin, inside = divmod(number * ENTRY_BYTES, _BLOCK_BYTES)
        offset = self._offset + begin * _BLOCK_BYTES
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, _BLOCK_BYTES) as block:  # direct I/O needs aligned memory
                _whole(os.preadv(fd, [block], offset), _BLOCK_BYTES)
                block[inside : inside + ENTRY_BYTES] = encode(self._name, number, kind, owner)
                written = bytes(block)
                _whole(os.pwritev(fd, [block], offset), _BLOCK_BYTES)
                _whole(os.preadv(fd, [block], offset), _BLOCK_BYTES)
                if bytes(block) != written:
                    raise OSError(errno.EIO, "the slot table was read back otherwise than it was written")
        finally:
            os.close(fd)

    def _decoded(self, data: bytes) -> Iterator[Entry]:
        for number in range(len(data) // ENTRY_BYTES):
            entry = decode(self._name, number, data[number * ENTRY_BYTES : (number + 1) * ENTRY_BYTES])
            if entry is not None:
                yield entry

    def _read(self) -> bytes:
        """The table up to its end; at least one block."""
        found = bytearray()
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, _CHUNK_BYTES) as chunk:
                while len(found) < self.places * ENTRY_BYTES:
                    _whole(os.preadv(fd, [chunk], self._offset + len(found)), _CHUNK_BYTES)
                    found += chunk
                    if found.endswith(_END):
                        break
        finally:
            os.close(fd)
        return bytes(found)


def _whole(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(errno.EIO, "the slot table is cut short")
