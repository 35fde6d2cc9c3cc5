"""The Unix socket: newline-delimited frames for local admins.

Who may connect is a matter of the socket's group and mode; who it was is asked of the kernel (SO_PEERCRED). Frames of
one connection are begun in order, and answered as they end. Reading stops while `max_calls_per_connection` calls are
under way or the peer does not read its answers, so a connection holds a bounded number of bytes whatever its peer does.
A peer that ends its sending side gets the answers to what it asked, then the connection is closed; what a peer that has
gone was waiting for (Job.wait) ends at once.
"""

import asyncio
import collections
import errno
import grp
import itertools
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from vdsm import config, errors, logs
from vdsm.api import caller as callers
from vdsm.api import dispatch, envelope, frames

logger = logs.get("api.unixsocket")

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13; the socket module does not name it
_GROUPS_BYTES = 1024  # the most that getsockopt takes: a peer in more than 256 groups is judged without them
_MODE = 0o660
_BACKLOG = 128

Gone = Callable[[callers.Caller], object]


class UnixServer:
    """Listens on the configured path. All methods belong to the event loop."""

    def __init__(self, wire: config.Wire, dispatcher: dispatch.Dispatcher, gone: Gone) -> None:
        """`gone` is called for each connection that has ended."""
        self.wire = wire
        self.dispatcher = dispatcher
        self._gone = gone
        self._numbers = itertools.count(1)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def start(self) -> None:
        """Raises OSError when another agent listens there, or the socket cannot be made."""
        path = Path(self.wire.unix_socket)
        self._group = _group(self.wire.unix_group)
        listening = _bind(path, self._group)
        self._inode = path.stat().st_ino
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listening, backlog=_BACKLOG)

    def close(self) -> None:
        """Takes no new connections, and removes the socket unless another agent has put its own there."""
        if self._server is None:
            return
        self._server.close()
        path = Path(self.wire.unix_socket)
        if path.exists() and path.stat().st_ino == self._inode:
            path.unlink()

    async def stop(self, timeout_s: float) -> None:
        """Ends the connections: each sends the answers it has; one that does not get rid of them is cut off."""
        for connection in list(self._connections):
            connection.finish()
        if ended := [connection.ended for connection in self._connections]:
            await asyncio.wait(ended, timeout=timeout_s)
        for connection in list(self._connections):
            connection.abort()

    def judge(self, peer: socket.socket) -> tuple[callers.Role | None, callers.Identity, int]:
        """What the peer may do (None: nothing), who it is, and its process id."""
        pid, uid, gid = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        allowed = uid in (0, os.geteuid()) or self._group in (gid, *_groups(peer))
        return callers.Role.ADMIN if allowed else None, callers.Identity("user", str(uid)), pid

    def opened(self, connection: "_Connection") -> str:
        """Keeps a new connection; gives it its name."""
        self._connections.add(connection)
        return f"unix-{next(self._numbers)}"

    def closed(self, connection: "_Connection", caller: callers.Caller) -> None:
        self._connections.discard(connection)
        caller.stop_waiting()
        self._gone(caller)


