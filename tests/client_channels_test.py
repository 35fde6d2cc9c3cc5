"""The client over WebSocket and HTTP POST: against aiohttp's server, and against peers that break the rules."""

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import fake_agent
import pytest
from aiohttp import WSCloseCode, WSMsgType, web

from vdsm.client import channels, failures, stream, transport

# -- against aiohttp -------------------------------------------------------------------------------------------------


class Site:
    """aiohttp in a thread: answers `echo` with the parameters, and shows the requests it got."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self.respond: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.post
        self.sockets = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.place = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> str:
        application = web.Application(client_max_size=64 << 20)
        application.router.add_post("/jsonrpc", self._post)
        application.router.add_get("/jsonrpc", self._websocket)
        self._runner = web.AppRunner(application, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return "127.0.0.1:{1}".format(*self._runner.addresses[0])

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return await self.respond(request)

    async def post(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._answer(await request.json()))

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.sockets += 1
        websocket = web.WebSocketResponse(max_msg_size=64 << 20)
        await websocket.prepare(request)
        async for message in websocket:
            assert message.type is WSMsgType.TEXT
            call = json.loads(message.data)
            if call["method"] == "hang up":
                await websocket.close(code=WSCloseCode.GOING_AWAY, message=b"going down")
                break
            await websocket.ping(b"are you there")
            await websocket.send_json({"jsonrpc": "2.0", "method": "event", "params": {"sequence": self.sockets}})
            await websocket.send_json(self._answer(call))
        return websocket

    def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        if call["method"] == "fail":
            return {"jsonrpc": "2.0", "id": call["id"], "error": {"code": 66, "message": "no such job"}}
        return {"jsonrpc": "2.0", "id": call["id"], "result": call.get("params")}

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def site() -> Iterator[Site]:
    running = Site()
    yield running
    running.close()


@pytest.fixture(params=["http", "ws"])
def client(site: Site, request: pytest.FixtureRequest) -> Iterator[transport.Client]:
    with transport.connect(f"{request.param}://{site.place}", 10) as connected:
        yield connected


# Lengths at which a WebSocket frame's header changes its form, and far beyond.
@pytest.mark.parametrize("length", [0, 1, 100, 125, 126, 127, 65400, 65535, 65536, 65537, 5 << 20])
def test_texts_of_any_length(client: transport.Client, length: int) -> None:
    frame = len(json.dumps({"jsonrpc": "2.0", "method": "echo", "id": f"{client.flow_id}:1", "params": [""]}))
    for size in {length, max(length - frame, 0)}:  # the parameter, and the whole frame, of this length
        assert client.call("echo", ["é" * (size % 7) + "x" * size]) == ["é" * (size % 7) + "x" * size]


def test_errors_arrive(client: transport.Client) -> None:
    with pytest.raises(failures.ClientError, match="no such job") as caught:
        client.call("fail")
    assert caught.value.code == 66
    assert client.call("echo", {"a": 1}) == {"a": 1}


def test_no_origin_is_sent_and_the_type_is_json(site: Site, client: transport.Client) -> None:
    client.call("echo", {})
    for headers in site.headers:
        assert "origin" not in headers
        assert headers["host"] == site.place
        assert "upgrade" in headers or headers["content-type"] == "application/json"


def test_events_turn_posts_into_a_websocket(site: Site) -> None:
    with transport.connect(f"http://{site.place}", 10) as client:
        client.call("echo")
        assert site.sockets == 0
        events = client.events(["job"])
        assert client.subscription == {"topics": ["job"]}
        assert next(events) == {"sequence": 1}
        assert client.call("echo", {"a": 1}) == {"a": 1}
        assert next(events) == {"sequence": 1}
        assert (site.sockets, len(site.headers)) == (1, 2)


def test_the_agent_hangs_up_a_websocket(site: Site) -> None:
    with transport.connect(f"ws://{site.place}", 10) as client:
        with pytest.raises(failures.ConnectionLost, match="going down"):
            client.call("hang up")
        with pytest.raises(failures.ConnectionLost):
            client.call("echo")


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_nobody_listens(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(failures.CannotConnect, match="refused"):
        transport.connect(f"{scheme}://{place}")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".invalid"])
def test_no_such_host(host: str) -> None:
    with pytest.raises(failures.CannotConnect):
        transport.connect(f"http://{host}:1", 5)


@pytest.mark.parametrize(
    ("status", "content_type", "body", "kind", "what"),
    [
        (403, "text/plain", "Origin", failures.Denied, "403 Forbidden"),
        (401, "text/plain", "", failures.Denied, "401 Unauthorized"),
        (404, "text/html", "<html>", failures.BadAnswer, "404 Not Found"),
        (200, "text/html", "<html>", failures.BadAnswer, "not JSON"),
        (200, "application/json", "", failures.BadAnswer, "not JSON"),
        (413, "application/json", '{"id":null,"error":{"code":1,"message":"big"}}', failures.ClientError, "big"),
    ],
)
def test_http_statuses(site: Site, status: int, content_type: str, body: str, kind: type[Exception], what: str) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, content_type=content_type, text=body)

    site.respond = respond
    with transport.connect(f"http://{site.place}", 10) as client:
        with pytest.raises(kind, match=what) as caught:
            client.call("echo")
        assert type(caught.value) is kind


def test_a_chunked_body(site: Site) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        call = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in (b'{"id":"', call["id"].encode(), b'","result"', b":[1]}"):
            await response.write(piece)
        return response

    site.respond = respond
    with transport.connect(f"http://{site.place}", 10) as client:
        assert client.call("echo") == [1]


def test_a_post_that_is_not_answered_in_time(site: Site) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response()

    site.respond = respond
    with transport.connect(f"http://{site.place}", 10) as client:
        with pytest.raises(failures.NoAnswer):
            client.call("echo", timeout_s=0.2)
        site.respond = site.post
        assert client.call("echo", [1]) == [1]


# -- POST against peers that break the rules -------------------------------------------------------------------------


def request_of(peer: socket.socket) -> bytes:
    """Everything up to the end of the request's header and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = peer.recv(1 << 16)
        if not piece:
            raise ConnectionError  # connect() only looks whether somebody listens
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            while len(body) < int(line.partition(b":")[2]):
                body += peer.recv(1 << 16)
    return head


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"", failures.ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", failures.ConnectionLost),
        (b"{}\n", failures.BadAnswer),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", failures.BadAnswer),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n", failures.BadAnswer),
    ],
    ids=["nothing", "half a body", "no HTTP", "no JSON-RPC", "endless header"],
)
def test_a_peer_that_answers_a_post_wrongly(said: bytes, kind: type[failures.ClientError]) -> None:
    def talk(peer: socket.socket) -> None:
        request_of(peer)
        peer.sendall(said)

    with (
        fake_agent.on_tcp(talk) as place,
        transport.connect(f"http://{place}", 10) as client,
        pytest.raises(kind),
    ):
        client.call("echo")


