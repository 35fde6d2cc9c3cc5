"""What a repository format must be able to do, and how images are read and held.

A `Repository` knows places; it does not know what images mean. Making one touches nothing, so the agent may have one
to know what is computed; every other method blocks as long as the storage does and runs in a repository's I/O child or
in a job's worker. `bring_up` and `take_down` are the agent's: they ask the root helper, and touch no storage.

A repository's description, which makes one in any process, is JSON:

    format          "localfs-1.0", ...
    place           where it is, in the format's own words: for file formats the absolute path of its directory
    name            its persistent name, the name of its lockspace; "" until its header was read
    sector_bytes    of its storage, 512 or 4096
    host_id         this host's id in its lockspace
    repo_id         under which it is connected; only for messages
"""

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from supervdsm import client as helper_client
from vdsm import config, errors, leases, record
from vdsm.record import Record
from vdsm.storage.files import qemuimg
from vdsm.storage.rules import models

Description = dict[str, Any]

# How long a verb waits for a lease that is only passing by. One that somebody holds is refused at once.
LEASE_WAIT_S = 5.0


class Abilities(NamedTuple):
    """`shared`: several hosts may be connected, so sanlock needs a watchdog. `thin`: data is a file, which takes what
    it holds; otherwise a volume, whose size is given to it."""

    shared: bool
    thin: bool


class Space(NamedTuple):
    total_bytes: int
    free_bytes: int


