"""localfs-1.0: a directory of this host, for this host alone.

connectionParameters: {"path": absolute path}. The path must lie under a configured directory, after symbolic links too.
No watchdog is needed: when this host's sanlock is gone, so is everybody who could take a lease.
"""

import os
from typing import Any

from supervdsm import calls
from supervdsm import client as helper_client
from vdsm import config, errors, record, roothelper
from vdsm.storage import repository
from vdsm.storage.formats import filelayout


class LocalFs(filelayout.FileLayout):
    format = "localfs-1.0"
    abilities = repository.Abilities(shared=False, thin=True)

    def __init__(self, description: repository.Description) -> None:
        super().__init__(description)
        self._allowed: list[str] = description["allowed_dirs"]

    @classmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> repository.Description:
        """The format's own part of a description. Raises `InvalidParameters`, `PathNotAllowed`. Touches nothing."""
        path = parameters.get("path")
        if parameters.keys() != {"path"} or not isinstance(path, str) or path != os.path.normpath(path):
            raise errors.InvalidParameters(
                parameter="connectionParameters", reason="localfs takes exactly a path, absolute and without '..'"
            )
        _check_under(path, storage.localfs_dirs)
        return {"place": path, "allowed_dirs": list(storage.localfs_dirs)}

    @classmethod
    def bring_up(
        cls, helper: helper_client.Helper, description: repository.Description, *, new: bool
    ) -> repository.Description:
        """A directory for a new repository is root's to make; one that has a repository needs nothing."""
        if new:
            roothelper.call(helper, calls.PrepareDirectory(description["place"]))
        return description

    def format_(self, io_timeout_s: int) -> record.Record:
        self._resolve()
        return super().format_(io_timeout_s)

    def header(self) -> record.Record:
        self._resolve()
        return super().header()

    def _resolve(self) -> None:
        """The place without symbolic links, so that one directory has one name."""
        self.place = os.path.realpath(self.place)
        _check_under(self.place, [os.path.realpath(allowed) for allowed in self._allowed])


def _check_under(path: str, allowed: list[str] | tuple[str, ...]) -> None:
    if not any(path.startswith(f"{directory.rstrip('/')}/") for directory in allowed):
        raise errors.PathNotAllowed(path=path, allowed=", ".join(allowed))
