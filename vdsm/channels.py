"""JSON messages between two processes that share a socket."""

import contextlib
import json
import select
import socket
import struct
import threading
import time
from typing import Any

MAX_FRAME_BYTES = 16 << 20

_HEAD = struct.Struct(">I")


class Channel:
    """JSON messages over a stream socket, each behind its length. Any thread may send, one receives."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._sending = threading.Lock()
        self._received = bytearray()
        # In a child: the write end of its liveness pipe, to be handed to every process that must count as its own.
        self.liveness_fd = -1

    def fileno(self) -> int:
        return self._line.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Raises ConnectionError when the other side is gone."""
        payload = json.dumps(message, separators=(",", ":")).encode()
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(payload)} bytes")
        with self._sending:
            self._line.sendall(_HEAD.pack(len(payload)) + payload)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other side is gone. Raises TimeoutError; nothing is lost by that."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (payload := self._next()) is None:
            if not readable(self._line.fileno(), deadline):
                raise TimeoutError("no message")
            try:
                data = self._line.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._received += data
        message: dict[str, Any] = json.loads(payload)
        return message

    def hang_up(self) -> None:
        """Ends the connection, for both sides; a thread of this process that receives gets None."""
        with contextlib.suppress(OSError):  # the other side was quicker
            self._line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and frees the descriptor. No other thread may be using the channel."""
        self.hang_up()
        self._line.close()

    def _next(self) -> bytes | None:
        """Takes one whole payload out of what has been received."""
        if len(self._received) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack_from(self._received)
        if length > MAX_FRAME_BYTES:
            raise ConnectionError(f"a message of {length} bytes")
        end = _HEAD.size + length
        if len(self._received) < end:
            return None
        payload = bytes(self._received[_HEAD.size : end])
        del self._received[:end]
        return payload


def readable(fd: int, deadline: float | None) -> bool:
    """True once `fd` is readable or at its end, False at the deadline."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return bool(poller.poll(left_ms))
