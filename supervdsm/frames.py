"""Frames on the helper's socket: four bytes of length, most significant first, then that many bytes of JSON.

One connection carries one call and its reply. Both ends give the whole exchange a deadline, so a peer that sends a byte
now and then holds nobody.
"""

import contextlib
import socket
import struct
import time

# A call is a name and a few short fields; a reply may one day list all network devices of a host.
MAX_CALL_BYTES = 64 << 10
MAX_REPLY_BYTES = 4 << 20

_LENGTH = struct.Struct("!I")


class FrameError(Exception):
    """The peer sent no frame: too large, or cut off. The text says which."""


def send(link: socket.socket, payload: bytes, deadline: float) -> None:
    """Sends one frame. Raises `TimeoutError` at `deadline` (on the monotonic clock), `OSError` for a broken link.

    What finds room at once is sent even after it: a sender that the machine did not let run must not lose an answer.
    """
    rest = memoryview(_LENGTH.pack(len(payload)) + payload)
    link.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        rest = rest[link.send(rest) :]
    while rest:
        link.settimeout(_left(deadline))
        rest = rest[link.send(rest) :]


def receive(link: socket.socket, limit_bytes: int, deadline: float) -> bytes | None:
    """The next frame, None when the peer closed without one. Raises `FrameError`, `TimeoutError` and `OSError`."""
    head = _read(link, _LENGTH.size, deadline)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise FrameError("the connection ended inside a frame")
    (size,) = _LENGTH.unpack(head)
    if size > limit_bytes:
        raise FrameError(f"a frame of {size} bytes; the limit is {limit_bytes}")
    payload = _read(link, size, deadline)
    if len(payload) < size:
        raise FrameError("the connection ended inside a frame")
    return payload


def _read(link: socket.socket, size: int, deadline: float) -> bytes:
    """`size` bytes, or fewer when the peer closed."""
    data = bytearray()
    while len(data) < size:
        link.settimeout(_left(deadline))
        piece = link.recv(size - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