class Repository(abc.ABC):
    format: ClassVar[str]
    abilities: ClassVar[Abilities]

    def __init__(self, description: Description) -> None:
        self.place: str = description["place"]
        self.name: str = description["name"]
        self.sector_bytes: int = description["sector_bytes"]
        self.host_id: int = description["host_id"]
        self.repo_id: str = description["repo_id"]
        # Descriptors that tools inherit, besides the session's, so that whoever started them counts them as its own.
        self.tool_fds: tuple[int, ...] = ()

    @classmethod
    @abc.abstractmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> Description:
        """The format's own part of a description, from connectionParameters. Touches nothing.

        Raises `InvalidParameters`, `PathNotAllowed`.
        """

    # -- the ground: what root has to do before the storage can be seen

    @classmethod
    def bring_up(cls, helper: helper_client.Helper, description: Description, *, new: bool) -> Description:
        """Makes the storage seen on this host; `new`: for a repository that is to be formatted there. Answers the
        description, completed by what has become known.

        What is up already stays up, so it can be repeated. Blocks for the helper's deadline, in the thread of the verb.
        Raises `HelperFailed`, `HelperUnavailable`, and what the format says of storage that is not there; then all is
        as it was before.
        """
        return description

    @classmethod  # noqa: B027 - most formats have nothing to take down
    def take_down(cls, helper: helper_client.Helper, description: Description) -> None:
        """The reverse of `bring_up`, for the description that it answered; what is down already is fine.

        Nothing of the repository is in use by the agent then; what others still use stays up, and raises.
        """

    @classmethod  # noqa: B027 - most formats lose nothing
    def bring_back(cls, helper: helper_client.Helper, description: Description) -> None:
        """Brings up what an outage has taken down under a connected repository, for the description that `bring_up`
        answered. Asked after each look at it that failed, so it touches no storage while nothing was taken down.

        Blocks for the helper's deadline, in the thread of the monitor. Raises `HelperFailed`, `HelperUnavailable`: not
        yet, and why.
        """

    @classmethod
    def extend(
        cls, helper: helper_client.Helper, description: Description, devices: list[str], overwrite: list[str]
    ) -> None:
        """Adds disks to the storage of a connected repository; those of `overwrite` may hold something.

        Blocks for the helper's deadline. What it has already counts as added.
        """
        raise errors.InvalidParameters(parameter="repoId", reason=f"{cls.format} is not made of disks")

    # -- places: computed, nothing is touched

    @abc.abstractmethod
    def lockspace(self) -> leases.Lockspace:
        """The lockspace, with this host's id in it."""

    @abc.abstractmethod
    def lease(self) -> leases.Lease:
        """The repository lease, under which slots are given out and taken back."""

    @abc.abstractmethod
    def data_path(self, name: str) -> str: ...

    @abc.abstractmethod
    def layer(self, data: dict[str, str], size_bytes: int) -> qemuimg.Layer:
        """The data of an image of this size, {"name", "format"}, as tools are told of it."""

    # -- the repository

    @abc.abstractmethod
    def format_(self, io_timeout_s: int) -> Record:
        """Makes an empty repository, and returns its header. Raises `NotEmpty`; then nothing was changed."""

    @abc.abstractmethod
    def header(self) -> Record:
        """{name, format, io_timeout_s, sector_bytes, created, place}. Raises `NotARepository`."""

    @abc.abstractmethod
    def space(self) -> Space: ...

    def recent_space(self) -> Space:
        """As `space`, for who asks again and again: where that is dear, this object's last answer for a while."""
        return self.space()

    def check_writable(self) -> None:  # noqa: B027 (not every format can tell)
        """Blocks as long as writes to the storage do, and changes nothing. Raises OSError when they would fail.

        Here: nothing, for formats that cannot ask without writing. sanlock's renewals tell of theirs.
        """

    # -- slots

    @abc.abstractmethod
    def slot(self, image_id: str) -> record.Slot:
        """The image's slot; for an id that has none, a place where nothing is. May be looked up on storage, and be
        another's a moment later: leases are known by their names, and records say whose they are."""

    @abc.abstractmethod
    def vm_slot(self, vm_id: str) -> record.Slot: ...

    @abc.abstractmethod
    def image_ids(self) -> list[str]:
        """Ids of all slots of images, also of those that have no record (their maker died, or is at it)."""

    @abc.abstractmethod
    def vm_ids(self) -> list[str]: ...

    @abc.abstractmethod
    def allocate(self, session: leases.Session, image_id: str) -> record.Slot:
        """Makes the image's slot and its leases, under the repository lease. One that exists stays as it is.

        A crash leaves at most a slot without a record, which is not an image; the next `allocate` takes it over.
        Raises `RepositoryFull`, and `IdTaken` when a VM has the id of an image or the other way round: their leases
        would have one name. Then nothing is left.
        """

    @abc.abstractmethod
    def allocate_vm(self, session: leases.Session, vm_id: str) -> record.Slot:
        """As `allocate`."""

    @abc.abstractmethod
    def free(self, session: leases.Session, slot: record.Slot) -> None:
        """Takes back the slot with its record and leases, under the repository lease.

        The caller holds the data lease exclusively inside `owning`. A crash leaves the slot without a record.
        """

    # -- data

    @abc.abstractmethod
    def data_names(self, image_id: str = "") -> list[str]:
        """All data, or what was made under that image's data lease."""

    @abc.abstractmethod
    def making(self, name: str, room_bytes: int) -> contextlib.AbstractContextManager[str]:
        """Fresh data `name`, in place of what a dead maker left, and its path, for a tool to fill inside the block: a
        file is empty, a volume has room for `room_bytes`, the most that is going to be written, and old bytes in it.

        At the block's end all is on stable storage, the name too. Raises `RepositoryFull`, and OSError when it could
        not be written.
        """

    @abc.abstractmethod
    def changing(self, name: str, room_bytes: int = 0) -> contextlib.AbstractContextManager[str]:
        """The path of data `name`, for a tool to change inside the block; on stable storage at its end. A volume has
        room for `room_bytes` then; it never shrinks.

        Raises `RepositoryFull`, and OSError when there is none, or when it could not be written.
        """

    def first_room(self, data_format: str, size_bytes: int) -> int:
        """`room_bytes` for data of an image of this size that a VM will write: what it begins with, if it can grow."""
        return qemuimg.most_bytes(data_format, size_bytes)

    def grow(self, data: dict[str, str], size_bytes: int, written_bytes: int | None) -> int | None:
        """Gives data that a VM writes room behind `written_bytes`, the end of what was written, if there is little
        left; None: it is full, whatever was written. Answers the end of what was written at which to ask again; None:
        never, as for all files.

        `size_bytes` is the image's. The data can be read on this host, and its lease is held there, so that nobody else
        grows it. Never shrinks, may be done twice. Raises `RepositoryFull`: it is as it was.
        """
        return None

    def written_bytes(self, data: dict[str, str]) -> int:
        """The end of what was written, for `grow`. The data can be read, and nobody writes it."""
        return 0

    @abc.abstractmethod
    def reading(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """Data of these names can be read on this host inside the block. Their images' leases are held."""

    def keeping(self, names: Iterable[str]) -> contextlib.AbstractContextManager[None]:
        """What a process of this host makes readable inside the block stays so at its end too, until `sweep` finds that
        nobody has it open. Touches only local files, so the agent may."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def remove_data(self, name: str) -> None:
        """Removes data; none of that name is fine. It is gone from stable storage at return.

        Raises `ImageInUse` when a volume is in use still, on any host: it stays whole.
        """

    @abc.abstractmethod
    def allocated_bytes(self, name: str) -> int:
        """Space that the data takes; 0 when there is none of that name."""

    def data_sizes(self) -> dict[str, int]:
        """{name: `allocated_bytes`} of all data."""
        return {name: self.allocated_bytes(name) for name in self.data_names()}

    def sweep(self) -> list[str]:
        """Takes from this host what dead processes had made readable here; names of it."""
        return []

    # -- what all formats share

    def find(self, image_id: str) -> Record | None:
        """The record of an image, None when there is no such image."""
        return self._find(self.slot(image_id))

    def get(self, image_id: str) -> Record:
        """The record of an image. Raises `NoSuchImage`."""
        found = self.find(image_id)
        if found is None:
            raise errors.NoSuchImage(image_id=image_id, where=self.repo_id)
        return found

    def images(self) -> dict[str, Record]:
        """All images by id. A slot without a record is none."""
        found = {image_id: self.find(image_id) for image_id in self.image_ids()}
        return {image_id: image for image_id, image in found.items() if image is not None}

    def vms(self) -> dict[str, Record]:
        """All VM records by id."""
        found = {vm_id: self._find(self.vm_slot(vm_id)) for vm_id in self.vm_ids()}
        return {vm_id: vm for vm_id, vm in found.items() if vm is not None}

    def find_vm(self, vm_id: str) -> Record | None:
        return self._find(self.vm_slot(vm_id))

    def update(self, session: leases.Session, image_id: str, change: Callable[[Record], Record | None]) -> Record:
        """`record.update` of an image that may have gone meanwhile: then `NoSuchImage`."""
        try:
            return record.update(session, self.slot(image_id), change)
        except (errors.NoRecord, FileNotFoundError) as error:
            raise errors.NoSuchImage(image_id=image_id, where=self.repo_id) from error
        except errors.LeaseFailed as error:
            self._refuse_gone(error, image_id)
            raise

    def host_generation(self, slot: record.Slot) -> int | None:
        """This host's generation in the lockspace, as the data lease says that this process holds."""
        own = [owner for owner in leases.owners(slot.data_lease()) if owner["host_id"] == self.host_id]
        return own[0]["generation"] if own else None

    def keep(self, session: leases.Session, image_id: str) -> None:
        """Holds an image's data lease exclusively from here on; taken if this session has it not yet.

        Raises as `owning` does. For work that ends in another function, or another process.
        """
        lease = self.slot(image_id).data_lease()
        if (lease.lockspace, lease.name, False) not in session.held():
            self._acquire(session, [lease])

    @contextlib.contextmanager
    def owning(
        self, session: leases.Session, exclusive: Iterable[str] = (), shared: Iterable[str] = ()
    ) -> Iterator[None]:
        """Holds the data leases of images inside the block. The lease of one that is freed there goes with its slot.

        Raises `ImageBusy` or `ImageInUse` when another process holds one, `NoSuchImage` when its slot is gone.
        """
        wanted = [self.slot(image_id).data_lease() for image_id in exclusive]
        wanted += [self.slot(image_id).data_lease(shared=True) for image_id in shared]
        self._acquire(session, wanted)
        try:
            yield
        finally:
            session.release(wanted)

    def _acquire(self, session: leases.Session, wanted: list[leases.Lease]) -> None:
        by_text = {str(lease): lease.name for lease in wanted}
        try:
            session.acquire(wanted, LEASE_WAIT_S)
        except errors.LeaseHeld as error:
            image_id = by_text[error.facts["resource"]]
            image = self.find(image_id)
            if image is not None and models.is_open(image):
                raise models.busy(image) from error
            raise errors.ImageInUse(image_id=image_id, holder=error.facts["holder"]) from error
        except errors.LeaseFailed as error:
            self._refuse_gone(error, by_text.get(error.facts["resource"], "?"))
            raise

    def _refuse_gone(self, error: errors.LeaseFailed, image_id: str) -> None:
        """Raises `NoSuchImage` when the lease failed because its slot is gone, or is another's by now."""
        errno = error.facts["errno"]
        other = errno in {leases.DOES_NOT_EXIST, *leases.WRONG_NAME}
        if errno == leases.NO_PLACE or (other and self.find(image_id) is None):
            raise errors.NoSuchImage(image_id=image_id, where=self.repo_id) from error

    @staticmethod
    def _find(slot: record.Slot) -> Record | None:
        try:
            found = record.read(slot)
        except (errors.NoRecord, FileNotFoundError):
            return None
        return found if found["id"] == slot.name else None  # the slot was given to another meanwhile
