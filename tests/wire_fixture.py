"""The wire with the sample verbs, served by a thread of its own, and blocking peers that speak raw bytes to it."""

import asyncio
import base64
import contextlib
import grp
import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.loop_guard import LIMIT_S, LoopGuard
from tests.sample_verbs import World
from vdsm import config, events
from vdsm.api import certificates, server

TIMEOUT_S = 20.0
# The clients of TLS tests make keys and shake hands in this process: on a busy machine they keep Python's lock long.
_TLS_STALL_S = 1.0
_PLAIN = {"host": lambda params: params}


class Served(World):
    """A running `Api`. `settings` change its wire configuration; `tls` is that of TLS, if any."""

    def __init__(
        self,
        directory: Path,
        new_loop: Callable[[], asyncio.AbstractEventLoop],
        *,
        tls: config.Tls | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.path = str(directory / "vdsmd.sock")
        self.port = free_port()
        self.shaped: list[dict[str, Any]] = []
        self.events = events.EventLog(settings.get("event_history", 1000))
        group = grp.getgrgid(os.getgid()).gr_name
        given = {"unix_socket": self.path, "unix_group": group, "tcp_port": self.port} | settings
        self.wire = config.Wire(**given)
        whole = config.Config(wire=self.wire, tls=tls or config.Tls())
        self.api = server.Api(whole, self.verbs, self.events, {"vm": self._shape, **_PLAIN})
        self.guard: LoopGuard
        self._stall_s = _TLS_STALL_S if tls else LIMIT_S
        self._new_loop = new_loop
        self._stopping: asyncio.Event
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)

    def start(self) -> None:
        """Raises what `Api.start` raised."""
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S)
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        """Stops the api, and fails if its loop was blocked."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(TIMEOUT_S)
            assert not self._thread.is_alive(), "the api does not stop"
        self.close()
        assert not self.guard.stalls, "\n".join(self.guard.stalls)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.guard = LoopGuard(self._stall_s)
        try:
            await self.api.start()
        except (OSError, certificates.CertificateError) as error:
            self._failed = error
            return
        finally:
            self._ready.set()
        self.guard.start()
        try:
            await self._stopping.wait()
            await self.api.stop()
        finally:
            self.guard.stop()

    def _shape(self, params: dict[str, Any]) -> dict[str, Any]:
        self.shaped.append(params)
        return {"shaped": params}

    # -- peers

    @contextlib.contextmanager
    def unix(self) -> Iterator["UnixPeer"]:
        with contextlib.closing(UnixPeer(self.path)) as peer:
            yield peer

    @contextlib.contextmanager
    def websocket(self, **headers: str) -> Iterator["WebSocketPeer"]:
        with contextlib.closing(WebSocketPeer(self.port, headers)) as peer:
            yield peer

    @contextlib.contextmanager
    def http(self) -> Iterator["HttpPeer"]:
        with contextlib.closing(HttpPeer(self.port)) as peer:
            yield peer


def nonsense(size: int) -> Iterator[bytes]:
    """So many bytes, in pieces: to make them at once would hold up every thread, the tested one too."""
    piece = b"x" * (1 << 18)
    for _ in range(size // len(piece)):
        yield piece
    yield piece[: size % len(piece)]


def request(method: str, params: Any = None, ident: Any = 1) -> bytes:
    call = {"jsonrpc": "2.0", "method": method, "id": ident}
    return json.dumps(call if params is None else call | {"params": params}).encode()


class Peer:
    """What the peers share: `send` a text as one message, `receive` the next one."""

    def send(self, text: bytes) -> None:
        raise NotImplementedError

    def receive(self) -> bytes | None:
        """The next message; None when the other side has closed."""
        raise NotImplementedError

    def call(self, method: str, params: Any = None, ident: Any = 1) -> Any:
        """The whole answer to a call; events that come before it are dropped."""
        self.send(request(method, params, ident))
        while True:
            answer = self.message()
            if "method" not in answer:
                return answer

    def message(self) -> Any:
        text = self.receive()
        assert text is not None, "closed"
        return json.loads(text)

    def exchange(self, text: bytes, answered: bool) -> bytes | None:
        """Sends `text`; what comes back if it shall be `answered`, else None if indeed nothing does.

        Nothing has come when two calls sent after it are answered first: they are odd, so they take the longest way.
        """
        self.send(text)
        if answered:
            return self.receive()
        for ident in ("first sentinel", "second sentinel"):
            self.send(request("Sample.echo", [0], ident))
        answers = [self.receive(), self.receive()]
        return next((answer for answer in answers if answer is None or b"sentinel" not in answer), None)


class UnixPeer(Peer):
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT_S)
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self._file = self.socket.makefile("rb")

    def send(self, text: bytes) -> None:
        self.socket.sendall(text + b"\n")

    def send_nonsense(self, size: int) -> None:
        """One frame of so many bytes."""
        for piece in nonsense(size):
            self.socket.sendall(piece)
        self.socket.sendall(b"\n")

    def receive(self) -> bytes | None:
        try:
            return self._file.readline() or None
        except ConnectionResetError:
            return None

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class WebSocketPeer(Peer):
    """A client by hand, so that frames can be cut and joined."""

    TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

    def __init__(self, port: int, headers: dict[str, str]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        key = base64.b64encode(os.urandom(16)).decode()
        given = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key}
        lines = [f"{name}: {value}" for name, value in (given | {"Sec-WebSocket-Version": "13"} | headers).items()]
        self.socket.sendall("\r\n".join(["GET /jsonrpc HTTP/1.1", *lines, "", ""]).encode())
        self._file = self.socket.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline() not in (b"\r\n", b""):
            pass

    @staticmethod
    def frame(payload: bytes, opcode: int = TEXT, final: bool = True) -> bytes:
        """A masked frame."""
        mask, length = os.urandom(4), len(payload)
        key = int.from_bytes(mask * (length // 4 + 1), "little") & ((1 << 8 * length) - 1)
        masked = (int.from_bytes(payload, "little") ^ key).to_bytes(length, "little")
        return WebSocketPeer._head(opcode | 0x80 * final, length) + mask + masked

    @staticmethod
    def _head(first: int, length: int) -> bytes:
        if length < 126:
            return bytes([first, 0x80 | length])
        mark, size = (126, 2) if length < 1 << 16 else (127, 8)
        return bytes([first, 0x80 | mark]) + length.to_bytes(size, "big")

    def send(self, text: bytes) -> None:
        self.socket.sendall(self.frame(text))

    def send_nonsense(self, size: int) -> None:
        """One text message of so many bytes."""
        self.socket.sendall(self._head(0x80 | self.TEXT, size) + bytes(4))
        for piece in nonsense(size):
            self.socket.sendall(piece)

    def receive_frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of the next frame; (0, b"") at the end of the stream."""
        head = self._file.read(2)
        if len(head) < 2:
            return 0, b""
        assert head[0] & 0x80, "a fragment"
        length = head[1]
        if length >= 126:
            length = int.from_bytes(self._file.read(2 if length == 126 else 8), "big")
        return head[0] & 0x0F, self._file.read(length)

    def receive(self) -> bytes | None:
        opcode, payload = self.receive_frame()
        if opcode in (self.CLOSE, 0):
            return None
        assert opcode == self.TEXT
        return payload

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class HttpPeer(Peer):
    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def post(self, body: bytes, **headers: str) -> http.client.HTTPResponse:
        """The response, read."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/jsonrpc", body, {"Content-Type": "application/json"} | named)

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> http.client.HTTPResponse:
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]  # ours: a response is read once
        return response

    def exchange(self, text: bytes, answered: bool = True) -> bytes | None:
        response = self.post(text)
        body: bytes = response.body  # type: ignore[attr-defined]  # ours: a response is read once
        assert (response.status, bool(body)) in ((200, True), (204, False)), response.status
        return body or None

    def call(self, method: str, params: Any = None, ident: Any = 1) -> Any:
        answer = self.exchange(request(method, params, ident))
        return None if answer is None else json.loads(answer)

    def close(self) -> None:
        self.connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
