"""Waiting for something that another process or thread will make true, and asking whether a process lives."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Returns once `condition` is true; fails the test when it is not within `timeout_s`, which is
    for what never comes: a busy machine takes ten times as long as an idle one."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.002)


def exists(pid: int) -> bool:
    """True until the process has been reaped."""
    return state(pid) is not None


def running(pid: int) -> bool:
    """True while the process lives; a zombie does not."""
    return state(pid) not in (None, "Z")


def zombie(pid: int) -> bool:
    """True while the process is dead and not reaped."""
    return state(pid) == "Z"


def state(pid: int) -> str | None:
    """The kernel's letter for the process's state, None when there is no such process."""
    return state_of(Path(f"/proc/{pid}/stat"))


def state_of(stat: Path) -> str | None:
    """As `state`, by the file in /proc of a process or of one of its threads."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def opened(pid: int) -> set[str]:
    """What the process's descriptors are, as its links in /proc say; those that it closes meanwhile are left out."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found


def private_parents(path: Path) -> list[Path]:
    """The directories above `path` that pytest made for this user alone."""
    made = path.relative_to(tempfile.gettempdir()).parts
    return list(path.parents[: len(made) - 1])