class _Connection(asyncio.Protocol):
    """One connection, driven by the event loop."""

    def __init__(self, server: UnixServer) -> None:
        self._server = server
        self._limit = server.wire.max_calls_per_connection
        self._answer = server.dispatcher.answer
        self._splitter = frames.Splitter(server.wire.max_body_bytes)
        self._backlog: collections.deque[bytes | None] = collections.deque()  # frames not begun
        self._running: set[asyncio.Future[dispatch.Answer]] = set()
        self._writable = asyncio.Event()
        self._writable.set()
        self._blocked = False  # the peer does not read
        self._reading = True
        self._finishing = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- the event loop's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        role, who, pid = self._server.judge(transport.get_extra_info("socket"))
        name = self._server.opened(self)
        self._caller = callers.Caller(name, "unix", role or callers.Role.MONITOR, self, who)
        if role is None:
            logger.warning("%s refused: %s, pid %d, is not in the socket's group", name, who, pid)
            self._transport.abort()
            return
        logger.info("%s connected: %s, pid %d", name, who, pid)

    def data_received(self, data: bytes) -> None:
        for frame in self._splitter.feed(data):
            if self._backlog or self._blocked or len(self._running) >= self._limit:
                self._backlog.append(frame)
            else:
                self._begin(frame)
        if self._backlog:
            self._proceed()

    def eof_received(self) -> bool:
        if _hung_up(self._transport.get_extra_info("socket")):
            self.abort()
            return False
        if self._splitter.unfinished:
            self._write(envelope.failure(None, errors.ParseError(reason="the last frame has no newline")))
        self.finish()
        return True  # the connection stays open for answers still to come

    def pause_writing(self) -> None:
        self._blocked = True
        self._writable.clear()

    def resume_writing(self) -> None:
        self._blocked = False
        self._writable.set()
        self._proceed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._backlog.clear()
        self._writable.set()
        self._server.closed(self, self._caller)
        logger.info("%s closed", self._caller.name)
        self.ended.set_result(None)

    # -- ours

    async def send(self, frame: bytes) -> None:
        """`caller.Connection.send`."""
        self._write(frame)
        await self._writable.wait()
        if self._transport.is_closing():
            raise ConnectionResetError

    def finish(self) -> None:
        """Begins no frame that is not here yet; closes once all is answered."""
        self._finishing = True
        self._proceed()

    def abort(self) -> None:
        self._transport.abort()

    def _proceed(self) -> None:
        """Begins what may begin, and reads on when nothing is left over."""
        while self._backlog and not self._blocked and len(self._running) < self._limit:
            self._begin(self._backlog.popleft())
        if self._finishing:
            if not self._backlog and not self._running:
                self._transport.close()
        elif self._reading is bool(self._backlog):
            self._reading = not self._backlog
            (self._transport.resume_reading if self._reading else self._transport.pause_reading)()

    def _begin(self, frame: bytes | None) -> None:
        if frame is None:
            reason = f"longer than {self._server.wire.max_body_bytes} bytes"
            self._write(envelope.failure(None, errors.InvalidRequest(reason=reason)))
            return
        answer = self._answer(frame, self._caller)
        if type(answer) is bytes:
            self._transport.write(answer)
        elif answer is not None:
            running = asyncio.ensure_future(cast(Awaitable[dispatch.Answer], answer))
            self._running.add(running)
            running.add_done_callback(self._answered)

    def _answered(self, running: "asyncio.Future[dispatch.Answer]") -> None:
        self._running.discard(running)
        if not running.cancelled():
            self._write(running.result())
        self._proceed()

    def _write(self, frame: dispatch.Answer) -> None:
        if frame is not None and not self._transport.is_closing():
            self._transport.write(frame)


def _hung_up(connection: socket.socket) -> bool:
    """Whether the peer has closed its socket for good, and not only its sending side."""
    poller = select.poll()
    poller.register(connection.fileno(), 0)
    return any(event & select.POLLHUP for _, event in poller.poll(0))


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OSError(f"wire.unix_group: there is no group {name}") from None


def _groups(peer: socket.socket) -> list[int]:
    """The peer's supplementary groups when it connected."""
    try:
        groups = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return []
    return [group for (group,) in struct.iter_unpack("I", groups)]


def _bind(path: Path, group: int) -> socket.socket:
    """A bound socket with its owner and mode. Nobody can connect before it listens, so nobody sees another mode."""
    _remove_dead(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        os.chown(path, -1, group)
        path.chmod(_MODE)
    except OSError:
        bound.close()
        path.unlink(missing_ok=True)
        raise
    return bound


def _remove_dead(path: Path) -> None:
    """Removes the socket of an agent that has died. Raises OSError when one answers there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(f"another agent listens on {path}")
