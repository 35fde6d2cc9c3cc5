"""The helper's only lasting process: it accepts, looks at who it is, and forks a session. It reads nothing from peers.

One thread; forking is safe. It ends by SIGTERM or SIGINT, or takes everything with it when it is killed: sessions hold
a pipe whose other end is here, and kill their workers when it closes.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import time
from typing import NoReturn

from supervdsm import audit, contract, frames, session, settings

log = logging.getLogger("supervdsm.server")

# Calls at once. Each is two processes of about 10 MiB, shared with this one but for 2 MiB.
MAX_CALLS = 32
# How long (seconds) a call waits for room before it is refused. More than a burst of short calls needs.
PATIENCE_S = 1.0
# How long (seconds) the sessions under way may take to kill their workers and answer when the helper ends.
GRACE_S = 2.0

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Server:
    """Serves a listener until a signal comes. Signals count from its making on: make it before anybody can see the
    listener, and a helper that is ended as soon as it can be reached ends as it should."""

    def __init__(self, context: settings.Settings, trail: audit.Trail) -> None:
        self._context = context
        self._trail = trail
        self._sessions: set[int] = set()
        self._full_since = 0.0
        self._stopping = False
        # Sessions read `stop`; it ends when this process does.
        self._stop, self._running = os.pipe()
        # Signals wake the loop by a byte, so none is lost between a look at its effect and the next wait.
        self._wake, self._waker = socket.socketpair()
        self._catch_signals()

    def run(self, listener: socket.socket) -> None:
        """Returns when a signal has come and the sessions have ended."""
        listener.setblocking(False)
        while not self._stopping:
            self._reap()
            full = len(self._sessions) >= MAX_CALLS
            patience = self._full_since + PATIENCE_S - time.monotonic()
            if full and patience > 0:
                self._wait(patience)
            elif listener in self._wait(None, listener):
                self._accept(listener, full)
        self._end()

    def _catch_signals(self) -> None:
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_soon)

    def _stop_soon(self, number: int, frame: object) -> None:
        self._stopping = True

    def _wait(self, timeout_s: float | None, *others: socket.socket) -> list[socket.socket]:
        """Those of `others` that are readable, once one is, a signal came, or the time is over."""
        ready, _, _ = select.select([self._wake, *others], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        return ready

    def _reap(self) -> None:
        for pid in list(self._sessions):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                self._sessions.discard(pid)

    def _accept(self, listener: socket.socket, full: bool) -> None:
        try:
            link, _ = listener.accept()
        except OSError as error:  # the peer has gone again
            log.info("accept: %s", error)
            return
        with link:
            peer = _peer(link)
            try:
                if peer.uid not in (0, self._context.uid):
                    raise contract.Refused(f"user {peer.uid} may not call")
                if full:
                    raise contract.Unavailable(f"{MAX_CALLS} calls are running")
                self._start(listener, link, peer)
            except contract.HelperError as error:
                self._turn_away(link, peer, error)

    def _turn_away(self, link: socket.socket, peer: audit.Peer, error: contract.HelperError) -> None:
        """Answers without reading: who may not call is not parsed."""
        self._trail.write(peer, None, None, error.kind, error.reason, 0.0)
        with contextlib.suppress(OSError):
            frames.send(link, contract.encode_error(error), time.monotonic() + 0.1)

    def _start(self, listener: socket.socket, link: socket.socket, peer: audit.Peer) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            raise contract.Unavailable(f"fork: {error.strerror}") from error
        if pid == 0:
            self._session(listener, link, peer)
        self._sessions.add(pid)
        if len(self._sessions) >= MAX_CALLS:
            self._full_since = time.monotonic()

    def _session(self, listener: socket.socket, link: socket.socket, peer: audit.Peer) -> NoReturn:
        """In the session's process. A named border: nothing comes out of it but its end."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # The server tells sessions to end by `stop`, so that each still writes its line.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            listener.close()
            os.close(self._running)
            session.Session(link, peer, self._context, self._stop).serve(self._trail)
        except Exception:
            log.exception("a session of pid %d failed", peer.pid)
        finally:
            os._exit(0)

    def _end(self) -> None:
        os.close(self._running)
        deadline = time.monotonic() + GRACE_S
        self._reap()
        while self._sessions and (left := deadline - time.monotonic()) > 0:
            self._wait(left)
            self._reap()
        for pid in self._sessions:
            os.kill(pid, signal.SIGKILL)


def _peer(link: socket.socket) -> audit.Peer:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return audit.Peer(pid, uid)
