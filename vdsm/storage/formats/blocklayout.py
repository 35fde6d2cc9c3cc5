"""A repository on a group of volumes. What block formats share; how the group comes to this host is theirs.

    volume `vdsm`           slots of 3 MiB: slot i at i * 3 MiB
      slot 0                the repository's own: lockspace at 0, repository lease at 1 MiB, header at 2 MiB, and the
                            table of the other slots (`slottable.py`) behind it, at 2 MiB + 64 KiB
      slot i                an image's or a VM's, laid out as `vdsm/record.py` has it; 960 KiB at its end are unused
    volume ID.8HEX          data, made under the data lease of image ID. Never renamed; some record names it

A slot's number changes hands, ids do not. Leases are taken by id at the number's place, so one that was looked up too
early fails by its name; a record tells whose it is. A slot is taken back with both its leases cleared, while its last
owner holds them, so nobody is at them; and one that was never used is emptied when it is given out, for a volume holds
what lay there before (trap 40).

The volume `vdsm` grows under the repository lease; other hosts look again when a slot lies beyond what they see of it.
"""

import contextlib
import errno
import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import ClassVar

from vdsm import errors, ids, leases, record, sizes
from vdsm.storage import repository
from vdsm.storage.files import qemuimg, refcounts
from vdsm.storage.formats import slottable, volumes
from vdsm.storage.rules import models, rooms

SLOT_BYTES = 3 * sizes.MIB  # sanlock wants leases at multiples of 1 MiB
TABLE_OFFSET = record.SLOT_BYTES
SLOTS_VOLUME = "vdsm"
# The volume `vdsm` is made with room for this many slots, and grows by as many.
SLOTS_AT_ONCE = 32
# For the repository lease: under it the volume grows, for which LVM waits for the group's lock (seconds).
_TABLE_WAIT_S = 45.0
# How often (seconds) the monitor asks for the space. With LVM that is a command, which took most of a look's time.
SPACE_S = 30.0
_OWN_SLOT = "repository"  # what its two leases are called after
_DATA_NAME = re.compile(ids.UUID_PATTERN.removesuffix("$") + r"\.[0-9a-f]{8}$")
_OWNERS = {slottable.IMAGE: "an image", slottable.VM: "a VM"}


