"""A repository in a directory of a file system. What file formats share; how they come by the directory is theirs.

    PLACE/repository        lockspace at 0, repository lease at 1 MiB, header at 2 MiB: laid out like a slot
    PLACE/images/ID         slot of an image (`vdsm/record.py` has the layout), allocated whole when it is made
    PLACE/vms/ID            slot of a VM
    PLACE/data/ID.8HEX      data, made under the data lease of image ID. Never renamed; some record names it

Directories are 2770 and files 0660: the set-group-id bit gives all that is made here the group of PLACE, by which QEMU
reaches it. The umask has no say.

The header is a record with the fields name, format, io_timeout_s, sector_bytes and created, written once.
"""

import contextlib
import errno
import mmap
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vdsm import errors, ids, leases, record
from vdsm.storage import repository
from vdsm.storage.files import qemuimg
from vdsm.storage.rules import models

DIRECTORIES = ("images", "vms", "data")
DIRECTORY_MODE, FILE_MODE = 0o2770, 0o660
_HEADER = "repository"
_NOBODY = ".nobody"  # the name of nothing
# What an empty place may hold besides our empty directories: what mkfs makes, and what a dead formatter left.
_NOTHING = re.compile(r"lost\+found|\.repository\..*")
_DATA_NAME = re.compile(ids.UUID_PATTERN.removesuffix("$") + r"\.[0-9a-f]{8}$")


