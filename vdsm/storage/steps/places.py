"""A repository as a whole: made, looked at, left. Needs no lockspace and no session; runs in an I/O child."""

from typing import Any

from vdsm import leases
from vdsm.record import Record
from vdsm.storage import lockspaces
from vdsm.storage.repository import Repository

Argument = dict[str, Any]


def format_repository(repo: Repository, argument: Argument) -> Record:
    """Makes an empty repository; answers its header. argument: io_timeout_s. Killed: the place counts as empty."""
    return repo.format_(argument["io_timeout_s"])


def header(repo: Repository, argument: Argument) -> Record:
    """The header, with the place by its one name, and `holder`: see `lockspaces.holder`. argument: host_name."""
    found = repo.header()
    repo.name = found["name"]
    return {**found, "holder": lockspaces.holder(repo.lockspace(), argument["host_name"])}


def leave_lockspace(repo: Repository, argument: Argument) -> None:
    """Leaves, and returns when this host is out (2 x io_timeout). Raises `LeaseHeld`; then nothing was changed."""
    leases.leave(repo.lockspace())


def space(repo: Repository, argument: Argument) -> dict[str, int]:
    """{total_bytes, free_bytes}"""
    return repo.space()._asdict()