def test_a_body_that_drips_is_bound_by_the_deadline() -> None:
    def talk(peer: socket.socket) -> None:
        request_of(peer)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            peer.sendall(b"x")
            time.sleep(0.01)  # slow, but never silent: no single receive times out

    with fake_agent.on_tcp(talk) as place, transport.connect(f"http://{place}", 10) as client:
        began = time.monotonic()
        with pytest.raises(failures.NoAnswer):
            client.call("echo", timeout_s=0.3)
        assert time.monotonic() - began < 5


# -- WebSocket against peers that break the rules --------------------------------------------------------------------

TEXT, CLOSE, PING, PONG, CONTINUATION = 1, 8, 9, 10, 0
FINAL = 0x80


def frame(first: int, payload: bytes, *, masked: int = 0) -> bytes:
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", first, masked | size) + payload
    return struct.pack("!BBH", first, masked | 126, size) + payload


def accept(peer: socket.socket) -> None:
    fields = dict(line.split(b": ", 1) for line in request_of(peer).split(b"\r\n")[1:])
    digest = hashlib.sha1(fields[b"Sec-WebSocket-Key"] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    peer.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: WebSocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
        + base64.b64encode(digest)
        + b"\r\n\r\n"
    )


def read_frame(peer: socket.socket) -> tuple[int, bytes]:
    """(first byte, payload) of a short frame; it must be masked."""
    first, second = peer.recv(2, socket.MSG_WAITALL)
    assert second & 0x80
    mask = peer.recv(4, socket.MSG_WAITALL)
    payload = peer.recv(second & 0x7F, socket.MSG_WAITALL) if second & 0x7F else b""
    return first, bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


RESULT = b'{"jsonrpc":"2.0","id":"f:1","result":"fine"}'


def call_against(after_handshake: bytes, then: Callable[[socket.socket], None] = lambda peer: None) -> Any:
    """The result of a call to a peer that answers the first message with these bytes."""

    def talk(peer: socket.socket) -> None:
        accept(peer)
        read_frame(peer)
        peer.sendall(after_handshake)
        then(peer)

    with fake_agent.on_tcp(talk) as place, transport.connect(f"ws://{place}", 10, flow_id="f") as client:
        return client.call("echo")


@pytest.mark.parametrize(
    "frames",
    [
        frame(FINAL | TEXT, RESULT),
        frame(FINAL | 2, RESULT),
        frame(TEXT, RESULT[:5]) + frame(CONTINUATION, RESULT[5:9]) + frame(FINAL | CONTINUATION, RESULT[9:]),
        frame(TEXT, b"") + frame(FINAL | CONTINUATION, RESULT),
        frame(TEXT, RESULT[:5]) + frame(FINAL | PONG, b"x") + frame(FINAL | CONTINUATION, RESULT[5:]),
        struct.pack("!BBQ", FINAL | TEXT, 127, len(RESULT)) + RESULT,
    ],
    ids=["whole", "binary", "fragments", "empty fragment", "pong between fragments", "64-bit length"],
)
def test_forms_of_a_message(frames: bytes) -> None:
    assert call_against(frames) == "fine"


