"""Ways to carry JSON-RPC texts to an agent and back: lines on a Unix socket, WebSocket messages, HTTP POST.

Each has `send(text, deadline)`, `receive(deadline) -> text`, `for_events(deadline) -> Channel` (the channel on which
notifications can arrive: itself, or a WebSocket beside a POST) and `close()`. All raise the failures of `failures.py`.
"""

from __future__ import annotations

import contextlib
import os
import struct

from vdsm.client import failures, stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    import http.client
    from typing import Protocol

    from vdsm.client import tls

    class Channel(Protocol):
        def send(self, text: bytes, deadline: float | None) -> None: ...
        def receive(self, deadline: float | None) -> bytes: ...
        def for_events(self, deadline: float | None) -> Channel: ...
        def close(self) -> None: ...


PATH = "/jsonrpc"

# Far above any answer (statistics of thousands of VMs are a few MiB); a peer gone mad must not eat the memory.
LARGEST_TEXT_BYTES = 256 << 20
_LARGEST_HEAD_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 20

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Place:
    """An agent's HTTP port; over TLS with `credentials`."""

    def __init__(self, host: str, port: int, timeout_s: float, credentials: tls.Credentials | None = None) -> None:
        self.host, self.port = host, port
        self._timeout_s = timeout_s
        self._credentials = credentials

    def open(self) -> stream.Stream:
        """A new connection. Raises `CannotConnect`, `Denied`, and over TLS what `tls.open_tls` raises."""
        if self._credentials is None:
            return stream.open_tcp(self.host, self.port, self._timeout_s)
        from vdsm.client import tls  # loads OpenSSL: a third of a call's time where it is not needed

        return tls.open_tls(self.host, self.port, self._timeout_s, self._credentials)


class Lines:
    """One text per line."""

    def __init__(self, connected: stream.Stream) -> None:
        self._stream = connected
        self._searched = 0

    def send(self, text: bytes, deadline: float | None) -> None:
        self._stream.send(text + b"\n", deadline)

    def receive(self, deadline: float | None) -> bytes:
        buffer = self._stream.buffer
        while True:
            end = buffer.find(b"\n", self._searched)
            if end >= 0:
                text = bytes(buffer[:end])
                del buffer[: end + 1]
                self._searched = 0
                return text
            self._searched = len(buffer)
            if self._searched > LARGEST_TEXT_BYTES:
                self.close()
                raise failures.BadAnswer(f"A line of over {LARGEST_TEXT_BYTES} bytes")
            self._stream.fill(deadline)

    def for_events(self, deadline: float | None) -> Channel:
        return self

    def close(self) -> None:
        self._stream.close()


