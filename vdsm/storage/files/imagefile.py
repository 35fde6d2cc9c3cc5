"""A foreign image file held open, and what its header says.

Below the readers: `qcow2.py` reads through an `ImageFile` and fills an `ImageHeader`; `imageheader.py` is the door.
"""

import dataclasses
import os
import stat

from vdsm import errors


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What a file says about itself. The fields below `virtual_size_bytes` say nothing about a raw file.

    A raw file's virtual size is its length rounded up to 512 bytes, as QEMU shows it. `features` are the names of the
    known feature bits that are set. Names are for messages only: undecodable bytes are spelled with backslashes.
    """

    path: str
    format: str
    file_size_bytes: int
    virtual_size_bytes: int
    version: int = 0
    cluster_bits: int = 0
    refcount_bits: int = 0
    l1_entries: int = 0
    backing_name: str | None = None
    backing_format: str | None = None
    data_file_name: str | None = None
    encryption: str | None = None
    compression: str = "zlib"
    snapshots: int = 0
    bitmaps: int = 0
    features: frozenset[str] = frozenset()

    @property
    def has_backing(self) -> bool:
        return self.backing_name is not None

    @property
    def data_file(self) -> bool:
        """Whether its data is, or is said to be, in another file."""
        return "data_file" in self.features or self.data_file_name is not None


class ImageFile:
    """A regular file read at absolute offsets; every doubt becomes `BadImageFile`. The caller closes the descriptor."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        status = os.fstat(fd)
        self.require(stat.S_ISREG(status.st_mode), "it is not a regular file")
        self.size_bytes = status.st_size

    def bad(self, reason: str) -> errors.BadImageFile:
        return errors.BadImageFile(path=self.path, reason=reason)

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise self.bad(reason)

    def read(self, offset: int, length: int) -> bytes:
        """What is there, at most `length` bytes."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise self.bad(f"it cannot be read at {offset}: {error.strerror}") from error

    def read_exactly(self, offset: int, length: int, what: str) -> bytes:
        data = self.read(offset, length)
        self.require(len(data) == length, f"{what} is cut short")
        return data


def open_file(path: str) -> int:
    """A read-only descriptor of `path`, which must not be a symbolic link. Raises `BadImageFile`.

    Not blocking: opening a FIFO would wait for its writer. Not following: a link may lead out of its directory.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise errors.BadImageFile(path=path, reason=f"it cannot be opened: {reason}") from error
