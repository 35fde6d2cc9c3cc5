"""What stands in front of aiohttp on each TCP connection: short paths for what it has seen before.

Clients repeat themselves, and aiohttp's machinery (parser, request, task, response) costs several times what a call
costs. So, in the spirit of dispatch, the usual case goes a short way of our own and everything else through aiohttp:

- A POST whose head is, byte for byte, one that aiohttp has parsed and `http` has accepted on this connection, and that
  came in one piece or two (many clients send head and body apart), is answered here: the same head means the same.
- A WebSocket message that came as one whole, final, masked frame in one piece is answered here, as long as aiohttp has
  no message of this connection in hand.

aiohttp's protocol is driven through the methods of `asyncio.Protocol` alone, and never sees what is answered here. Once
it is not plain any more where a request or frame begins (pipelined requests, fragments), the connection is aiohttp's
for good.
"""

import asyncio
import email.utils
import time
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import HttpVersion11, hdrs, web

from vdsm.api import caller as callers
from vdsm.api import dispatch, websocket

# Heads known on one connection: a client has one for each length of body that it sends.
_HEADS = 64
_HEAD_END = b"\r\n\r\n"

# First bytes of frames (RFC 6455, 5.2): final text or binary; close, ping, pong.
_MESSAGES = (0x81, 0x82)
_CONTROLS = (0x88, 0x89, 0x8A)
_MASKED = 0x80
_MEDIUM = 126  # in place of a length below it: the length is in the next two bytes
_LONG = 127  # in the next eight


class Front(asyncio.Protocol):
    """One connection. Belongs to the event loop."""

    def __init__(
        self,
        inner: asyncio.Protocol,
        dispatcher: dispatch.Dispatcher,
        role: callers.Role,
        limit: int,
        lost: Callable[[], object],
        identity: callers.Identity = callers.LOOPBACK,
    ) -> None:
        """`inner`: aiohttp's protocol; `limit`: the largest body in bytes; `lost`: called when the connection ends."""
        self._inner = inner
        self._answer = dispatcher.answer
        self._role = role
        self._limit = limit
        self._lost = lost
        self._identity = identity
        self._heads: dict[bytes, int] = {}  # accepted heads, with the length of the body each announces
        self._idle = True  # aiohttp has no request in hand
        self._head = b""  # of the request that it has
        self._given = 0  # bytes that it was given behind that head
        self._part = b""  # a known head whose body is still coming
        self._blocked = False  # the peer does not read
        self.running: asyncio.Future[dispatch.Answer] | None = None  # a POST answered here that takes its time
        self._held = b""  # what came meanwhile
        self._websocket: websocket.WebSocketConnection | None = None

    # -- what http tells

    def accepted(self, request: web.BaseRequest) -> None:
        """aiohttp parsed this POST, and it was answered like any other: so may the next with the same head be."""
        whole = self._head.endswith(_HEAD_END) and request.content_length == self._given
        plain = hdrs.EXPECT not in request.headers and hdrs.TRANSFER_ENCODING not in request.headers
        if whole and plain and request.version == HttpVersion11 and request.keep_alive:
            if len(self._heads) < _HEADS:
                self._heads[self._head] = self._given
            self._idle = True

    def upgraded(self, connection: websocket.WebSocketConnection) -> None:
        """The connection is a WebSocket now."""
        if self._head.endswith(_HEAD_END) and self._given == 0:
            self._websocket = connection

    # -- the event loop's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        host, port = transport.get_extra_info("peername")[:2]
        place = f"http-{port}" if self._identity is callers.LOOPBACK else f"https-{host}-{port}"
        self.caller = callers.Caller(place, "http", self._role, identity=self._identity)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.running is not None:
            self._held += data
            self._transport.pause_reading()
        elif self._websocket is not None:
            self._frame_received(self._websocket, data)
        elif self._idle:
            self._request_received(data)
        else:
            self._given += len(data)
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._blocked = True
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._blocked = False
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.caller.stop_waiting()
        self._inner.connection_lost(exc)
        self._lost()

    # -- POST

    def _request_received(self, data: bytes) -> None:
        part, self._part = self._part, b""
        if part:
            data = part + data
        end = data.find(_HEAD_END) + len(_HEAD_END)
        head, got = data[:end], len(data) - end
        length = self._heads.get(head, -1)
        if got < length and not part:
            self._part = data
            return
        if got != length or self._blocked:
            self._idle, self._head, self._given = False, head, got
            self._inner.data_received(data)
            return
        answer = self._answer(data[end:], self.caller)
        if answer is None or type(answer) is bytes:
            self._transport.write(_response(answer))
        else:
            self.running = asyncio.ensure_future(cast(Awaitable[dispatch.Answer], answer))
            self.running.add_done_callback(self._answered)

    def _answered(self, running: "asyncio.Future[dispatch.Answer]") -> None:
        self.running = None
        if self._transport.is_closing():
            return
        self._transport.write(_response(running.result()))
        if self._held:
            held, self._held = self._held, b""
            self._transport.resume_reading()
            self.data_received(held)

    # -- WebSocket

    def _frame_received(self, connection: websocket.WebSocketConnection, data: bytes) -> None:
        start = _start_of_payload(data)
        ours = start and data[0] in _MESSAGES and len(data) - start <= self._limit
        if ours and connection.parked and not self._blocked:
            if (answer := connection.begin(_unmasked(data, start))) is not None:
                self._transport.write(_frame(answer))
            return
        if not start:
            self._websocket = None  # where frames begin is aiohttp's knowledge from now on
        connection.handed_over()
        self._inner.data_received(data)


def _start_of_payload(data: bytes) -> int:
    """Where the payload begins, if `data` is exactly one whole masked frame that is no fragment; else 0."""
    if len(data) < 6 or data[0] not in _MESSAGES + _CONTROLS or not data[1] & _MASKED:
        return 0
    length, start = data[1] & ~_MASKED, 6
    if length == _MEDIUM:
        length, start = int.from_bytes(data[2:4], "big"), 8
    return start if length != _LONG and len(data) == start + length else 0


def _unmasked(data: bytes, start: int) -> bytes:
    """The payload of a masked frame."""
    length = len(data) - start
    mask = (data[start - 4 : start] * (length // 4 + 1))[:length]
    return (int.from_bytes(data[start:], "little") ^ int.from_bytes(mask, "little")).to_bytes(length, "little")


def _frame(text: bytes) -> bytes:
    """A text frame as servers send it."""
    length = len(text)
    if length < _MEDIUM:
        return bytes((_MESSAGES[0], length)) + text
    mark, size = (_MEDIUM, 2) if length < 1 << 16 else (_LONG, 8)
    return bytes((_MESSAGES[0], mark)) + length.to_bytes(size, "big") + text


class _Clock:
    """The Date header's value, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def date(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, email.utils.formatdate(second, usegmt=True).encode()
        return self._text


_clock = _Clock()


def _response(answer: dispatch.Answer) -> bytes:
    """The same responses as http's, as bytes."""
    if answer is None:
        return b"HTTP/1.1 204 No Content\r\nDate: %b\r\n\r\n" % _clock.date()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: %b\r\n\r\n%b" % (
        len(answer),
        _clock.date(),
        answer,
    )
