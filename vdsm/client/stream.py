"""Bytes over a connected socket, received into a buffer, each step bound by a deadline.

Deadlines are values of `time.monotonic()`; None waits for ever. A deadline that passes while receiving loses nothing:
what has come stays in the buffer and the next call goes on. One that passes while sending leaves a part of a frame
behind: the caller closes the stream.
"""

from __future__ import annotations

import socket
import struct
import time

from vdsm.client import failures

_CHUNK_BYTES = 256 << 10


class Stream:
    """`socket` is there for a protocol that another library speaks; it must not have left anything in `buffer`."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.buffer = bytearray()
        self.heard = False  # whether anything has come

    def send(self, data: bytes, deadline: float | None) -> None:
        """All of `data`. Raises `NoAnswer`, or what `lost` gives; nothing more can be sent then, but what the peer said
        before it went can still be received."""
        try:
            self.settimeout(deadline)
            self.socket.sendall(data)
        except TimeoutError:
            raise failures.NoAnswer("The agent did not take the request in time") from None
        except OSError as error:
            raise self.lost(f"The connection broke: {reason(error)}") from error

    def fill(self, deadline: float | None) -> None:
        """Wait for at least one more byte in `buffer`. Raises `NoAnswer`, or what `lost` gives."""
        try:
            self.settimeout(deadline)
            data = self.socket.recv(_CHUNK_BYTES)
        except TimeoutError:
            raise failures.NoAnswer("The agent did not answer in time") from None
        except OSError as error:
            raise self.lost(f"The connection broke: {reason(error)}") from error
        if not data:
            raise self.lost("The agent closed the connection")
        self.heard = True
        self.buffer += data

    def lost(self, message: str) -> failures.ClientError:
        """The error for a connection that has ended."""
        return failures.ConnectionLost(message)

    def settimeout(self, deadline: float | None) -> None:
        """Raises `NoAnswer` when it has passed."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise failures.NoAnswer("The time for an answer is over")
        self.socket.settimeout(left)

    def close(self) -> None:
        self.socket.close()


def open_unix(path: str, timeout_s: float) -> Stream:
    """Raises `CannotConnect`, `Denied`."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # With a full backlog a non-blocking connect fails at once; a blocking one waits, as long as this says.
        whole, part = divmod(timeout_s, 1)
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(part * 1e6)))
        connecting.connect(path)
    except (OSError, ValueError) as error:
        connecting.close()
        raise _not_connected(path, error) from error
    return Stream(connecting)


def open_tcp(host: str, port: int, timeout_s: float) -> Stream:
    """Raises `CannotConnect`, `Denied`."""
    try:
        connected = socket.create_connection((host, port), timeout_s)
    except (OSError, UnicodeError) as error:
        raise _not_connected(f"{host}:{port}", error) from error
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Stream(connected)


def _not_connected(place: str, error: Exception) -> failures.ClientError:
    if isinstance(error, PermissionError):
        return failures.Denied(f"No permission to connect to {place}")
    why = "it does not accept in time" if isinstance(error, BlockingIOError) else reason(error)
    return failures.CannotConnect(f"Cannot connect to {place}: {why}")


def reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
