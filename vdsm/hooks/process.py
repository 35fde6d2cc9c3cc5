"""One hook script as a process that cannot outstay, outgrow or outlive its run."""

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# What is kept of what a script says; a flood costs no more memory than this.
TAIL_BYTES = 4096
# How often a running script looks whether it is wanted any more.
TICK_S = 0.1
# How long a killed script may take to be gone. One in an uninterruptible wait outlives any signal.
KILL_GRACE_S = 1.0
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Ended:
    """`exit_code` is negative when a signal ended the script; None when it was killed here, for the reason `why`."""

    exit_code: int | None
    why: str
    seconds: float
    stderr: str


def run(path: Path, env: Mapping[str, str], timeout_s: float, unwanted: Callable[[], bool]) -> Ended:
    """Runs the script with exactly that environment, in / and without input, until it ends, `timeout_s` have passed or
    `unwanted` says so. Blocks; raises OSError when no process can be made.

    It has a session and with it a process group of its own. What is left of the group when the script ends or has to
    be ended is killed: what shall live on takes a session of its own. It dies with the thread that runs it.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        ["/usr/bin/setpriv", "--pdeathsig", "KILL", "--", str(path)],
        env=dict(env),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    tail = bytearray()
    with process.stderr as said:
        os.set_blocking(said.fileno(), False)
        why = _watch(process.pid, said.fileno(), tail, began + timeout_s, unwanted)
        # The leader is not reaped yet, so its number is still the group's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_GRACE_S)
        _read(said.fileno(), tail)  # its last words; once, since somebody who escaped may go on for ever
    exit_code = None if why else process.returncode
    return Ended(exit_code, why, time.monotonic() - began, tail.decode(errors="replace").strip())


def _watch(pid: int, said: int, tail: bytearray, deadline: float, unwanted: Callable[[], bool]) -> str:
    """Reads along until the process has ended, "" then, or must be killed: why."""
    ended = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(said, select.POLLIN)
    poller.register(ended, select.POLLIN)
    try:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return "its deadline passed"
            if unwanted():
                return "it is not wanted any more"
            ready = [fd for fd, _ in poller.poll(min(left_s, TICK_S) * 1000)]
            if said in ready and not _read(said, tail):
                poller.unregister(said)  # closed: the rest is silence
            if ended in ready:
                return ""
    finally:
        os.close(ended)


def _read(said: int, tail: bytearray) -> bool:
    """Takes what is there, keeping the last `TAIL_BYTES`; False at the end."""
    try:
        chunk = os.read(said, _CHUNK)
    except BlockingIOError:
        return True
    tail += chunk
    del tail[:-TAIL_BYTES]
    return bool(chunk)