class FileLayout(repository.Repository):
    # -- places

    def lockspace(self) -> leases.Lockspace:
        return leases.Lockspace(self.name, f"{self.place}/{_HEADER}", 0, self.host_id)

    def lease(self) -> leases.Lease:
        return self._header_slot(f"{self.place}/{_HEADER}").record_lease()

    def _slot(self, directory: str, name: str) -> record.Slot:
        """Ids come from callers, names of data from records that any host may have written: none leads elsewhere."""
        return record.Slot(self.name, name, f"{self.place}/{directory}/{ids.check_uuid(name, 'id')}", 0)

    def data_path(self, name: str) -> str:
        if not _DATA_NAME.fullmatch(name):
            raise errors.InvalidParameters(parameter="data", reason="not a name of data")
        return f"{self.place}/data/{name}"

    def layer(self, data: dict[str, str], size_bytes: int) -> qemuimg.Layer:
        return qemuimg.Layer(self.data_path(data["name"]), data["format"])

    def _header_slot(self, path: str) -> record.Slot:
        """The repository's own file as a slot: its "record lease" is the repository lease."""
        return record.Slot(self.name, _HEADER, path, 0)

    # -- the repository

    def format_(self, io_timeout_s: int) -> record.Record:
        """See `Repository.format_`. The header's file is made under a name of its own and linked to its place last:
        a crash before that leaves a place that counts as empty; one after it, a second name of the header, which the
        next one who is refused takes away."""
        try:
            self._check_empty()
        except errors.NotEmpty:
            self._unlink_made(Path(self.place, _HEADER))
            raise
        self.name = ids.new()
        made = Path(self.place, f".{_HEADER}.{self.name}")
        try:
            for name in DIRECTORIES:
                _make_directory(Path(self.place, name))
            header = self._make_header(str(made), io_timeout_s)
            os.link(made, Path(self.place, _HEADER))
        except (FileExistsError, FileNotFoundError) as error:  # another's header is there, or has tidied ours away
            raise errors.NotEmpty(place=self.place, reason="it was formatted at the same time") from error
        finally:
            self._unlink_made()
            _flush(self.place)
        return header

    def _unlink_made(self, header: Path | None = None) -> None:
        """Takes away what was made under names of its own: all of it, or only names of `header`."""
        for left in Path(self.place).glob(f".{_HEADER}.*"):
            with contextlib.suppress(FileNotFoundError):  # another formatter was quicker
                if header is None or left.samefile(header):
                    left.unlink()

    def _check_empty(self) -> None:
        try:
            found = set(_names(self.place))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise errors.NotARepository(
                place=self.place, repo_format=self.format, reason="there is no such directory"
            ) from error
        full = [name for name in DIRECTORIES if name in found and _names(f"{self.place}/{name}")]
        strange = [name for name in found - set(DIRECTORIES) if not _NOTHING.fullmatch(name)]
        if full or strange:
            raise errors.NotEmpty(place=self.place, reason=f"it holds {min(full + strange)}")

    def _make_header(self, path: str, io_timeout_s: int) -> record.Record:
        slot = self._header_slot(path)
        self._make_slot_file(path)
        self.sector_bytes = _sector_bytes(path)
        space = leases.Lockspace(self.name, path, 0, self.host_id)
        leases.write_lockspace(space, io_timeout_s, self.sector_bytes)
        leases.initialise(slot.record_lease(), self.sector_bytes)
        kept = {"name": self.name, "format": self.format, "created": int(time.time())}
        return record.create(slot, {**kept, "io_timeout_s": io_timeout_s, "sector_bytes": self.sector_bytes})

    def header(self) -> record.Record:
        try:
            found = record.read(self._header_slot(f"{self.place}/{_HEADER}"))
        except (errors.NoRecord, FileNotFoundError, NotADirectoryError) as error:
            raise errors.NotARepository(place=self.place, repo_format=self.format, reason="no header") from error
        if found["format"] != self.format:
            raise errors.NotARepository(
                place=self.place, repo_format=self.format, reason=f"its format is {found['format']}"
            )
        return {**found, "place": self.place}

    def space(self) -> repository.Space:
        found = os.statvfs(self.place)
        return repository.Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def check_writable(self) -> None:
        """See `Repository.check_writable`. Who takes a name away is let in by the file system first, also when there is
        no such name: that waits while it is frozen, and fails when it is read-only by now. Reads go on in both."""
        with contextlib.suppress(FileNotFoundError):
            Path(self.place, _NOBODY).unlink()

    # -- slots

    def slot(self, image_id: str) -> record.Slot:
        return self._slot("images", image_id)

    def vm_slot(self, vm_id: str) -> record.Slot:
        return self._slot("vms", vm_id)

    def image_ids(self) -> list[str]:
        return [name for name in _names(f"{self.place}/images") if re.fullmatch(ids.UUID_PATTERN, name)]

    def vm_ids(self) -> list[str]:
        return [name for name in _names(f"{self.place}/vms") if re.fullmatch(ids.UUID_PATTERN, name)]

    def allocate(self, session: leases.Session, image_id: str) -> record.Slot:
        return self._allocate(session, self.slot(image_id))

    def allocate_vm(self, session: leases.Session, vm_id: str) -> record.Slot:
        return self._allocate(session, self.vm_slot(vm_id))

    def _allocate(self, session: leases.Session, slot: record.Slot) -> record.Slot:
        with session.holding([self.lease()], repository.LEASE_WAIT_S, patient=True):
            known = os.path.lexists(slot.path)  # under the repository lease: the truth
            if not known:
                self._refuse_taken(slot)
            try:
                self._make_slot_file(slot.path)
            except OSError as error:
                if not known:
                    Path(slot.path).unlink(missing_ok=True)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise errors.RepositoryFull(repo_id=self.repo_id) from error
                raise
            leases.initialise(slot.data_lease(), self.sector_bytes)
            leases.initialise(slot.record_lease(), self.sector_bytes)
        return slot

    def _refuse_taken(self, wanted: record.Slot) -> None:
        for owner, slot in (("an image", self.slot(wanted.name)), ("a VM", self.vm_slot(wanted.name))):
            if slot != wanted and os.path.lexists(slot.path):
                raise errors.IdTaken(id=wanted.name, owner=owner, repo_id=self.repo_id)

    def _make_slot_file(self, path: str) -> None:
        """A file of a slot's size, all of it allocated and the record areas written: an area must never need space
        again, also not the space with which a file system turns promised blocks into written ones (trap 20). It has
        its full length last, so a shorter file is one whose maker died."""
        with _opened(path, os.O_RDWR | os.O_CREAT) as fd:
            if os.fstat(fd).st_size < record.SLOT_BYTES:
                os.posix_fallocate(fd, 0, record.RECORD_OFFSET)
                os.pwrite(fd, bytes(2 * record.AREA_BYTES), record.RECORD_OFFSET)
                os.fsync(fd)
        _flush(os.path.dirname(path))  # noqa: PTH120

    def free(self, session: leases.Session, slot: record.Slot) -> None:
        with session.holding([self.lease()], repository.LEASE_WAIT_S, patient=True):
            record.erase(slot)
            _remove(slot.path)

    # -- data

    def data_names(self, image_id: str = "") -> list[str]:
        names = _names(f"{self.place}/data")
        return [name for name in names if name.startswith(image_id) and _DATA_NAME.fullmatch(name)]

    @contextlib.contextmanager
    def making(self, name: str, room_bytes: int) -> Iterator[str]:
        """See `Repository.making`. The file stays open meanwhile: a write-back error that the tool did not look for
        is still told to this descriptor when it is flushed (trap 27)."""
        path = self.data_path(name)
        with _opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
            yield path
            os.fdatasync(fd)
        _flush(f"{self.place}/data")

    @contextlib.contextmanager
    def changing(self, name: str, room_bytes: int = 0) -> Iterator[str]:
        """See `Repository.changing`; open meanwhile as in `making`."""
        path = self.data_path(name)
        with _opened(path, os.O_RDWR) as fd:
            yield path
            os.fdatasync(fd)

    def reading(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def remove_data(self, name: str) -> None:
        _remove(self.data_path(name))

    def allocated_bytes(self, name: str) -> int:
        try:
            return Path(self.data_path(name)).stat().st_blocks * 512
        except FileNotFoundError:
            return 0


def _names(directory: str) -> list[str]:
    return [path.name for path in Path(directory).iterdir()]


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        os.fchmod(fd, FILE_MODE)
        yield fd
    finally:
        os.close(fd)


def _make_directory(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(DIRECTORY_MODE)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    _flush(os.path.dirname(path))  # noqa: PTH120


def _flush(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sector_bytes(path: str) -> int:
    """The sector size of the storage below: 512, unless direct I/O refuses what is not a multiple of 4096. Asked where
    the file was written: what is only allocated needs no disk to be read, and is refused nothing."""
    with mmap.mmap(-1, models.BLOCK_BYTES) as page, memoryview(page) as view:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(fd, [view[:512]], record.RECORD_OFFSET + 512)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 4096
        finally:
            os.close(fd)
    return 512
