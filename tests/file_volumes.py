"""A repository on volumes where there are none: each is a file of a fixed size, and two hosts see them.

Imported in the fork server of tests, so that children and workers know the format; `describe` makes its descriptions.

    PLACE/volumes/NAME     the content; its length is the volume's size, a multiple of EXTENT_BYTES, full of old bytes
    PLACE/host-N/NAME      a link to it while the volume is active on host N: what is not active cannot be opened
    PLACE/open-N/NAME      a test says that a process of host N has it open
    PLACE/use-N/NAME       who of host N uses it (`volumes.Users`)
    PLACE/size             bytes of the group, when a test says another size than GROUP_BYTES

qemu-img makes files of its own length where a device keeps its own; the end of use makes the length right again, and
fails when more was written than the volume has room for.
"""

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import sanlock_fixture
from tests.until import until
from vdsm import config, leases
from vdsm.storage import formats, repository
from vdsm.storage.formats import blocklayout, volumes

FORMAT = "files-0"
EXTENT_BYTES = 4 << 20
CHUNK_BYTES = 16 << 20
OLD = b"\xa5"
GROUP_BYTES = 8 << 30


class FileGroup(volumes.Group):
    driver = "file"

    def __init__(self, place: str, host_id: int) -> None:
        self._place = Path(place)
        self._active = self._place / f"host-{host_id}"
        self.opened = self._place / f"open-{host_id}"
        for directory in (self._place / "volumes", self._active, self.opened):
            directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> str:
        return str(self._active / name)

    @contextlib.contextmanager
    def _metadata(self) -> Iterator[dict[str, int]]:
        """{name: size in bytes}, one host at a time: what LVM's locks do."""
        with (self._place / "metadata").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            sizes: dict[str, int] = json.loads(file.read() or "{}")
            before = dict(sizes)
            yield sizes
            if sizes != before:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(sizes))

    def volumes(self, prefix: str = "") -> dict[str, volumes.Volume]:
        with self._metadata() as sizes:
            return {
                name: volumes.Volume(size, (self._active / name).is_symlink(), (self.opened / name).exists())
                for name, size in sizes.items()
                if name.startswith(prefix)
            }

    def space(self) -> tuple[int, int]:
        with self._metadata() as sizes:
            return self._bytes(), self._bytes() - sum(sizes.values())

    def _bytes(self) -> int:
        told = self._place / "size"
        return int(told.read_text()) if told.exists() else GROUP_BYTES

    def create(self, name: str, size_bytes: int) -> None:
        with self._metadata() as sizes:
            if name in sizes:
                raise FileExistsError(errno.EEXIST, "it exists", name)
            self._set(sizes, name, size_bytes)
        self.activate(name)

    def extend(self, name: str, size_bytes: int) -> int:
        assert (self._active / name).is_symlink(), "not active here"
        with self._metadata() as sizes:
            if sizes[name] < size_bytes:
                self._set(sizes, name, size_bytes)
            return sizes[name]

    def _set(self, sizes: dict[str, int], name: str, size_bytes: int) -> None:
        rounded = -(-size_bytes // EXTENT_BYTES) * EXTENT_BYTES
        if sum(sizes.values()) - sizes.get(name, 0) + rounded > self._bytes():
            raise OSError(errno.ENOSPC, "no room")
        sizes[name] = rounded
        self._fit(name, rounded)

    def _fit(self, name: str, size_bytes: int) -> None:
        """The file has the volume's length."""
        with (self._place / "volumes" / name).open("ab") as file:
            assert file.tell() <= size_bytes, f"{name}: {file.tell()} bytes were written into {size_bytes}"
            while (missing := size_bytes - file.tell()) > 0:
                file.write(OLD * min(missing, 1 << 20))

    def activate(self, name: str) -> int:
        with self._metadata() as sizes:
            if name not in sizes:
                raise FileNotFoundError(errno.ENOENT, "no such volume", name)
            with contextlib.suppress(FileExistsError):
                (self._active / name).symlink_to(self._place / "volumes" / name)
            return sizes[name]

    def deactivate(self, name: str) -> None:
        with self._metadata() as sizes:
            (self._active / name).unlink(missing_ok=True)
            if name in sizes:
                self._fit(name, sizes[name])

    def remove(self, name: str) -> str:
        with self._metadata() as sizes:
            for host in self._place.glob("host-*"):
                if host != self._active and (host / name).is_symlink():
                    return "active elsewhere"
            (self._active / name).unlink(missing_ok=True)
            sizes.pop(name, None)
            (self._place / "volumes" / name).unlink(missing_ok=True)
            return ""


class FileBlocks(blocklayout.BlockLayout):
    format = FORMAT

    def __init__(self, description: repository.Description) -> None:
        super().__init__(description, FileGroup(description["place"], description["host_id"]))

    @classmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> repository.Description:
        return {**_own(parameters["path"]), "place": parameters["path"]}


def make(place: Path, repo_id: str) -> FileBlocks:
    """Formatted, and joined by this host."""
    repo = FileBlocks(describe(place, repo_id))
    repo.format_(sanlock_fixture.IO_TIMEOUT_S)
    leases.join(repo.lockspace(), sanlock_fixture.IO_TIMEOUT_S)
    until(lambda: leases.state(repo.lockspace()) == "joined")
    return repo


def describe(place: Path, repo_id: str, host_id: int = 1) -> repository.Description:
    return {
        **{"format": FORMAT, "place": str(place), "name": "", "sector_bytes": 512, "host_id": host_id},
        **{"repo_id": repo_id, **_own(str(place), host_id)},
    }


def _own(place: str, host_id: int = 1) -> dict[str, Any]:
    return {"use_dir": f"{place}/use-{host_id}", "chunk_bytes": CHUNK_BYTES}


formats._FORMATS[FORMAT] = FileBlocks
