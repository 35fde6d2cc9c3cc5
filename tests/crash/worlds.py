"""Where the matrix runs: how an agent is set up there and comes to its repositories, and where the judge sees them.

This is the one of a single machine. `shared.py` has the one of a host that shares them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from supervdsm import client as helper_client
from tests import storage_fixture
from tests.crash import places
from vdsm import config


class World(storage_fixture.World):
    """`directory` is where the judge finds all of it, by the names that `seen` says."""

    host_name = storage_fixture.HOST_NAME
    io_timeout_s = 1

    def settings(self, tmp_dir: Path) -> config.Config:
        """The agent's."""
        return config.Config(
            host=config.Host(id=1, name=self.host_name),
            paths=config.Paths(tmp_dir=str(tmp_dir)),
            storage=config.Storage(
                localfs_dirs=(str(self.directory),),
                import_dirs=(str(self.import_dir),),
                export_dirs=(str(self.export_dir),),
                io_deadline_s=60.0,
            ),
            sanlock=config.Sanlock(run_dir=str(self.run_dir)),
        )

    def helper(self) -> helper_client.Helper:
        return storage_fixture.Root()

    def connection(self, name: str) -> tuple[str, dict[str, Any]]:
        """Format and connectionParameters of the repository."""
        return "localfs-1.0", {"path": str(self.directory / name)}

    def place(self, name: str) -> places.Place:
        return places.Files(self.directory / name)

    @contextlib.contextmanager
    def data(self, repo: str, name: str, below: Sequence[str]) -> Iterator[Path]:
        """Where the data of that name can be written inside the block; it has `below` as its backing files."""
        yield self.directory / repo / "data" / name

    def sweep(self) -> None:
        """Does what this host's agent does each minute, wherever processes may have left something active."""

    def settled(self) -> bool:
        """Whether nothing is done any more for processes that have ended."""
        return True

    def seen(self, *names: str) -> dict[str, str]:
        """The directories of those names as system calls name them; each with its name."""
        return {str(self.directory / name): name for name in names}