def test_a_ping_between_fragments_is_answered() -> None:
    answered: list[tuple[int, bytes]] = []

    def then(peer: socket.socket) -> None:
        answered.append(read_frame(peer))
        peer.sendall(frame(FINAL | CONTINUATION, RESULT[5:]))

    assert call_against(frame(TEXT, RESULT[:5]) + frame(FINAL | PING, b"hello"), then) == "fine"
    assert answered == [(FINAL | PONG, b"hello")]


def test_a_close_is_answered() -> None:
    answered: list[tuple[int, bytes]] = []
    with pytest.raises(failures.ConnectionLost, match="closed the connection bye"):
        call_against(frame(FINAL | CLOSE, b"\x03\xe9bye"), lambda peer: answered.append(read_frame(peer)))
    assert answered == [(FINAL | CLOSE, b"\x03\xe9")]


class Connected(channels.Place):
    """A place to which a connection is there already."""

    def __init__(self, connection: stream.Stream) -> None:
        super().__init__("peer", 1, 10)
        self._connection = connection

    def open(self) -> stream.Stream:
        return self._connection


def test_parting_words_are_heard_when_the_peer_has_hung_up() -> None:
    """Over a socketpair, where what was said before the end always arrives; TCP may lose it."""
    ours, peers = socket.socketpair()

    def talk() -> None:
        with peers:
            accept(peers)
            peers.sendall(frame(FINAL | CLOSE, b"\x03\xf1message too large"))

    talking = threading.Thread(target=talk)
    talking.start()
    channel = channels.WebSocket(Connected(stream.Stream(ours)), time.monotonic() + 10)
    talking.join()
    with contextlib.closing(channel):
        client = transport.Client(channel, 10)
        with pytest.raises(failures.ConnectionLost, match="message too large"):
            client.call("echo", ["x" * 100_000])


@pytest.mark.parametrize(
    "frames",
    [
        frame(FINAL | TEXT, b"\0\0\0\0" + RESULT, masked=0x80),
        frame(FINAL | 0x40 | TEXT, RESULT),
        frame(FINAL | 3, RESULT),
        frame(FINAL | 11, b""),
        frame(PING, b""),
        frame(FINAL | PING, b"x" * 126),
        frame(FINAL | CONTINUATION, RESULT),
        frame(TEXT, RESULT[:5]) + frame(FINAL | TEXT, RESULT),
        struct.pack("!BBQ", FINAL | TEXT, 127, 1 << 40),
        struct.pack("!BBQ", FINAL | TEXT, 127, 2**64 - 1),
    ],
    ids=[
        "masked",
        "reserved bit",
        "unknown kind",
        "unknown control",
        "fragmented ping",
        "large ping",
        "continuation of nothing",
        "new message within a message",
        "1 TiB",
        "2^64",
    ],
)
def test_a_frame_against_the_rules_ends_the_connection(frames: bytes) -> None:
    with pytest.raises(failures.BadAnswer, match="The peer's WebSocket sent"):
        call_against(frames)


def test_the_end_within_a_frame() -> None:
    with pytest.raises(failures.ConnectionLost):
        call_against(frame(FINAL | TEXT, RESULT)[:20])


def test_half_a_frame_at_the_deadline_is_not_lost() -> None:
    timed_out = threading.Event()

    def talk(peer: socket.socket) -> None:
        accept(peer)
        read_frame(peer)
        whole = frame(TEXT, RESULT[:5]) + frame(FINAL | CONTINUATION, RESULT[5:])
        peer.sendall(whole[:9])
        timed_out.wait(10)
        peer.sendall(whole[9:])
        read_frame(peer)
        peer.sendall(frame(FINAL | TEXT, RESULT.replace(b"f:1", b"f:2")))

    with fake_agent.on_tcp(talk) as place, transport.connect(f"ws://{place}", 10, flow_id="f") as client:
        with pytest.raises(failures.NoAnswer):
            client.call("echo", timeout_s=0.2)
        timed_out.set()
        assert client.call("echo") == "fine"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", failures.Denied),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", failures.BadAnswer),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", failures.BadAnswer),
        (
            b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
            failures.BadAnswer,
        ),
        (b"x" * 200_000, failures.BadAnswer),
        (b"", failures.ConnectionLost),
        (b"\r\n\r\n", failures.BadAnswer),
    ],
    ids=["denied", "not found", "no accept key", "another's accept key", "endless header", "nothing", "empty header"],
)
def test_a_handshake_that_fails(said: bytes, kind: type[failures.ClientError]) -> None:
    def talk(peer: socket.socket) -> None:
        request_of(peer)
        peer.sendall(said)

    with fake_agent.on_tcp(talk) as place, pytest.raises(kind) as caught:
        transport.connect(f"ws://{place}", 10)
    assert type(caught.value) is kind


def test_a_handshake_that_is_not_answered_in_time() -> None:
    done = threading.Event()

    def talk(peer: socket.socket) -> None:
        done.wait(10)

    with fake_agent.on_tcp(talk) as place:
        with pytest.raises(failures.NoAnswer):
            transport.connect(f"ws://{place}", 0.2)
        done.set()
