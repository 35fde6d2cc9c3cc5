"""Records: what an image or a VM is, kept beside its leases in a slot of its repository.

A slot, the same on files and on block devices:

    offset                 size     what
    0                      1 MiB    data lease: exclusive = may write the data, shared = may rely on it
    1 MiB                  1 MiB    record lease: held for the milliseconds of one read-check-write
    2 MiB                  32 KiB   record, even versions
    2 MiB + 32 KiB         32 KiB   record, odd versions

A record area:

    0      8    magic "VDSMREC1"
    8      8    version, unsigned little endian
    16     4    length of the payload in bytes, unsigned little endian
    20     4    zero
    24     32   SHA-256 of bytes 0 to 23 and the payload
    56     n    payload: JSON object in UTF-8; zeros follow to a multiple of 4096

The valid area with the higher version counts. A write goes to the older area, with direct and synchronous I/O, and is
read back: at every moment one area holds the old record or the new one, and a full file system cannot stop it, since
both areas are allocated when the slot is made. After a crash of the writer one area may be torn; its checksum is wrong
then and the other one counts.

Who may write: whoever holds the record lease, and has read the record under it. Anyone may read at any time.
Standard library (and `leases`) only: QEMU's launcher reads records too.

Each write under the record lease says who wrote: `writer` is {"host_id", "boot_id", "host_generation",
"lease_version"}, the last two as of the record lease (`leader.Owner`). Whoever comes next compares them with the lease
(trap 30). A lease may have had owners that wrote nothing, so an older version is right; a newer one, or the same
version of another owner, was written by somebody who did not own the lease. The first record has no lease version, nor
has one that an older agent wrote: there is nothing to compare.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vdsm import errors, leader, leases

Record = dict[str, Any]

RECORD_OFFSET = 2 * leases.LEASE_BYTES
AREA_BYTES = 32 << 10
SLOT_BYTES = RECORD_OFFSET + 2 * AREA_BYTES
BLOCK_BYTES = 4096  # direct I/O needs the sector's size; 4096 serves both kinds of sectors

MAGIC = b"VDSMREC1"
HEAD = struct.Struct("<8sQII")
PAYLOAD_OFFSET = HEAD.size + hashlib.sha256().digest_size
MAX_PAYLOAD_BYTES = AREA_BYTES - PAYLOAD_OFFSET

# The record lease is only ever held for a read and a write, so a wait is short; longer means that its holder's
# storage hangs.
RECORD_WAIT_S = 10.0


class Slot(NamedTuple):
    """Where one entity's leases and record are. `name` is the entity's id."""

    lockspace: str
    name: str
    path: str
    offset: int

    def data_lease(self, *, shared: bool = False) -> leases.Lease:
        return leases.Lease(self.lockspace, self.name, self.path, self.offset, shared)

    def record_lease(self) -> leases.Lease:
        return leases.Lease(self.lockspace, f"{self.name}.record", self.path, self.offset + leases.LEASE_BYTES)


@functools.cache
def boot_id() -> str:
    """This host's life: another after each boot, so that work of a life before is known to be dead."""
    with open("/proc/sys/kernel/random/boot_id") as source:  # noqa: PTH123 (pathlib costs QEMU's launcher start-up)
        return source.read().strip()


