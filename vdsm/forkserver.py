"""A small fork server: processes with the code loaded, in milliseconds, without forking the agent.

    agent --(posix_spawn)--> server, one thread, all modules imported --(fork)--> child

Each child has three lines:

- its *channel*, a socket pair for JSON messages to and from whoever spawned it;
- its *liveness pipe*: the child holds the only write end and hands it to every process that must count as its own. The
  pipe's end of file means that the last of them is gone;
- its status line, on which the server says the child's pid, later its exit status.

The server leaves a dead child unreaped until its liveness pipe has ended. A child may be registered with sanlock under
its pid, and its tools keep the registration when it dies; a reused pid would get the signals meant for them.

Whatever outlives its child is killed. The server is the subreaper of all below it, so a tool that lost its parent
becomes the server's own child, also one that made itself a daemon, and one that was started in the very moment in
which its parent was killed. Children die with the server, and the server ends after its last child once the agent is
gone.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from vdsm import channels, errors, logs

_log = logs.get("forkserver")

START_TIMEOUT_S = 60.0  # imports of the whole agent take 3.5 to 4 s on a slow host
ORPHAN_POLL_MS = 20  # how often the server looks for orphans of a dead child until they are gone
MAX_FDS = 16

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_EXIT = struct.Struct("=i")
# The server gets the agent's module path as it is, so that it runs the same code wherever that was found.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vdsm import forkserver; forkserver.main()"


class Child:
    """A process forked by the server, seen from the agent. Methods may be called from any thread."""

    def __init__(self, pid: int, pidfd: int, channel: channels.Channel, status: socket.socket, liveness: int) -> None:
        self.pid = pid
        self.channel = channel
        self._pidfd = pidfd
        self._status = status
        self._liveness = liveness
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def wait_exit(self, timeout_s: float | None = None) -> int:
        """How the process itself ended: its exit code, or minus the signal. Raises TimeoutError.

        Tools that it started may still run then: see `wait_gone`. A child that went with a dead server was killed.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._exit_code is None and not channels.readable(self._status.fileno(), deadline):
            raise TimeoutError(f"process {self.pid} still runs")
        with self._lock:
            if self._exit_code is None:
                said = self._status.recv(_EXIT.size)
                self._exit_code = _EXIT.unpack(said)[0] if said else -signal.SIGKILL
            return self._exit_code

    def wait_gone(self, timeout_s: float | None = None) -> bool:
        """True once every process that inherited the liveness pipe is gone, False when that takes longer."""
        return _ended(self._liveness, None if timeout_s is None else timeout_s * 1000)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signals the process, and never a stranger that got its pid. Nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Gives up the lines to the child; it sees its channel end."""
        self.channel.close()
        self._status.close()
        os.close(self._liveness)
        os.close(self._pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ForkServer:
    """Starts the server at the first spawn, and again when it died. Methods may be called from any thread.

    `preload` are the modules whose functions may be spawned. They must start no threads when imported. The server and
    its children log as the agent does: to `log_file`, or to standard error.
    """

    def __init__(self, preload: Sequence[str], log_level: str = "INFO", log_file: str = "") -> None:
        self._preload = list(preload)
        self._log = (log_level, log_file)
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's pid, None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server if it does not run; returns before its imports are done."""
        with self._lock:
            self._ensure()

    def spawn(self, target: str, argument: dict[str, Any], *, fds: Sequence[int] = ()) -> Child:
        """Forks a child that calls `target` ("module:function") with `argument` and its channel.

        The channel's first message is the argument, so `argument` is JSON; the numbers that `fds` have in the child
        are added to it as "fds". Raises `DeadlinePassed` when the server does not answer, `Unexpected` when it died.
        """
        if target.partition(":")[0] not in self._preload:
            raise ValueError(f"{target} is not preloaded")
        ours, theirs = socket.socketpair()
        status, report = socket.socketpair()
        liveness, held = os.pipe()
        try:
            self._ask(target, [theirs.fileno(), report.fileno(), liveness, held, *fds])
        except BaseException:
            for line in (ours, status):
                line.close()
            os.close(liveness)
            raise
        finally:
            theirs.close()
            report.close()
            os.close(held)
        return _greet(ours, status, liveness, argument)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the server after its children; after `timeout_s` they are all killed."""
        with self._lock:
            process, self._process = self._process, None
            self._hang_up()
        if process is None:
            return
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.warning("the fork server's children did not end within %s s", timeout_s)
            process.kill()
            process.wait()

    def _ask(self, target: str, fds: list[int]) -> None:
        """Sends the request, to a new server if the old one is gone."""
        with self._lock:
            try:
                socket.send_fds(self._ensure(), [target.encode()], fds)
            except ConnectionError:  # it is dying in this very moment
                assert self._process is not None
                self._process.wait()
                socket.send_fds(self._ensure(), [target.encode()], fds)

    def _ensure(self) -> socket.socket:
        if self._requests is not None and self.pid is None:
            _log.warning("the fork server died, starting another")
            self._hang_up()
        if self._requests is None:
            requests, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            boot = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(served.fileno())]
            with served:
                self._process = subprocess.Popen(
                    [*boot, *self._log, *self._preload],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[served.fileno()],
                    start_new_session=True,
                )
            self._requests = requests
        return self._requests

    def _hang_up(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None


def _greet(ours: socket.socket, status: socket.socket, liveness: int, argument: dict[str, Any]) -> Child:
    """The child whose birth the server announces on `status`."""
    channel = channels.Channel(ours)
    try:
        with contextlib.suppress(ConnectionError):  # a child that died at once: its exit status says so
            channel.send(argument)
        if not channels.readable(status.fileno(), time.monotonic() + START_TIMEOUT_S):
            raise errors.DeadlinePassed(what="the fork server", seconds=START_TIMEOUT_S)
        said, fds, _, _ = socket.recv_fds(status, _EXIT.size, 1, socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise errors.Unexpected(reason="the fork server died")
    except BaseException:
        channel.close()
        status.close()
        os.close(liveness)
        raise
    return Child(_EXIT.unpack(said)[0], fds[0], channel, status, liveness)


def _ended(pipe: int, timeout_ms: float | None) -> bool:
    """True once nobody has the write end of `pipe` any more. What somebody may have written into it is no sign."""
    poller = select.poll()
    poller.register(pipe, 0)
    return bool(poller.poll(timeout_ms))


# -- in the server ---------------------------------------------------------------------------------------------------


def main() -> None:
    """The server process: imports what the command line names, then forks on request until the agent is gone."""
    _, requests_fd, level, file, *preload = sys.argv[1:]
    os.set_inheritable(int(requests_fd), False)
    logs.setup(level, file)
    for name in preload:
        importlib.import_module(name)
    if threading.active_count() > 1:
        raise RuntimeError(f"a module of {preload} starts threads: forking would lose them")
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()  # children share these pages; a collection in one of them must not copy them
    _Server(socket.socket(fileno=int(requests_fd))).serve()


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass
class _Forked:
    """A child as the server keeps it. `report` is None once its exit status has been told: it is dead, not reaped."""

    pid: int
    pidfd: int
    report: socket.socket | None
    liveness: int

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.liveness)
        if self.report is not None:
            self.report.close()


class _Server:
    def __init__(self, requests: socket.socket) -> None:
        self._requests: socket.socket | None = requests
        self._children: dict[int, _Forked] = {}  # by pid
        self._pid = os.getpid()

    def serve(self) -> None:
        """Until the agent is gone and the last child and orphan too."""
        orphans = False
        while self._requests is not None or self._children or orphans:
            poller = select.poll()
            if self._requests is not None:
                poller.register(self._requests, select.POLLIN)
            for child in self._children.values():
                if child.report is None:
                    poller.register(child.liveness, 0)  # no event but the pipe's end
                else:
                    poller.register(child.pidfd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(ORPHAN_POLL_MS if orphans else None)}
            ended = [child for child in self._children.values() if child.pidfd in ready or child.liveness in ready]
            for child in ended:
                self._bury(child)
            if ended or orphans:
                orphans = self._kill_orphans()
            if self._requests is not None and self._requests.fileno() in ready:
                self._take_request(self._requests)

    def _bury(self, child: _Forked) -> None:
        """Tells that the child died, and reaps it as soon as all who hold its liveness pipe are gone."""
        if child.report is not None:
            self._tell_exit(child, child.report)
        if _ended(child.liveness, 0):
            os.waitpid(child.pid, 0)
            del self._children[child.pid]
            child.close()

    def _tell_exit(self, child: _Forked, report: socket.socket) -> None:
        found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert found is not None
        exit_code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        with contextlib.suppress(ConnectionError), report:
            report.send(_EXIT.pack(exit_code))
        child.report = None

    def _kill_orphans(self) -> bool:
        """Kills and reaps all children that were not forked here: dead ones left them. True while there may be more.

        A killed one that had children hands them on to this process before it can be reaped, so none is missed.
        """
        found = adopted(set(self._children))
        for pid in found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        return bool(found)

    def _take_request(self, requests: socket.socket) -> None:
        target, fds, _, _ = socket.recv_fds(requests, 4096, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not target:  # the agent is gone
            requests.close()
            self._requests = None
            return
        line, report, liveness, held, *rest = fds
        try:
            pid = os.fork()
        except OSError:  # no more processes: whoever asked sees the status line end; those that run go on
            _log.exception("cannot fork")
            for fd in fds:
                os.close(fd)
            return
        if pid == 0:
            channel = channels.Channel(socket.socket(fileno=line))
            self._become(target.decode(), channel, (report, liveness), held, rest)
        for fd in (line, held, *rest):
            os.close(fd)
        child = _Forked(pid, os.pidfd_open(pid), socket.socket(fileno=report), liveness)
        self._children[pid] = child
        assert child.report is not None
        with contextlib.suppress(ConnectionError):
            socket.send_fds(child.report, [_EXIT.pack(pid)], [child.pidfd])

    def _become(
        self, target: str, channel: channels.Channel, foreign: tuple[int, int], held: int, fds: list[int]
    ) -> None:
        """The forked child: lets go of the server's lines, runs the target, never returns."""
        status = 1
        try:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            os.setsid()
            if os.getppid() != self._pid:
                os._exit(status)  # the server died before it could take this child with it
            for known in self._children.values():
                known.close()
            for fd in foreign:
                os.close(fd)
            assert self._requests is not None
            self._requests.close()
            channel.liveness_fd = held
            status = _call(target, channel, fds)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001 - the border of the process: nothing above could tell of it
            _log.exception("%s failed", target)
        finally:
            sys.stderr.flush()
            os._exit(status)


def _call(target: str, channel: channels.Channel, fds: list[int]) -> int:
    argument = channel.receive()
    if argument is None:
        return 0  # whoever asked has gone
    if fds:
        argument["fds"] = fds
    module, _, function = target.partition(":")
    called: Callable[[dict[str, Any], channels.Channel], object] = getattr(sys.modules[module], function)
    called(argument, channel)
    return 0


def adopted(own: set[int]) -> list[int]:
    """Children of this process that are not `own`: orphans that a subreaper inherited, living or dead."""
    listed = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return [pid for pid in map(int, listed.split()) if pid not in own]
