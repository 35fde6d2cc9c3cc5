"""Files of this host that images are read from or written to: only under configured directories.

Where a descriptor leads, not what the path looks like, decides: a symbolic link on the way may lead anywhere.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from vdsm import errors


def check_place(place: str, path: str, allowed: Iterable[str]) -> None:
    """Raises `PathNotAllowed` unless `place`, to which `path` leads, lies under one of the directories `allowed`."""
    directories = list(allowed)
    if not any(Path(place).is_relative_to(os.path.realpath(directory)) for directory in directories):
        raise errors.PathNotAllowed(path=path, allowed=", ".join(directories) or "none")


def is_direct(path: str) -> bool:
    """Whether the file can be read and written past the page cache. A tmpfs of older kernels, for one, cannot."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


class NewFile:
    """A file that is to be made at `path`, whole or not at all: under a name of its own first, which `token` makes.

    Methods raise `HostFileFailed` when the directory or its file system refuses.
    """

    def __init__(self, directory_fd: int, path: str, token: str) -> None:
        self._directory_fd = directory_fd
        self._path = path
        self._name = os.path.basename(path)  # noqa: PTH119
        self._made = f".{token}.part"

    def free_bytes(self) -> int:
        """What the file may take."""
        found = os.fstatvfs(self._directory_fd)
        return found.f_bavail * found.f_frsize

    def check_free(self, *, overwrite: bool) -> None:
        """Raises `HostFileExists` when there is anything at the path; with `overwrite`, anything but a plain file. One
        that was published by this token and died before it was known by that name alone gets so now."""
        found = self._stat(self._name)
        if found is None or (overwrite and stat.S_ISREG(found.st_mode)):
            return
        made = self._stat(self._made)
        if made is not None and os.path.samestat(made, found):
            with failing(self._path):
                self.discard()
        raise errors.HostFileExists(path=self._path)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def check_writable(self) -> None:
        if not os.access(f"/proc/self/fd/{self._directory_fd}", os.W_OK | os.X_OK):
            raise errors.HostFileFailed(path=self._path, reason="this user may not write into the directory")

    @contextlib.contextmanager
    def making(self) -> Iterator[str]:
        """The path of an empty file, for a tool to fill inside the block: by the number of this process, whose
        descriptor it is. On stable storage at the block's end, still under a name of its own."""
        with failing(self._path):
            self.discard()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._made, flags, 0o640, dir_fd=self._directory_fd)
        try:
            yield f"/proc/{os.getpid()}/fd/{fd}"
            with failing(self._path):
                os.fsync(fd)
        finally:
            os.close(fd)

    def publish(self, *, overwrite: bool) -> None:
        """Gives the whole file its name, on stable storage at return. Raises `HostFileExists`."""
        self.check_free(overwrite=overwrite)
        here = self._directory_fd
        with failing(self._path):
            if overwrite:
                os.replace(self._made, self._name, src_dir_fd=here, dst_dir_fd=here)
            else:
                try:  # a rename would replace what has come meanwhile
                    os.link(self._made, self._name, src_dir_fd=here, dst_dir_fd=here)
                except FileExistsError as error:
                    raise errors.HostFileExists(path=self._path) from error
                os.unlink(self._made, dir_fd=here)
            os.fsync(here)

    def discard(self) -> None:
        """Nothing is left of what was not published."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._made, dir_fd=self._directory_fd)


@contextlib.contextmanager
def new_file(path: str, token: str, allowed: Iterable[str]) -> Iterator[NewFile]:
    """The file that is to be made at the absolute `path`. Raises `PathNotAllowed`, `HostFileFailed`."""
    parent, _, name = path.rpartition("/")
    if not path.startswith("/") or name in ("", ".", "..") or "\0" in path:
        raise errors.InvalidParameters(parameter="path", reason="must be absolute, and name a file")
    check_place(os.path.realpath(parent), path, allowed)  # nothing is told about what is elsewhere
    with failing(path):
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        check_place(os.path.realpath(f"/proc/self/fd/{fd}"), path, allowed)
        yield NewFile(fd, path, token)
    finally:
        os.close(fd)


@contextlib.contextmanager
def failing(path: str) -> Iterator[None]:
    """Names an OSError of the block: `HostFileFailed`."""
    try:
        yield
    except OSError as error:
        raise errors.HostFileFailed(path=path, reason=error.strerror or str(error)) from error