def encode(record: Record) -> bytes:
    """The area that holds `record`, whose `version` it carries; padded to whole blocks."""
    payload = json.dumps(record, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise errors.InvalidParameters(parameter="userData", reason="the record would not fit into its slot")
    head = HEAD.pack(MAGIC, record["version"], len(payload), 0)
    area = head + hashlib.sha256(head + payload).digest() + payload
    return area.ljust(-(-len(area) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")


def decode(area: bytes) -> Record | None:
    """The record of an area, or None when it is empty, torn or damaged."""
    magic, version, length, _ = HEAD.unpack_from(area)
    if magic != MAGIC or length > MAX_PAYLOAD_BYTES:
        return None
    payload = area[PAYLOAD_OFFSET : PAYLOAD_OFFSET + length]
    if hashlib.sha256(area[: HEAD.size] + payload).digest() != area[HEAD.size : PAYLOAD_OFFSET]:
        return None
    record: Record = json.loads(payload)
    return record if record["version"] == version else None


def read(slot: Slot) -> Record:
    """The slot's record. Raises `NoRecord` (no valid area) or OSError. Needs no lease."""
    with _Area(slot, os.O_RDONLY) as area:
        return _newest(slot, area)


def create(slot: Slot, fields: Record) -> Record:
    """Writes the first record of a new entity (version 1) and returns it. The caller holds the repository lease."""
    with _Area(slot, os.O_RDWR) as area:
        area.clear()
        return area.write({**fields, "version": 1})


def update(session: leases.Session, slot: Slot, change: Callable[[Record], Record | None]) -> Record:
    """One read-check-write under the record lease; returns the record as it then is.

    `change` gets the present record and returns the new one, None for "leave it", or raises to refuse. When the other
    area is empty or torn, both are written, one after the other, so that a dead writer's torn area does not stay. The
    first of these writes is the one that counts: a caller is never told that it failed because the second one did.

    `writer` is set here. Raises `RecordNotOwned` when the one before cannot have owned the lease, and when this process
    does not: `LeaseFailed`. Nothing is changed then.
    """
    with _writing(session, slot) as (area, known, owner):
        _compare(known, owner)
        return _change(area, known, owner, change)


def check_writer(slot: Slot) -> None:
    """Raises `RecordNotOwned` unless the record was written by an owner of its lease; for whoever is about to end, take
    over or remove what another has begun. Needs no lease. No record: nothing to compare.

    The record is read first: its writer has owned the lease before, so what is right never looks wrong.
    """
    try:
        known = read(slot)
        owner = leader.last_owner(slot.path, slot.record_lease().offset)
    except (errors.NoRecord, FileNotFoundError):
        return
    if owner is not None:
        _compare(known, owner)


def adopt(session: leases.Session, slot: Slot) -> Record:
    """Writes the record as it is, whoever wrote it: it was looked at, and is right. Killed: done or not done."""
    with _writing(session, slot) as (area, known, owner):
        return _change(area, known, owner, lambda same: same)


def _compare(known: Record, owner: leader.Owner) -> None:
    """`owner` owns the record lease now, or owned it last."""
    said = known.get("writer") or {}
    if said.get("lease_version") is None:
        return
    writer = leader.Owner(said.get("host_id", 0), said.get("host_generation"), said["lease_version"])
    if writer.version > owner.version or (writer.version == owner.version and not _is_same(writer, owner)):
        raise errors.RecordNotOwned(entity=known.get("id"), writer=str(writer), owner=str(owner))


def _is_same(one: leader.Owner, other: leader.Owner) -> bool:
    unknown = None in (one.host_generation, other.host_generation)
    return one.host_id == other.host_id and (unknown or one.host_generation == other.host_generation)


@contextlib.contextmanager
def _writing(session: leases.Session, slot: Slot) -> Iterator[tuple["_Area", Record, leader.Owner]]:
    """Under the record lease: (area, the present record, this process as the lease's owner)."""
    lease = slot.record_lease()
    with session.holding([lease], RECORD_WAIT_S, patient=True), _Area(slot, os.O_RDWR) as area:
        yield area, _newest(slot, area), session.owner(lease)


def _change(area: "_Area", known: Record, owner: leader.Owner, change: Callable[[Record], Record | None]) -> Record:
    new = change(json.loads(json.dumps(known)))
    if new is None:
        return known
    generation, version = owner.host_generation, owner.version
    who = {"host_id": owner.host_id, "boot_id": boot_id(), "host_generation": generation, "lease_version": version}
    new = {**new, "writer": who}
    written = area.write({**new, "version": known["version"] + 1})
    if area.damaged:
        with contextlib.suppress(OSError, errors.RecordChanged):
            written = area.write({**new, "version": known["version"] + 2})
    return written


def erase(slot: Slot) -> None:
    """Makes the slot empty. The caller holds the repository lease and the data lease."""
    with _Area(slot, os.O_RDWR) as area:
        area.read()
        area.clear()


def _newest(slot: Slot, area: "_Area") -> Record:
    valid = [record for record in area.read() if record is not None]
    if not valid:
        raise errors.NoRecord(path=slot.path, reason="no valid area")
    return max(valid, key=lambda record: int(record["version"]))


class _Area:
    """Both record areas of a slot, opened for direct and synchronous I/O."""

    def __init__(self, slot: Slot, mode: int) -> None:
        self._slot = slot
        self._mode = mode
        self.damaged = False
        self._found: list[Record | None] = [None, None]

    def __enter__(self) -> "_Area":
        self._fd = os.open(self._slot.path, self._mode | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        self._offset = self._slot.offset + RECORD_OFFSET
        self._buffer = mmap.mmap(-1, 2 * AREA_BYTES)  # direct I/O needs aligned memory
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.close()
        os.close(self._fd)

    def read(self) -> list[Record | None]:
        if os.preadv(self._fd, [self._buffer], self._offset) != 2 * AREA_BYTES:
            return [None, None]
        self._found = [decode(self._buffer[at : at + AREA_BYTES]) for at in (0, AREA_BYTES)]
        self.damaged = None in self._found
        return self._found

    def _version(self, at: int) -> int:
        known = self._found[at // AREA_BYTES]
        return known["version"] if known else 0

    def write(self, record: Record) -> Record:
        data = encode(record)
        at = record["version"] % 2 * AREA_BYTES
        self._put(data, at)
        os.preadv(self._fd, [self._buffer], self._offset)
        if self._buffer[at : at + len(data)] != data:
            raise errors.RecordChanged(entity=self._slot.name)
        return record

    def clear(self) -> None:
        """Empties both areas, the older one first: a crash between must not bring an old record back."""
        for at in sorted((0, AREA_BYTES), key=self._version):
            self._put(bytes(BLOCK_BYTES), at)

    def _put(self, data: bytes, at: int) -> None:
        self._buffer[: len(data)] = data
        view = memoryview(self._buffer)[: len(data)]
        try:
            os.pwritev(self._fd, [view], self._offset + at)
        finally:
            view.release()
