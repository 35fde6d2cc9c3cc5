"""Processes by identity, and the processes of one stack.

A pid alone may be somebody else's by now, so a process is named by pid and start time, and signalled through a pidfd.
All processes of a stack live in its mount namespace, and so do their children, whoever started them and whatever they
did to their parents or environment. That namespace is recognised by what is bound over /etc/libvirt in it, since
numbers of dead namespaces are used again.
"""

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Identity(NamedTuple):
    """One process, for ever: `start` is its start time in clock ticks since boot."""

    pid: int
    start: int


def identify(pid: int) -> Identity | None:
    """The process that has `pid` now; None when there is none or it is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else Identity(pid, int(fields[19]))


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the third field on: what comes before may hold any character."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def parent(process: Identity) -> int | None:
    """The pid of its parent; None when it is gone."""
    fields = _stat(process.pid)
    return None if fields is None else int(fields[1])


def alive(process: Identity) -> bool:
    return identify(process.pid) == process


def send(process: Identity, number: int) -> bool:
    """Signals it; False when it is gone."""
    with _pidfd(process) as fd:
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        return True


def wait_gone(processes: Iterable[Identity], timeout_s: float) -> list[Identity]:
    """Waits until all have ended; those that have not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    left = []
    for process in processes:
        with _pidfd(process) as fd:
            if fd is None:
                continue
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                left.append(process)
    return left


def end(processes: Iterable[Identity], grace_s: float, kill_s: float = 5.0) -> list[Identity]:
    """SIGTERM, `grace_s` seconds later SIGKILL. Those that are still there after that (stuck in the kernel)."""
    targets = [process for process in processes if send(process, signal.SIGTERM)]
    stubborn = [process for process in wait_gone(targets, grace_s) if send(process, signal.SIGKILL)]
    return wait_gone(stubborn, kill_s)


def inside(run_dir: Path) -> list[Identity]:
    """Every live process of the stack in `run_dir`."""
    verdicts: dict[str, bool] = {}
    found = []
    for pid in (entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - not a path
            if namespace not in verdicts:
                verdicts[namespace] = _is_private(_mountinfo(pid), run_dir)
            process = identify(int(pid)) if verdicts[namespace] else None
            if process is not None:
                found.append(process)
    return found


def _mountinfo(pid: str) -> str:
    """Raises ProcessLookupError also for one that is just ending, for which the kernel has another error."""
    try:
        return Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ProcessLookupError(errno.ESRCH, "it is ending", pid) from error
        raise


def _is_private(mountinfo: str, run_dir: Path) -> bool:
    """Whether /etc/libvirt is the run directory's. Roots are paths inside their file system: compare the end."""
    tail = f"/{run_dir.name}/libvirt/etc"
    mounts = (line.split(" ", 5) for line in mountinfo.splitlines())
    return any(fields[4] == "/etc/libvirt" and fields[3].endswith(tail) for fields in mounts)


@contextlib.contextmanager
def _pidfd(process: Identity) -> Iterator[int | None]:
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # The pidfd names whoever has the pid now; only the start time says that it is the process that was meant.
        yield fd if alive(process) else None
    finally:
        os.close(fd)
