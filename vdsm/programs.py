"""Programs of the system, run as child processes that can always be got rid of.

Each program gets a session, and with it a process group, of its own: a kill reaches what it has started too. It dies
with the thread that started it (`setpriv --pdeathsig KILL`; the kernel follows the thread, not the process), so start
a program in the thread that waits for it. Never a `preexec_fn`: without one Python uses vfork, 1.4 ms with 500 MiB
resident; with one it copies the page tables, 52 ms.

Output is to be parsed, so LC_ALL is always C.UTF-8.
"""

import collections
import contextlib
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vdsm import errors

# How long a killed program may take to be gone before a caller with a deadline is let go. A program in an
# uninterruptible wait (frozen storage) outlives any signal.
KILL_GRACE_S = 1.0
# What is kept of the output of a program that is read line by line, for the error when it fails.
TAIL_LINES = 50


@dataclass(frozen=True)
class Limits:
    """What a program that parses foreign data may use. Set soft and hard before it starts."""

    address_space_bytes: int | None = None
    cpu_s: int | None = None

    def prefix(self) -> list[str]:
        """The command that sets them, to be put before the program's own."""
        options = []
        if self.address_space_bytes is not None:
            options.append(f"--as={self.address_space_bytes}")
        if self.cpu_s is not None:
            options.append(f"--cpu={self.cpu_s}")
        return ["prlimit", *options] if options else []


@dataclass(frozen=True)
class Completed:
    """A program that has ended. `exit_code` is negative when a signal ended it."""

    exit_code: int
    stdout: bytes
    stderr: bytes


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    input_bytes: bytes | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    limits: Limits | None = None,
) -> Completed:
    """Runs `argv` to its end and returns what it said. `env` is added to this process's own.

    At the deadline its whole process group is killed and `DeadlinePassed` raised, also when the program cannot die.
    Raises `ToolFailed` when there is no such program; an exit code is the caller's to judge (`check`).
    """
    stdin = subprocess.DEVNULL if input_bytes is None else subprocess.PIPE
    process = _spawn(_wrapped(argv, limits, True), env, pass_fds, stdin=stdin, stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(input_bytes, timeout_s)
    except subprocess.TimeoutExpired as expired:
        _abandon(process)
        raise errors.DeadlinePassed(what=argv[0], seconds=timeout_s) from expired
    except BaseException:
        _abandon(process)
        raise
    return Completed(process.returncode, stdout, stderr)


def start(
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    limits: Limits | None = None,
    die_with_parent: bool = True,
) -> "Running":
    """Starts `argv`; `Running.wait` then reads what it says. `env` is added to this process's own.

    `on_line` gets each line of its output and error output, in the thread that waits; a carriage return ends a line
    too, as progress bars use it. Raises `ToolFailed` when there is no such program.
    """
    command = _wrapped(argv, limits, die_with_parent)
    process = _spawn(command, env, pass_fds, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    return Running(argv[0], process, on_line)


# What QEMU's programs say when a table of the image that they close cannot be written. They end with 0 all the same,
# and what they wrote is not found again (seen with 7.2: rebase, its last write failing).
_NOT_WRITTEN = b"Failed to flush the "


def check(completed: Completed, program: str) -> Completed:
    """`completed`, or `ToolFailed` with the last lines the program said when its exit code is not 0, or when it says
    that it lost what it should have written."""
    if completed.exit_code == 0 and _NOT_WRITTEN not in completed.stderr + completed.stdout:
        return completed
    said = (completed.stderr.strip() or completed.stdout.strip()).decode(errors="replace").splitlines()
    reason = said[-1] if said else "it said nothing"
    raise errors.ToolFailed(program=program, exit_code=completed.exit_code, reason=reason, output=said[-TAIL_LINES:])


class Running:
    """A started program. `wait` is called by one thread, at once: its output must be read. `kill` by any thread."""

    def __init__(self, program: str, process: subprocess.Popen[bytes], on_line: Callable[[str], None] | None) -> None:
        self.program = program
        self.pid = process.pid
        self._process = process
        self._on_line = on_line
        self._lock = threading.Lock()
        self._tail: collections.deque[bytes] = collections.deque(maxlen=TAIL_LINES)
        self._unended = b""

    def wait(self, timeout_s: float | None = None) -> Completed:
        """Reads to the program's end; `stdout` of the answer holds its last lines.

        At the deadline, and when `on_line` raises, its process group is killed first. The program may then still
        live when it cannot die: `Completed` alone says that it ended, and nothing else of its group was left running.
        """
        try:
            self._read(timeout_s)
        except BaseException:
            self.kill()
            self._end(KILL_GRACE_S)
            raise
        exit_code = self._end(None)
        assert exit_code is not None
        return Completed(exit_code, b"\n".join(self._tail), b"")

    def kill(self) -> None:
        """Kills the program and its process group. Nothing happens when it has ended."""
        with self._lock:
            if self._process.returncode is None:
                _kill_group(self.pid)

    def _read(self, timeout_s: float | None) -> None:
        assert self._process.stdout is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        output, process = self._process.stdout.fileno(), os.pidfd_open(self.pid)
        poller = select.poll()
        poller.register(output, select.POLLIN)
        poller.register(process, select.POLLIN)
        try:
            while True:
                left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                ready = [fd for fd, _ in poller.poll(left_ms)]
                if not ready:
                    raise errors.DeadlinePassed(what=self.program, seconds=timeout_s)
                if output in ready:
                    said = os.read(output, 1 << 16)
                    self._take(said)
                    if not said:
                        poller.unregister(output)
                else:  # it has ended, and all it said is read; a daemon it left behind may hold the pipe for ever
                    break
        finally:
            os.close(process)
        self._take(b"\n")

    def _take(self, said: bytes) -> None:
        *lines, self._unended = (self._unended + said).replace(b"\r", b"\n").split(b"\n")
        for line in filter(None, lines):
            self._tail.append(line)
            if self._on_line is not None:
                self._on_line(line.decode(errors="replace"))

    def _end(self, timeout_s: float | None) -> int | None:
        """Ends the rest of the group while the unreaped leader still keeps its number from being reused, and reaps."""
        with self._lock:
            if self._process.returncode is None:
                _kill_group(self.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.returncode


def _wrapped(argv: Sequence[str], limits: Limits | None, die_with_parent: bool) -> list[str]:
    """`argv` behind the programs that set its limits and its parent-death signal."""
    if shutil.which(argv[0]) is None:
        raise errors.ToolFailed(program=argv[0], exit_code=127, reason="not installed")
    bound = ["setpriv", "--pdeathsig", "KILL"] if die_with_parent else []
    return [*bound, *(limits.prefix() if limits else []), *argv]


def _spawn(
    command: list[str], env: Mapping[str, str] | None, pass_fds: Sequence[int], *, stdin: int, stderr: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        pass_fds=pass_fds,
        start_new_session=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def _abandon(process: subprocess.Popen[bytes]) -> None:
    _kill_group(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_GRACE_S)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
