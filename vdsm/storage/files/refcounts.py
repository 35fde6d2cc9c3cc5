"""Where a qcow2 image ends, as its refcounts say: on a volume nothing else tells.

    header    20: cluster bits, 48: offset of the refcount table, 56: its clusters, 96: refcount order
    table     8 bytes for each block of refcounts, its offset or 0
    block     a cluster of refcounts, 1 << order bits each, one for each cluster of the image

For images of our own, which nobody writes meanwhile. QEMU counts a cluster before anything refers to it, so a crash
leaves clusters that are counted and not used, never the other way round. Three reads, past the page cache: another host
may have been the last that wrote.
"""

import mmap
import os
import struct

from vdsm import errors, sizes
from vdsm.storage.rules import models

_HEADER = struct.Struct(">4sI12xI24xQI")
_ORDER = struct.Struct(">I")
_ENTRY = struct.Struct(">Q")
_TABLE_LIMIT_BYTES = 8 * sizes.MIB  # QEMU's own


def end_bytes(path: str) -> int:
    """The end of the last cluster that is counted. Raises `BadImageFile`, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return _end(fd)
    except (struct.error, ValueError) as error:
        raise errors.BadImageFile(path=path, reason=f"its refcounts cannot be read: {error}") from error
    finally:
        os.close(fd)


def _end(fd: int) -> int:
    first = _read(fd, 0, models.BLOCK_BYTES)
    magic, version, bits, table_offset, table_clusters = _HEADER.unpack_from(first)
    order = _ORDER.unpack_from(first, 96)[0] if version >= 3 else 4
    cluster_bytes: int = 1 << bits
    if magic != b"QFI\xfb" or not 12 <= bits <= 21 or order > 6 or table_clusters * cluster_bytes > _TABLE_LIMIT_BYTES:
        raise ValueError("no header of an image that was made here")
    table = _read(fd, table_offset, table_clusters * cluster_bytes).rstrip(b"\0")
    per_block: int = cluster_bytes * 8 >> order
    for number in range((len(table) - 1) // _ENTRY.size, -1, -1):
        (offset,) = _ENTRY.unpack(table[number * _ENTRY.size :][: _ENTRY.size].ljust(_ENTRY.size, b"\0"))
        counts = _read(fd, offset, cluster_bytes).rstrip(b"\0") if offset else b""
        if counts:
            last: int = (len(counts) * 8 - 1) >> order  # of a byte with several, the last of them: at most 7 too many
            return (number * per_block + last + 1) * cluster_bytes
    raise ValueError("nothing is counted, not even the header")


def _read(fd: int, offset: int, length: int) -> bytes:
    """Whole blocks."""
    with mmap.mmap(-1, length) as aligned:
        done = os.preadv(fd, [aligned], offset)
        if done != length:
            raise ValueError(f"{done} of {length} bytes at {offset}")
        return aligned[:]
