"""A private sanlock daemon with one joined lockspace. A test module that wants it says

storage = sanlock_fixture.storage
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from vdsm import leases, record

HOST_ID = 1
IO_TIMEOUT_S = 1


class Storage:
    """A directory with a lockspace that this host has joined, and slots made in it."""

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self.directory = directory
        self.run_dir = run_dir
        self.lockspace = leases.Lockspace("tests", str(directory / "lockspace"), 0, HOST_ID)

    def slot(self, name: str, **fields: Any) -> record.Slot:
        """A new entity with its leases and its first record."""
        slot = record.Slot(self.lockspace.name, name, str(self.directory / name), 0)
        make_file(Path(slot.path), record.SLOT_BYTES)
        leases.initialise(slot.data_lease())
        leases.initialise(slot.record_lease())
        record.create(slot, {"id": name, "kind": "disk", "generation": 7, "work": None, **fields})
        return slot


def make_file(path: Path, size_bytes: int) -> None:
    with path.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, size_bytes)


def answers(path: Path) -> bool:
    """True once somebody listens at the socket: it exists a moment earlier."""
    with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):
        line.connect(str(path))
        return True
    return False


_links: list[tempfile.TemporaryDirectory[str]] = []


def use(run_dir: Path) -> None:
    """Makes this process talk to the daemon in `run_dir` from here on, whatever daemon it talked to before.

    sanlock's library looks at SANLOCK_RUN_DIR once in the life of a process. So what it finds there is always the same
    link, which leads to the daemon that the running test module uses. Child processes start with the true path.
    """
    if not _links:
        _links.append(tempfile.TemporaryDirectory(prefix="vdsm-sanlock-link-"))
        os.environ["SANLOCK_RUN_DIR"] = f"{_links[0].name}/run"
        assert leases.hosts("nothing") == {}  # makes the library look
    link, fresh = Path(_links[0].name, "run"), Path(_links[0].name, "fresh")
    fresh.symlink_to(run_dir)
    fresh.rename(link)
    os.environ["SANLOCK_RUN_DIR"] = str(run_dir)


@contextlib.contextmanager
def running() -> Iterator[Storage]:
    """The daemon runs as this user, since sanlock must be able to kill every holder of a lease (trap 6)."""
    with tempfile.TemporaryDirectory(prefix="vdsm-sanlock-") as directory, pytest.MonkeyPatch.context() as patch:
        run_dir, data = Path(directory, "run"), Path(directory, "data")
        run_dir.mkdir()
        data.mkdir()
        patch.setenv("SANLOCK_PRIVILEGED", "0")
        patch.setenv("SANLOCK_RUN_DIR", str(run_dir))
        who = ["-U", str(os.getuid()), "-G", str(os.getgid())]
        # The daemon dies with this process, however that ends.
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "sanlock",
            "daemon",
            "-D",
            "-w",
            "0",
            "-t",
            "64",
            "-e",
            "testhost",
            *who,
        ]
        with (
            (run_dir / "output").open("wb") as output,
            subprocess.Popen(command, stdout=output, stderr=output) as daemon,
        ):
            try:
                until(lambda: answers(run_dir / "sanlock.sock"))
                use(run_dir)
                place = Storage(data, run_dir)
                make_file(Path(place.lockspace.path), leases.LEASE_BYTES)
                leases.write_lockspace(place.lockspace, IO_TIMEOUT_S)
                leases.join(place.lockspace)
                until(lambda: leases.state(place.lockspace) == "joined")
                yield place
            finally:
                daemon.kill()


@pytest.fixture(scope="session")
def storage() -> Iterator[Storage]:
    if shutil.which("sanlock") is None:
        pytest.skip("sanlock is not installed: apt install sanlock python3-sanlock")
    with running() as place:
        yield place
