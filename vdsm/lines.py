"""Blocking calls with a deadline, each on a connection of its own.

A call that waits without a limit, as libvirt's do for a QEMU that hangs, must not keep its caller. So it runs in a
thread that has a connection, a line, and the caller waits for it. When the deadline passes the line is left behind;
it ends when the call does. Lines without a call are kept for the next ones.
"""

import concurrent.futures
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from vdsm import errors, logs

_log = logs.get("lines")
_T = TypeVar("_T")

_Call = tuple[Callable[[Any], Any], "concurrent.futures.Future[Any]"]


class _Line:
    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.connection: Any = None
        self.tried = threading.Event()  # to connect; the connection, or why there is none, is known
        self.thread: threading.Thread
        self.left = False  # nobody waits for its call any more


class Lines:
    """Methods may be called from any thread.

    `connect` makes a connection, or raises a `VdsmError`; `usable` tells whether one may have another call; `hang_up`
    ends one. The first and the last run in the line's thread.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Any],
        usable: Callable[[Any], bool],
        hang_up: Callable[[Any], object],
        *,
        connect_s: float,
        idle: int,
        left: int,
    ) -> None:
        """`connect_s`: how long a new connection may take. `idle` lines are kept. While `left` lines are left behind,
        only urgent calls get new ones."""
        self._name = name
        self._connect, self._usable, self._hang_up = connect, usable, hang_up
        self._connect_s = connect_s
        self._max_idle = idle
        self._max_left = left
        self._lock = threading.Lock()
        self._idle: list[_Line] = []
        self._left = 0

    def call(self, what: str, action: Callable[[Any], _T], timeout_s: float | None, *, urgent: bool = False) -> _T:
        """What `action` answers for a connection. Raises what it raises, and what `connect` raises.

        `DeadlinePassed` naming `what` when it takes longer than `timeout_s`: it may still be done then.
        `HypervisorUnavailable` when there is no connection in time, or too many calls hang already: it is not done.
        """
        line = self._take(urgent)
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        line.calls.put((action, future))
        if not line.tried.wait(self._connect_s) and self._leave(line, future):
            raise errors.HypervisorUnavailable(reason=f"it takes no connection within {self._connect_s:g} s")
        try:
            concurrent.futures.wait([future], timeout_s)
            if not future.done() and self._leave(line, future):
                _log.error("%s hangs; it is left behind", what)
                raise errors.DeadlinePassed(what=what, seconds=timeout_s)
            return future.result()
        finally:
            self._give_back(line)

    def hang_up(self, wait_s: float = 0.0) -> None:
        """Ends the lines that have no call, and waits for them so long."""
        with self._lock:
            idle, self._idle = self._idle, []
        for line in idle:
            line.calls.put(None)
        for line in idle:
            line.thread.join(wait_s)

    def _take(self, urgent: bool) -> _Line:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._left >= self._max_left and not urgent:
                raise errors.HypervisorUnavailable(reason=f"{self._left} calls to it hang already")
        line = _Line()
        line.thread = threading.Thread(target=self._run, args=(line,), name=self._name, daemon=True)
        line.thread.start()
        return line

    def _leave(self, line: _Line, future: "concurrent.futures.Future[Any]") -> bool:
        """False when the call has just ended."""
        with self._lock:
            if future.done():
                return False
            line.left = True
            self._left += 1
            return True

    def _give_back(self, line: _Line) -> None:
        with self._lock:
            if line.left or line.connection is None:
                return
            if self._usable(line.connection) and len(self._idle) < self._max_idle:
                self._idle.append(line)
                return
        line.calls.put(None)

    # -- in the line's thread -----------------------------------------------------------------------------------------

    def _run(self, line: _Line) -> None:
        while (call := line.calls.get()) is not None:
            self._answer(line, *call)
            del call  # an idle line keeps nothing of the last one
            if line.left or line.connection is None:
                break
        if line.connection is not None:
            self._hang_up(line.connection)

    def _answer(self, line: _Line, action: Callable[[Any], Any], future: "concurrent.futures.Future[Any]") -> None:
        try:
            if line.connection is None:
                line.connection = self._connect()
            line.tried.set()
            if line.left:
                raise errors.HypervisorUnavailable(reason="nobody waits any more")  # and nobody expects it to be done
            tell = functools.partial(future.set_result, action(line.connection))
        except BaseException as error:  # noqa: BLE001 - the border of the thread: the caller gets it
            tell = functools.partial(future.set_exception, error)
        with self._lock:
            tell()
            self._left -= line.left
        line.tried.set()
