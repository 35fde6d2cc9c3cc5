"""A repository as a whole: made, looked at, left. Needs no lockspace and no session; runs in an I/O child."""

import time
from typing import Any

from vdsm import errors, leases
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


def probe(repo: Repository, argument: Argument) -> dict[str, Any]:
    """{read_s, total_bytes, free_bytes}: how long a direct read of the header took, and the `recent_space`. Changes
    nothing.

    Blocks as long as reads or writes of the storage do. Raises `StorageFailed`; `NotARepository` also when another
    repository has come to the place.
    """
    began = time.monotonic()
    try:
        found = repo.header()
        read_s = time.monotonic() - began
        repo.check_writable()
        space = repo.recent_space()
    except OSError as error:
        raise errors.StorageFailed(repo_id=repo.repo_id, reason=error.strerror or str(error)) from error
    if found["name"] != repo.name:
        reason = f"another repository is there: {found['name']}"
        raise errors.NotARepository(place=repo.place, repo_format=repo.format, reason=reason)
    return {"read_s": read_s, **space._asdict()}


def show(repo: Repository, argument: Argument) -> None:
    """Makes data readable on this host. argument: names. It stays so while somebody is `Repository.keeping` it."""
    with repo.reading(argument["names"]):
        pass


def sweep(repo: Repository, argument: Argument) -> list[str]:
    """See `Repository.sweep`."""
    return repo.sweep()
