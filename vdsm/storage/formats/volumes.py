"""Volumes of a group, and who of this host uses them.

A volume is active on a host while somebody there uses it, on any number of hosts at once: leases say who may write.
Whoever uses one holds a shared flock on a file of its name in this host's run directory; who comes last, and gets it
exclusively, deactivates. So no process takes a volume from under another, and a process that died is no user. What it
left active is deactivated by the next who uses it, or by `sweep`.

Blocks as long as the storage and LVM do: runs in a repository's I/O child or in a worker.
"""

import abc
import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from vdsm import errors, logs

_log = logs.get("storage.volumes")


class Volume(NamedTuple):
    """`active`, and open by some process, on this host."""

    size_bytes: int
    active: bool
    open: bool


class Group(abc.ABC):
    """A volume group. Names of volumes are checked by who makes them. Raises `HelperFailed`, `HelperUnavailable`."""

    driver: ClassVar[str]  # QEMU's, for a volume's path

    @abc.abstractmethod
    def path(self, name: str) -> str:
        """Where the volume is while it is active. Computed."""

    @abc.abstractmethod
    def volumes(self, prefix: str = "") -> dict[str, Volume]:
        """All of the group whose names begin so. A few cost less than all."""

    @abc.abstractmethod
    def space(self) -> tuple[int, int]:
        """(bytes in all, bytes free)."""

    @abc.abstractmethod
    def create(self, name: str, size_bytes: int) -> None:
        """Makes a volume of at least this size, active on this host, with old bytes in it.

        Raises FileExistsError, and OSError (ENOSPC) when there is no room.
        """

    @abc.abstractmethod
    def extend(self, name: str, size_bytes: int) -> int:
        """Grows a volume that is active here to at least this size; its size. Raises OSError (ENOSPC)."""

    @abc.abstractmethod
    def activate(self, name: str) -> int:
        """Activates the volume on this host, with its present size, which it returns. Raises FileNotFoundError."""

    @abc.abstractmethod
    def deactivate(self, name: str) -> None:
        """On this host. One that some process has open stays active."""

    @abc.abstractmethod
    def remove(self, name: str) -> str:
        """Removes it, absent is fine: "". Or why it stays whole: "in use", "active elsewhere"."""


class Users:
    """Who of this host uses the volumes of `group`. `directory` is this host's own, local, and made here if need be."""

    def __init__(self, group: Group, directory: str) -> None:
        self._group = group
        self._directory = Path(directory)

    @contextlib.contextmanager
    def using(self, names: Iterable[str], room_bytes: int = 0) -> Iterator[list[int]]:
        """The volumes are active inside the block, of at least `room_bytes`; their sizes in bytes.

        Raises FileNotFoundError, OSError (ENOSPC). Killed: they stay active.
        """
        with contextlib.ExitStack() as users:
            sizes = []
            for name in names:
                users.enter_context(self._using(name))
                sizes.append(self._activate(name, room_bytes))
            yield sizes

    @contextlib.contextmanager
    def making(self, name: str, room_bytes: int) -> Iterator[None]:
        """As `using`, for a volume that is made here unless it is there: of the same name, a dead maker's."""
        with self._using(name):
            try:
                self._group.create(name, room_bytes)
            except FileExistsError:
                self._activate(name, room_bytes)
            yield

    def _activate(self, name: str, room_bytes: int) -> int:
        size_bytes = self._group.activate(name)
        return self._group.extend(name, room_bytes) if size_bytes < room_bytes else size_bytes

    @contextlib.contextmanager
    def keeping(self, names: Iterable[str]) -> Iterator[None]:
        """Nobody deactivates the volumes inside the block. Does not activate them, and touches no storage."""
        with contextlib.ExitStack() as kept:
            for name in names:
                kept.callback(os.close, self._lock(name, fcntl.LOCK_SH))
            yield

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[None]:
        fd = self._lock(name, fcntl.LOCK_SH)
        try:
            yield
        finally:
            try:
                self._end(fd, name)
            finally:
                os.close(fd)

    def _end(self, fd: int, name: str) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another uses it: who comes last deactivates
        try:
            self._group.deactivate(name)
        except errors.VdsmError as error:
            _log.warning("volume %s stays active: %s", name, error)

    def _lock(self, name: str, mode: int) -> int:
        """A descriptor of the volume's file, locked. Raises BlockingIOError with LOCK_NB."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / name
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
            try:
                fcntl.flock(fd, mode)
                if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
            except BaseException:  # whatever comes: an open descriptor would keep the lock
                os.close(fd)
                raise
            os.close(fd)  # removed meanwhile, with its volume

    def remove(self, name: str) -> str:
        """As `Group.remove`; "in use" also when a process of this host has just taken it to use."""
        try:
            fd = self._lock(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "in use"
        try:
            obstacle = self._group.remove(name)
            if not obstacle:
                (self._directory / name).unlink(missing_ok=True)
            return obstacle
        finally:
            os.close(fd)

    def sweep(self, keep: str) -> list[str]:
        """Deactivates what is active on this host and used by nobody, but for the volume `keep`; names of it."""
        swept = []
        for name, volume in self._group.volumes().items():
            if volume.active and not volume.open and name != keep:
                try:
                    fd = self._lock(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                try:
                    self._group.deactivate(name)
                    swept.append(name)
                    _log.info("volume %s was active, and used by nobody", name)
                finally:
                    os.close(fd)
        return swept
