"""A repository's place as somebody finds it who shares no code with the agent: where slots and data lie."""

import abc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

Read = Callable[[int, int], bytes]  # of a slot: (offset, length) -> as much of that as there is


class Place(abc.ABC):
    @abc.abstractmethod
    def slots(self, kind: str) -> dict[str, Read]:
        """Of `images` or `vms`, by the names that they are found by."""

    @abc.abstractmethod
    def data_names(self) -> list[str]: ...

    @abc.abstractmethod
    def data(self, name: str, image_format: str, size_bytes: int) -> Path | None:
        """A file with it, as long as the image when it is raw; None: there is none. Good until `lay_out`."""

    @abc.abstractmethod
    def busy(self) -> list[str]:
        """What is not as it may be when nobody works there."""

    @abc.abstractmethod
    def empty(self) -> None: ...

    @abc.abstractmethod
    def keep(self, kept: Path) -> None:
        """Makes `kept`, with all that is here and that work changes."""

    @abc.abstractmethod
    def lay_out(self, kept: Path) -> None:
        """Everything is as it was kept."""


class Files(Place):
    """A directory."""

    kinds: ClassVar = ("images", "vms", "data")

    def __init__(self, path: Path) -> None:
        self.path = path

    def slots(self, kind: str) -> dict[str, Read]:
        return {path.name: reading(path) for path in (self.path / kind).iterdir()}

    def data_names(self) -> list[str]:
        return [path.name for path in (self.path / "data").iterdir()]

    def data(self, name: str, image_format: str, size_bytes: int) -> Path | None:
        path = self.path / "data" / name
        return path if path.exists() else None

    def busy(self) -> list[str]:
        return []

    def empty(self) -> None:
        for kind in self.kinds:
            for path in (self.path / kind).iterdir():
                path.unlink()

    def keep(self, kept: Path) -> None:
        for kind in self.kinds:
            shutil.copytree(self.path / kind, kept / kind, copy_function=copy_sparse)

    def lay_out(self, kept: Path) -> None:
        self.empty()
        for kind in self.kinds:
            shutil.copytree(kept / kind, self.path / kind, dirs_exist_ok=True)


def reading(path: Path) -> Read:
    """Of a file."""

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    return read


def copy_sparse(source: str, target: str) -> None:
    """Without the zeros, of which slots are full: many scenes are kept at once."""
    with Path(source).open("rb") as read, Path(target).open("wb") as write:
        while piece := read.read(65536):
            if piece.count(0) == len(piece):
                write.seek(len(piece), os.SEEK_CUR)
            else:
                write.write(piece)
        write.truncate()
    shutil.copystat(source, target)