class BlockLayout(repository.Repository):
    """`group` and `users` belong to this object, which is one process's."""

    abilities: ClassVar[repository.Abilities] = repository.Abilities(shared=True, thin=False)

    def __init__(self, description: repository.Description, group: volumes.Group) -> None:
        super().__init__(description)
        self._group = group
        self._users = volumes.Users(group, description["use_dir"])
        self._slots = group.path(SLOTS_VOLUME)
        self._chunk_bytes: int = description["chunk_bytes"]
        self._seen_space: tuple[float, repository.Space] | None = None

    # -- places

    def lockspace(self) -> leases.Lockspace:
        return leases.Lockspace(self.name, self._slots, 0, self.host_id)

    def lease(self) -> leases.Lease:
        return self._own_slot().record_lease()

    def data_path(self, name: str) -> str:
        return self._group.path(_checked(name))

    def layer(self, data: dict[str, str], size_bytes: int) -> qemuimg.Layer:
        return qemuimg.Layer(self.data_path(data["name"]), data["format"], size_bytes, self._group.driver)

    def _own_slot(self) -> record.Slot:
        return record.Slot(self.name, _OWN_SLOT, self._slots, 0)

    def _table(self) -> slottable.Table:
        return slottable.Table(self._slots, self.name, TABLE_OFFSET, SLOT_BYTES - TABLE_OFFSET)

    # -- the repository

    def format_(self, io_timeout_s: int) -> record.Record:
        """See `Repository.format_`. The header is written last: a volume `vdsm` without one is a dead formatter's, and
        is made anew. One that another host is just formatting is active there and cannot be removed."""
        found = self._group.volumes()
        if strange := sorted(found.keys() - {SLOTS_VOLUME}):
            raise errors.NotEmpty(place=self.place, reason=f"it holds the volume {strange[0]}")
        if SLOTS_VOLUME in found:
            self._remove_headless()
        self.name = ids.new()
        try:
            self._group.create(SLOTS_VOLUME, SLOTS_AT_ONCE * SLOT_BYTES)
        except FileExistsError as error:
            raise errors.NotEmpty(place=self.place, reason="it was formatted at the same time") from error
        return self._make_header(io_timeout_s)

    def _remove_headless(self) -> None:
        self._group.activate(SLOTS_VOLUME)
        with contextlib.suppress(errors.NoRecord):
            known = record.read(self._own_slot())
            raise errors.NotEmpty(place=self.place, reason=f"it holds the repository {known['name']}")
        obstacle = self._group.remove(SLOTS_VOLUME)
        if obstacle:
            raise errors.NotEmpty(place=self.place, reason=f"its volume {SLOTS_VOLUME} is {obstacle}")

    def _make_header(self, io_timeout_s: int) -> record.Record:
        with _opened(self._slots) as volume:
            volume.zero(0, SLOT_BYTES)
            self.sector_bytes = volume.sector_bytes()
        leases.write_lockspace(self.lockspace(), io_timeout_s, self.sector_bytes)
        leases.initialise(self.lease(), self.sector_bytes)
        self._table().write(0, slottable.OWN, self.name)
        kept = {"name": self.name, "format": self.format, "created": int(time.time())}
        return record.create(
            self._own_slot(), {**kept, "io_timeout_s": io_timeout_s, "sector_bytes": self.sector_bytes}
        )

    def header(self) -> record.Record:
        try:
            found = record.read(self._own_slot())
        except (errors.NoRecord, FileNotFoundError) as error:
            raise errors.NotARepository(place=self.place, repo_format=self.format, reason="no header") from error
        if found["format"] != self.format:
            raise errors.NotARepository(
                place=self.place, repo_format=self.format, reason=f"its format is {found['format']}"
            )
        return {**found, "place": self.place}

    def space(self) -> repository.Space:
        return repository.Space(*self._group.space())

    def recent_space(self) -> repository.Space:
        """At most `SPACE_S` old."""
        now = time.monotonic()
        if self._seen_space is None or now - self._seen_space[0] >= SPACE_S:
            self._seen_space = (now, self.space())
        return self._seen_space[1]

    # -- slots

    def slot(self, image_id: str) -> record.Slot:
        return self._find_slot(slottable.IMAGE, image_id)

    def vm_slot(self, vm_id: str) -> record.Slot:
        return self._find_slot(slottable.VM, vm_id)

    def _find_slot(self, kind: int, owner: str) -> record.Slot:
        entry = self._table().find(kind, ids.check_uuid(owner, "id"))
        if entry is None:
            return record.Slot(self.name, owner, f"{self._slots}.none", 0)
        self._see(entry.number)
        return self._place(entry.number, owner)

    def _place(self, number: int, owner: str) -> record.Slot:
        return record.Slot(self.name, owner, self._slots, number * SLOT_BYTES)

    def _see(self, number: int) -> None:
        """The slot's place can be read on this host: another host may have made the volume larger."""
        if self._seen_bytes() < (number + 1) * SLOT_BYTES:
            self._group.activate(SLOTS_VOLUME)

    def _seen_bytes(self) -> int:
        with _opened(self._slots, os.O_RDONLY) as volume:
            return volume.size_bytes

    def image_ids(self) -> list[str]:
        return self._ids(slottable.IMAGE)

    def vm_ids(self) -> list[str]:
        return self._ids(slottable.VM)

    def _ids(self, kind: int) -> list[str]:
        return [entry.id for entry in self._table().entries() if entry.kind == kind]

    def images(self) -> dict[str, record.Record]:
        return self._records(slottable.IMAGE)

    def vms(self) -> dict[str, record.Record]:
        return self._records(slottable.VM)

    def _records(self, kind: int) -> dict[str, record.Record]:
        """By one look at the table."""
        entries = [entry for entry in self._table().entries() if entry.kind == kind]
        if entries:
            self._see(entries[-1].number)
        found = {entry.id: self._find(self._place(entry.number, entry.id)) for entry in entries}
        return {owner: known for owner, known in found.items() if known is not None}

    def allocate(self, session: leases.Session, image_id: str) -> record.Slot:
        return self._allocate(session, slottable.IMAGE, image_id)

    def allocate_vm(self, session: leases.Session, vm_id: str) -> record.Slot:
        return self._allocate(session, slottable.VM, vm_id)

    def _allocate(self, session: leases.Session, kind: int, owner: str) -> record.Slot:
        table = self._table()
        with session.holding([self.lease()], _TABLE_WAIT_S, patient=True):
            entry = table.find(kind, ids.check_uuid(owner, "id"))
            if entry is None:
                self._refuse_taken(table, kind, owner)
                number = self._prepare(table)
                table.write(number, kind, owner)
            else:
                number = entry.number
                self._see(number)
            slot = self._place(number, owner)
            leases.initialise(slot.data_lease(), self.sector_bytes)
            leases.initialise(slot.record_lease(), self.sector_bytes)
        return slot

    def _refuse_taken(self, table: slottable.Table, kind: int, owner: str) -> None:
        for other, words in _OWNERS.items():
            if other != kind and table.find(other, owner) is not None:
                raise errors.IdTaken(id=owner, owner=words, repo_id=self.repo_id)

    def _prepare(self, table: slottable.Table) -> int:
        """The number of an empty slot that is nobody's, and lies in the volume."""
        found = table.unused()
        if found is None:
            raise errors.RepositoryFull(repo_id=self.repo_id)
        number, used_before = found
        self._see(number)
        if self._seen_bytes() < (number + 1) * SLOT_BYTES:
            with self._naming_full():
                self._group.extend(SLOTS_VOLUME, (number + SLOTS_AT_ONCE) * SLOT_BYTES)
        if not used_before:
            with _opened(self._slots) as volume:
                volume.zero(number * SLOT_BYTES, SLOT_BYTES)
        return number

    def free(self, session: leases.Session, slot: record.Slot) -> None:
        """See `Repository.free`. Takes the record lease too, unless it is held: who waits for it must not get it at a
        place that is another's. A crash before the last step leaves a slot without a record, as any crash does."""
        lease = slot.record_lease()
        held = (lease.lockspace, lease.name, False) in session.held()
        with session.holding([self.lease()], _TABLE_WAIT_S, patient=True):
            with contextlib.nullcontext() if held else session.holding([lease], record.RECORD_WAIT_S, patient=True):
                record.erase(slot)
                leases.clear(slot.data_lease(), self.sector_bytes)
                leases.clear(lease, self.sector_bytes)
            self._table().write(slot.offset // SLOT_BYTES, slottable.FREE, None)

    # -- data

    def data_names(self, image_id: str = "") -> list[str]:
        return list(self._sizes(image_id))

    def data_sizes(self) -> dict[str, int]:
        return self._sizes("")

    def allocated_bytes(self, name: str) -> int:
        return self._sizes(_checked(name)).get(name, 0)

    def _sizes(self, prefix: str) -> dict[str, int]:
        found = self._group.volumes(prefix)
        return {name: volume.size_bytes for name, volume in found.items() if _DATA_NAME.fullmatch(name)}

    @contextlib.contextmanager
    def making(self, name: str, room_bytes: int) -> Iterator[str]:
        """See `Repository.making`. A dead maker's volume is used again: it may be active on the host where it died.
        What lies behind the room, and in the last block of it, is zero: tools that do not know the image's size see
        it, and a source that ends within a block does not write that to its end."""
        room_bytes = sizes.round_up(room_bytes, models.BLOCK_BYTES)
        made = self._users.making(_checked(name), room_bytes)
        with self._naming_full(), made, _opened(self.data_path(name)) as volume:
            last = room_bytes - models.BLOCK_BYTES
            volume.zero(0, models.BLOCK_BYTES)
            volume.zero(last, volume.size_bytes - last)
            yield self.data_path(name)
            volume.flush()

    @contextlib.contextmanager
    def changing(self, name: str, room_bytes: int = 0) -> Iterator[str]:
        path = self.data_path(name)
        with self._naming_full(), self._users.using([name], room_bytes), _opened(path) as volume:
            yield path
            volume.flush()

    def first_room(self, data_format: str, size_bytes: int) -> int:
        most_bytes = super().first_room(data_format, size_bytes)
        return most_bytes if data_format == models.RAW else rooms.room(0, self._chunk_bytes, most_bytes)

    def grow(self, data: dict[str, str], size_bytes: int, written_bytes: int | None) -> int | None:
        """See `Repository.grow`. Raw data has its size from the beginning."""
        if data["format"] == models.RAW:
            return None
        most_bytes = qemuimg.most_bytes(data["format"], size_bytes)
        with _opened(self.data_path(data["name"]), os.O_RDONLY) as volume:
            room_bytes = volume.size_bytes
        written_bytes = room_bytes if written_bytes is None else written_bytes
        if written_bytes >= rooms.asks_at(room_bytes, self._chunk_bytes, most_bytes):
            with self._naming_full():
                wanted_bytes = rooms.room(written_bytes, self._chunk_bytes, most_bytes)
                room_bytes = self._group.extend(data["name"], wanted_bytes)
        return rooms.asks_at(room_bytes, self._chunk_bytes, most_bytes)

    def written_bytes(self, data: dict[str, str]) -> int:
        return 0 if data["format"] == models.RAW else refcounts.end_bytes(self.data_path(data["name"]))

    @contextlib.contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        with self._users.using([_checked(name) for name in names]):
            yield

    def keeping(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        return self._users.keeping([_checked(name) for name in names])

    def remove_data(self, name: str) -> None:
        obstacle = self._users.remove(_checked(name))
        if obstacle:
            raise errors.ImageInUse(image_id=models.maker(name), holder=f"a host: its volume {name} is {obstacle}")

    def sweep(self) -> list[str]:
        """Deactivates what is active on this host although nobody here uses it, as a killed process leaves it; names
        of it. Until then other hosts cannot remove it."""
        return self._users.sweep(keep=SLOTS_VOLUME)

    @contextlib.contextmanager
    def _naming_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise errors.RepositoryFull(repo_id=self.repo_id) from error
            raise


def _checked(name: str) -> str:
    """Names come from records that any host may have written: none leads elsewhere."""
    if not _DATA_NAME.fullmatch(name):
        raise errors.InvalidParameters(parameter="data", reason="not a name of data")
    return name


class _Device:
    """A volume that is open, past the page cache."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size_bytes = os.lseek(fd, 0, os.SEEK_END)

    def zero(self, offset: int, length: int) -> None:
        """Whole blocks."""
        with mmap.mmap(-1, sizes.MIB) as nothing:  # direct I/O needs aligned memory
            while length > 0:
                with memoryview(nothing)[: min(length, sizes.MIB)] as piece:
                    done = os.pwritev(self._fd, [piece], offset)
                offset, length = offset + done, length - done

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def sector_bytes(self) -> int:
        """512, unless direct I/O refuses what is not a multiple of 4096."""
        with mmap.mmap(-1, models.BLOCK_BYTES) as page, memoryview(page)[:512] as sector:
            try:
                os.preadv(self._fd, [sector], 512)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return 4096
        return 512


@contextlib.contextmanager
def _opened(path: str, mode: int = os.O_RDWR) -> Iterator[_Device]:
    fd = os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield _Device(fd)
    finally:
        os.close(fd)
