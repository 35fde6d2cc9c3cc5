"""Who owned a lease last: the leader record, with which a sanlock resource begins.

    offset  size
    0       4     magic 0x06152010
    32      8     host id of the owner
    40      8     the owner's generation in the lockspace
    48      8     version: counts the lease's owners

Little endian. sanlock itself tells only of present owners; what is read here stays when they have let go. Each acquire
counts, also when the same process comes again. Standard library only: QEMU's launcher imports it, by `record`.
"""

import mmap
import os
import struct
from typing import NamedTuple

MAGIC = 0x06152010
LEADER = struct.Struct("<I28xQQQ")
BLOCK_BYTES = 4096  # direct I/O needs the sector's size; 4096 serves both kinds of sectors


class Owner(NamedTuple):
    """One owner of a lease. `host_generation` is None where sanlock does not know it: for a while after joining."""

    host_id: int
    host_generation: int | None
    version: int

    def __str__(self) -> str:
        generation = "" if self.host_generation is None else f" in generation {self.host_generation}"
        return f"host {self.host_id}{generation} as owner {self.version}"


def last_owner(path: str, offset: int) -> Owner | None:
    """Of the resource at that place, from storage; None when there is no resource. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:  # direct I/O needs aligned memory
            os.preadv(fd, [buffer], offset)
            magic, *owner = LEADER.unpack_from(buffer)
    finally:
        os.close(fd)
    return Owner(*owner) if magic == MAGIC else None