class WebSocket:
    """One text per message (RFC 6455, the client's side)."""

    def __init__(self, place: Place, deadline: float | None) -> None:
        self._stream = place.open()
        self._parts: list[bytes] = []
        try:
            self._shake_hands(place, deadline)
        except BaseException:
            self.close()
            raise

    def send(self, text: bytes, deadline: float | None) -> None:
        self._send_frame(_TEXT, text, deadline)

    def receive(self, deadline: float | None) -> bytes:
        while True:
            frame = self._take_frame()
            if frame is None:
                self._stream.fill(deadline)
                continue
            final, kind, payload = frame
            if kind == _PING:
                self._send_frame(_PONG, payload, deadline)
            elif kind == _CLOSE:
                self._end_closing(payload, deadline)
            elif kind != _PONG:
                if (kind == _CONTINUATION) != bool(self._parts):
                    raise self._broken("fragments out of order")
                self._parts.append(payload)
                if sum(map(len, self._parts)) > LARGEST_TEXT_BYTES:
                    raise self._broken("a message too large")
                if final:
                    text, self._parts = b"".join(self._parts), []
                    return text

    def for_events(self, deadline: float | None) -> Channel:
        return self

    def close(self) -> None:
        self._stream.close()

    def _shake_hands(self, place: Place, deadline: float | None) -> None:
        import base64
        import hashlib

        key = base64.b64encode(os.urandom(16))
        request = (
            f"GET {PATH} HTTP/1.1\r\nHost: {place.host}:{place.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key.decode()}\r\n\r\n"
        )
        self._stream.send(request.encode("ascii", "replace"), deadline)
        buffer = self._stream.buffer
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > _LARGEST_HEAD_BYTES:
                raise failures.BadAnswer("The peer's HTTP header does not end")
            self._stream.fill(deadline)
        first, *lines = bytes(buffer[:end]).decode("latin-1").split("\r\n")
        del buffer[: end + 4]
        status = first.partition(" ")[2]
        if not status.startswith("101"):
            raise refused(status)
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()
        if fields.get("upgrade", "").lower() != "websocket" or fields.get("sec-websocket-accept") != accept:
            raise failures.BadAnswer("The peer does not speak WebSocket")

    def _send_frame(self, kind: int, payload: bytes, deadline: float | None) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 0x80 | kind, 0x80 | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | kind, 0x80 | 127, size)
        mask = os.urandom(4)
        # The mask is there for proxies that guess; as one big number it costs a copy, not a loop over bytes.
        repeated = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
        masked = (int.from_bytes(payload, "little") ^ repeated).to_bytes(size, "little")
        self._stream.send(head + mask + masked, deadline)

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        """(final, kind, payload) of the first frame in the buffer, None while it is not whole."""
        buffer = self._stream.buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[0], buffer[1]
        kind, size, start = first & 0x0F, second & 0x7F, 2
        if first & 0x70 or second & 0x80 or kind not in (_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            raise self._broken("a frame of no known form")
        if kind >= _CLOSE and (size > 125 or not first & 0x80):
            raise self._broken("a control frame too large")
        if size > 125:
            layout = struct.Struct("!H" if size == 126 else "!Q")
            start += layout.size
            if len(buffer) < start:
                return None
            (size,) = layout.unpack_from(buffer, 2)
        if size > LARGEST_TEXT_BYTES:
            raise self._broken("a message too large")
        if len(buffer) < start + size:
            return None
        payload = bytes(buffer[start : start + size])
        del buffer[: start + size]
        return bool(first & 0x80), kind, payload

    def _end_closing(self, payload: bytes, deadline: float | None) -> None:
        with contextlib.suppress(failures.ConnectionLost):  # gone already; its reason is what counts
            self._send_frame(_CLOSE, payload[:2], deadline)
        self.close()
        why = payload[2:].decode(errors="replace")
        raise failures.ConnectionLost(f"The agent closed the connection {why}".rstrip())

    def _broken(self, what: str) -> failures.BadAnswer:
        self.close()
        return failures.BadAnswer(f"The peer's WebSocket sent {what}")


class Post:
    """One text per HTTP POST, each on a connection of its own: an idle one may be closed under the next request.

    Five times the cost of a WebSocket message; for callers with a single question."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stream: stream.Stream | None = None
        self._connection: http.client.HTTPConnection | None = None

    def send(self, text: bytes, deadline: float | None) -> None:
        import http.client

        self.close()
        self._stream = self._place.open()
        self._connection = http.client.HTTPConnection(self._place.host, self._place.port)
        self._connection.sock = self._stream.socket
        self._stream.settimeout(deadline)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            self._connection.request("POST", PATH, text, headers)
        except TimeoutError:
            raise failures.NoAnswer("The agent did not take the request in time") from None
        except OSError as error:
            raise self._stream_lost(error) from error

    def receive(self, deadline: float | None) -> bytes:
        import http.client

        try:
            status, text = self._response(deadline)
        except TimeoutError:
            raise failures.NoAnswer("The agent did not answer in time") from None
        except (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError) as error:
            raise self._stream_lost(error) from error
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise failures.BadAnswer(f"The peer does not speak HTTP: {stream.reason(error)}") from error
        self.close()
        if not status.startswith("200") and not text.lstrip().startswith(b"{"):
            raise refused(status)
        return text

    def _response(self, deadline: float | None) -> tuple[str, bytes]:
        """("200 OK", the body)."""
        if self._stream is None or self._connection is None:
            raise ConnectionError("nothing was sent")
        self._stream.settimeout(deadline)
        with self._connection.getresponse() as response:
            self._stream.heard = True
            text, length = bytearray(), response.length
            while len(text) != length:
                piece = response.read1(_CHUNK_BYTES if length is None else min(_CHUNK_BYTES, length - len(text)))
                if not piece:
                    break
                text += piece
                if len(text) > LARGEST_TEXT_BYTES:
                    raise failures.BadAnswer(f"A body of over {LARGEST_TEXT_BYTES} bytes")
                self._stream.settimeout(deadline)
            if length is not None and len(text) < length:
                raise ConnectionError("the body is cut short")
            return f"{response.status} {response.reason}", bytes(text)

    def for_events(self, deadline: float | None) -> Channel:
        self.close()
        return WebSocket(self._place, deadline)

    def _stream_lost(self, error: Exception) -> failures.ClientError:
        assert self._stream is not None
        return self._stream.lost(f"The connection broke: {stream.reason(error)}")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def refused(status: str) -> failures.ClientError:
    """What an HTTP status such as "403 Forbidden" means to the caller."""
    if status[:3] in ("401", "403"):
        return failures.Denied(f"The agent refuses the connection: {status}")
    return failures.BadAnswer(f"The peer answered: {status}")
