"""The three ways in, over real sockets: corpus, limits, back-pressure, who may connect, short paths, the end."""

import asyncio
import contextlib
import gc
import json
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests import jsonrpc_corpus as corpus
from tests.loop_guard import LIMIT_S
from tests.sample_verbs import World
from tests.until import private_parents, until
from tests.wire_fixture import HttpPeer, Peer, Served, UnixPeer, WebSocketPeer, nonsense, request
from vdsm.api import server

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
TRANSPORTS = ["unix", "websocket", "http"]
Serve = Callable[..., Served]


@pytest.fixture(scope="module", params=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return LOOPS[request.param]


@pytest.fixture
def serve(new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> Iterator[Serve]:
    """Starts an api with the given wire settings."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            served = Served(tmp_path, new_loop, **settings)
            served.start()
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(scope="module")
def shared(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """For tests that change nothing and send little."""
    served = Served(tmp_path_factory.mktemp("wire"), new_loop)
    served.start()
    yield served
    served.stop()


def peer(served: Served, transport: str) -> contextlib.AbstractContextManager[Peer]:
    return {"unix": served.unix, "websocket": served.websocket, "http": served.http}[transport]()


# -- the corpus


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_corpus(shared: Served, transport: str) -> None:
    wrong = []
    with peer(shared, transport) as one:
        for case in corpus.CASES:
            for turn in ("first", "again"):  # a repeated POST takes another path
                try:
                    corpus.check(case.expected, one.exchange(case.text, case.expected is not corpus.NOTHING))
                except AssertionError as error:
                    wrong.append(f"{case.name} ({turn}): {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_largest_request_is_taken(serve: Serve, transport: str) -> None:
    limit = 4 << 20
    bare = len(request("Sample.echo", {"value": ""}))
    with peer(serve(max_body_bytes=limit), transport) as one:
        value = "x" * (limit - bare)
        assert one.call("Sample.echo", {"value": value}) == {"jsonrpc": "2.0", "result": value, "id": 1}


@pytest.mark.parametrize("size", [(4 << 20) + 1, 64 << 20], ids=["limit+1", "64-MiB"])
class TestTooLarge:
    def test_unix_refuses_it_and_goes_on(self, shared: Served, size: int) -> None:
        with shared.unix() as one:
            one.send_nonsense(size)
            corpus.check(corpus.invalid_request(), one.receive())
            assert one.call("Spec.get_data")["result"] == ["hello", 5]

    def test_websocket_closes_with_1009(self, shared: Served, size: int) -> None:
        with shared.websocket() as one:
            with contextlib.suppress(ConnectionError):
                one.send_nonsense(size)
            opcode, payload = one.receive_frame()
            assert (opcode, int.from_bytes(payload[:2], "big")) == (one.CLOSE, 1009)

    @pytest.mark.parametrize("chunked", [False, True], ids=["length-told", "chunked"])
    def test_post_answers_413(self, shared: Served, size: int, chunked: bool) -> None:
        with shared.http() as one:
            told = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
            headers = {"Content-Type": "application/json"} | told
            one.connection.request("POST", "/jsonrpc", nonsense(size), headers, encode_chunked=chunked)
            response = one.connection.getresponse()
            assert response.status == 413
            corpus.check(corpus.invalid_request(), response.read())


@pytest.mark.parametrize("transport", ["unix", "websocket"])
def test_answers_come_as_calls_end(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        one.send(request("Sample.stuck", {"repoId": "one"}, "slow"))
        assert one.call("Spec.get_data", None, "quick")["id"] == "quick"
        served.sample.gate.set()
        assert one.message()["id"] == "slow"


# -- back-pressure


@pytest.mark.parametrize("transport", ["unix", "websocket"])
def test_calls_of_a_connection_are_limited_and_others_not_held_up(serve: Serve, transport: str) -> None:
    served = serve(max_calls_per_connection=3)
    with peer(served, transport) as greedy, peer(served, transport) as other:
        for number in range(10):
            greedy.send(request("Sample.stuck", {"repoId": f"r{number}"}, number))
            assert number >= 3 or served.sample.started.acquire(timeout=10)
            assert other.call("Spec.get_data")["result"] == ["hello", 5]  # so the frame before has been dealt with
        assert not served.sample.started.acquire(timeout=0.05)  # the fourth has not begun
        served.sample.gate.set()
        assert sorted(greedy.message()["id"] for _ in range(10)) == list(range(10))


@pytest.mark.parametrize("transport", ["unix", "websocket", "http"])
def test_a_peer_that_does_not_read_is_not_read_from(serve: Serve, transport: str) -> None:
    served = serve()
    text = request("Sample.echo", {"value": "x" * 1000})
    with peer(served, transport) as one:
        stream = _stream(one, text)
        raw = one.connection if isinstance(one, HttpPeer) else one
        if isinstance(one, HttpPeer):
            one.connection.connect()
        sock: socket.socket = raw.sock if isinstance(one, HttpPeer) else raw.socket  # type: ignore[union-attr]  # as above
        sent = _send_until_refused(sock, stream)
        # What the kernel holds in both directions, and a bounded rest in the agent.
        assert sent < 12 << 20
        with served.unix() as other:
            assert other.call("Spec.get_data")["result"] == ["hello", 5]


def _stream(one: Peer, text: bytes) -> bytes:
    """One call as it goes over this peer's socket."""
    if isinstance(one, UnixPeer):
        return text + b"\n"
    if isinstance(one, WebSocketPeer):
        return one.frame(text)
    head = b"POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(text) + text


def _send_until_refused(sock: socket.socket, piece: bytes) -> int:
    """Sends `piece` again and again, until for half a second nothing more is taken. Bytes sent."""
    sock.setblocking(False)
    sent, rest = 0, piece * 100
    while select.select([], [sock], [], 0.5)[1]:
        taken = sock.send(rest)
        rest = rest[taken:] or piece * 100
        sent += taken
        assert sent < 64 << 20, "it takes everything"
    return sent


# -- who may connect


def test_socket_belongs_to_the_group(shared: Served) -> None:
    status = Path(shared.path).stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == os.getgid()


NOBODY = 65534
CLIENT = """
import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
peer.sendall(b'{"jsonrpc":"2.0","method":"Sample.rule","id":1}\\n')
sys.stdout.write(peer.makefile().readline())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="connects as other users, which needs root")
@pytest.mark.parametrize(
    ("user", "group", "more", "admitted"),
    [
        (0, 0, [], True),
        (NOBODY, NOBODY, [], False),
        (NOBODY, 0, [], True),
        (NOBODY, NOBODY, [1, 0], True),
    ],
    ids=["root", "stranger", "group", "supplementary-group"],
)
def test_roles_come_from_the_peers_credentials(
    serve: Serve, tmp_path: Path, user: int, group: int, more: list[int], admitted: bool
) -> None:
    served = serve()
    # Somebody has opened the socket's mode: the credentials still decide.
    for directory in (tmp_path, *private_parents(tmp_path)):
        directory.chmod(0o755)
    Path(served.path).chmod(0o666)
    ran = subprocess.run(
        [sys.executable, "-I", "-c", CLIENT, served.path],
        user=user,
        group=group,
        extra_groups=more,
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert (b"ruled" in ran.stdout) == admitted, ran.stderr


def test_a_dead_agents_socket_is_replaced_and_a_live_ones_is_not(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "vdsmd.sock"))
    left.close()
    first, second = Served(tmp_path, new_loop), Served(tmp_path, new_loop)
    first.start()
    with pytest.raises(OSError, match="another agent"):
        second.start()
    with first.unix() as one:
        assert one.call("Spec.get_data")["result"] == ["hello", 5]
    first.stop()
    second.close()
    assert not Path(first.path).exists()


def test_a_socket_that_another_agent_put_there_is_left(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    first = Served(tmp_path, new_loop)
    first.start()
    Path(first.path).unlink()
    second = Served(tmp_path, new_loop)
    second.start()
    first.stop()
    with second.unix() as one:
        assert one.call("Spec.get_data")["result"] == ["hello", 5]
    second.stop()


def test_a_port_that_is_taken_leaves_nothing_behind(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        served = Served(tmp_path, new_loop, tcp_port=taken.getsockname()[1])
        with pytest.raises(OSError):
            served.start()
    served.close()
    assert not Path(served.path).exists()


def test_an_unknown_group_is_said(new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    served = Served(tmp_path, new_loop, unix_group="nosuchgroup")
    with pytest.raises(OSError, match="nosuchgroup"):
        served.start()
    served.close()


# -- the Unix socket


def test_a_peer_that_half_closes_gets_its_answers(serve: Serve) -> None:
    served = serve()
    with served.unix() as one:
        one.send(request("Sample.stuck", {"repoId": "one"}))
        one.send(request("Spec.get_data", None, 2))
        one.socket.shutdown(socket.SHUT_WR)
        assert one.message()["id"] == 2
        served.sample.gate.set()
        assert one.message()["result"] == "repo one"
        assert one.receive() is None


def test_a_frame_cut_by_the_end_is_refused(shared: Served) -> None:
    with shared.unix() as one:
        one.socket.sendall(request("Spec.get_data"))
        one.socket.shutdown(socket.SHUT_WR)
        corpus.check(corpus.parse_error(), one.receive())
        assert one.receive() is None


def test_frames_in_pieces_and_many_in_one(shared: Served) -> None:
    with shared.unix() as one:
        for byte in request("Spec.get_data") + b"\n":
            one.socket.sendall(bytes([byte]))
        assert one.message()["result"] == ["hello", 5]
        one.socket.sendall(b"\n \r\n".join(request("Spec.get_data", None, number) for number in range(100)) + b"\r\n")
        assert [one.message()["id"] for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_a_gone_peer_waited_for_ends(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        if isinstance(one, HttpPeer):
            one.connection.request("POST", "/jsonrpc", request("Sample.wait"), {"Content-Type": "application/json"})
        else:
            one.send(request("Sample.wait"))
        assert served.sample.started.acquire(timeout=10)
    until(lambda: len(served.sample.ended) == 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_work_of_a_gone_peer_goes_on(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        if isinstance(one, HttpPeer):
            text = request("Sample.stuck", {"repoId": "one"})
            one.connection.request("POST", "/jsonrpc", text, {"Content-Type": "application/json"})
        else:
            one.send(request("Sample.stuck", {"repoId": "one"}))
        assert served.sample.started.acquire(timeout=10)
    served.sample.gate.set()
    until(lambda: list(served.sample.ended) == ["one"])


# -- HTTP


def test_post_headers(shared: Served) -> None:
    with shared.http() as one:
        response = one.post(request("Spec.get_data"))
        assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
        response = one.post(b'{"jsonrpc":"2.0","method":"Spec.get_data"}')
        assert response.status == 204


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/jsonrpc", {"Content-Type": "application/json", "Origin": "http://localhost"}, 403),
        ("POST", "/jsonrpc", {"Content-Type": "application/json", "Origin": "null"}, 403),
        ("GET", "/jsonrpc", {"Upgrade": "websocket", "Connection": "Upgrade", "Origin": "http://localhost"}, 403),
        ("POST", "/jsonrpc", {"Content-Type": "text/plain"}, 415),
        ("POST", "/jsonrpc", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/jsonrpc", {"Content-Type": "application/jsonp"}, 415),
        ("POST", "/jsonrpc", {"Content-Type": "application/json; charset=latin-1"}, 415),
        ("POST", "/jsonrpc", {"Content-Type": ""}, 415),
        ("POST", "/jsonrpc", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ("POST", "/jsonrpc", {"Content-Type": "Application/JSON; charset=UTF-8"}, 200),
        ("POST", "/jsonrpc", {"Content-Type": 'application/json;charset="utf-8"'}, 200),
        ("POST", "/", {"Content-Type": "application/json"}, 404),
        ("POST", "/jsonrpc/", {"Content-Type": "application/json"}, 404),
        ("GET", "/jsonrpc", {}, 426),
        ("PUT", "/jsonrpc", {"Content-Type": "application/json"}, 405),
        ("OPTIONS", "/jsonrpc", {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}, 403),
        ("GET", "/jsonrpc", {"Upgrade": "websocket", "Connection": "Upgrade"}, 400),
    ],
    ids=lambda value: ",".join(value.values()) if isinstance(value, dict) else str(value),
)
def test_what_http_refuses(shared: Served, method: str, path: str, headers: dict[str, str], status: int) -> None:
    with shared.http() as one:
        response = one.ask(method, path, request("Spec.get_data") if method != "GET" else None, headers)
        assert response.status == status
        assert "Access-Control-Allow-Origin" not in response.headers


def test_websocket_with_an_origin_is_refused(shared: Served) -> None:
    with shared.websocket(Origin="http://localhost") as one:
        assert one.status == 403


def test_expect_is_answered_before_the_body(shared: Served) -> None:
    body = request("Spec.get_data")
    with socket.create_connection(("127.0.0.1", shared.port), 10) as raw:
        head = b"POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        assert raw.recv(1000).startswith(b"HTTP/1.1 100 ")
        raw.sendall(body)
        assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")


class TestRepeatedPost:
    """A head that was accepted before takes a path that does not touch aiohttp: it sends no Server header."""

    def test_is_answered_without_aiohttp(self, shared: Served) -> None:
        with shared.http() as one:
            first = one.post(request("Spec.get_data"))
            again = one.post(request("Spec.get_data", None, 2))
            assert ("Server" in first.headers, "Server" in again.headers) == (True, False)
            assert json.loads(again.body) == {"jsonrpc": "2.0", "result": ["hello", 5], "id": 2}  # type: ignore[attr-defined]  # wire_fixture adds it
            assert one.post(b'{"jsonrpc":"2.0","method":"Spec.get_data"}').status == 204
            again = one.post(b'{"jsonrpc":"2.0","method":"Spec.get_data"}')
            assert (again.status, "Server" in again.headers) == (204, False)

    @pytest.mark.parametrize(
        "headers",
        [{"Origin": "http://localhost"}, {"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}],
        ids=["origin", "content-type", "encoding"],
    )
    def test_another_head_is_looked_at_again(self, shared: Served, headers: dict[str, str]) -> None:
        with shared.http() as one:
            text = request("Spec.get_data")
            assert [one.post(text).status for _ in range(2)] == [200, 200]
            refused = one.ask("POST", "/jsonrpc", text, {"Content-Type": "application/json"} | headers)
            assert refused.status in (403, 415)
            assert one.post(text).status == 200

    def test_slow_calls_are_answered_in_order(self, serve: Serve) -> None:
        served = serve()
        slow, quick = request("Sample.stuck", {"repoId": "a"}), request("Sample.echo", {"value": 11})
        with served.http() as one:
            one.connection.connect()
            raw: socket.socket = one.connection.sock
            served.sample.gate.set()
            for text in (slow, quick):
                raw.sendall(_stream(one, text))
                assert b"200 OK" in raw.recv(1000)
            served.sample.gate.clear()
            assert served.sample.started.acquire(timeout=10)
            raw.sendall(_stream(one, slow))
            assert served.sample.started.acquire(timeout=10)
            for _ in range(2):
                raw.sendall(_stream(one, quick))
            with served.unix() as other:  # time enough for an answer out of turn
                other.call("Sample.blocking", {"name": "x"})
            served.sample.gate.set()
            received = b""
            while received.count(b"HTTP/1.1 200 OK") < 3 or not received.endswith(b"}\n"):
                received += raw.recv(1000)
            assert received.index(b"repo a") < received.index(b'"result":11')

    @pytest.mark.parametrize("cut", [1, 30, 100, 150])
    def test_pieces_and_pipelines_stay_in_order(self, shared: Served, cut: int) -> None:
        with shared.http() as one:
            one.connection.connect()
            raw: socket.socket = one.connection.sock
            for _ in range(2):
                raw.sendall(_stream(one, request("Sample.echo", {"value": 0}, 0)))
                assert b"200 OK" in raw.recv(1000)
            stream = b"".join(_stream(one, request("Sample.echo", {"value": 0}, number)) for number in range(1, 10))
            for start in range(0, len(stream), cut * 7):
                raw.sendall(stream[start : start + cut * 7])
            received = b""
            while received.count(b"}\n") < 9:
                received += raw.recv(1000)
            answers = [json.loads(line) for line in received.splitlines() if line.startswith(b"{")]
            assert [answer["id"] for answer in answers] == list(range(1, 10))

    def test_a_body_that_looks_like_a_request_is_a_body(self, shared: Served) -> None:
        with shared.http() as one:
            one.connection.connect()
            raw: socket.socket = one.connection.sock
            inner = _stream(one, request("Sample.rule"))
            for _ in range(2):
                raw.sendall(inner)
                assert b"ruled" in raw.recv(1000)
            outer = _stream(one, inner)
            raw.sendall(outer[: len(outer) - len(inner)])
            raw.sendall(inner)
            received = b""
            while b"}\n" not in received:
                received += raw.recv(1000)
            assert b"parse_error" in received and b"ruled" not in received


# -- WebSocket frames


class TestFrames:
    """However a client cuts and joins its frames, it gets the same answers."""

    GET = request("Spec.get_data")

    def _works(self, one: WebSocketPeer) -> None:
        for number in range(3):
            assert one.call("Spec.get_data", None, number) == {"jsonrpc": "2.0", "result": ["hello", 5], "id": number}

    @pytest.mark.parametrize("size", [0, 100, 125, 126, 1000, 65535, 65536, 200_000])
    def test_sizes(self, shared: Served, size: int) -> None:
        with shared.websocket() as one:
            for _ in range(2):
                assert one.call("Sample.echo", {"value": "é" * (size // 2)})["result"] == "é" * (size // 2)

    def test_binary(self, shared: Served) -> None:
        with shared.websocket() as one:
            one.socket.sendall(one.frame(self.GET, one.BINARY))
            assert one.message()["result"] == ["hello", 5]
            self._works(one)

    def test_fragments_with_a_ping_between(self, shared: Served) -> None:
        with shared.websocket() as one:
            self._works(one)
            one.socket.sendall(one.frame(self.GET[:10], one.TEXT, final=False))
            one.socket.sendall(one.frame(b"there?", one.PING))
            assert one.receive_frame() == (one.PONG, b"there?")
            one.socket.sendall(one.frame(self.GET[10:], 0))
            assert one.message()["result"] == ["hello", 5]
            self._works(one)

    def test_ping_alone(self, shared: Served) -> None:
        with shared.websocket() as one:
            for _ in range(3):
                one.socket.sendall(one.frame(b"there?", one.PING))
                assert one.receive_frame() == (one.PONG, b"there?")
                self._works(one)

    @pytest.mark.parametrize("cut", [1, 2, 5, 40, 1000])
    def test_a_stream_cut_anywhere(self, shared: Served, cut: int) -> None:
        stream = b"".join(WebSocketPeer.frame(request("Spec.get_data", None, number)) for number in range(10))
        with shared.websocket() as one:
            self._works(one)
            for start in range(0, len(stream), cut):
                one.socket.sendall(stream[start : start + cut])
            assert [one.message()["id"] for _ in range(10)] == list(range(10))
            self._works(one)

    def test_invalid_utf8_is_answered(self, shared: Served) -> None:
        with shared.websocket() as one:
            for frame in (one.frame(b'"\xff"'), one.frame(b'"\xff', final=False) + one.frame(b'"', 0)):
                one.socket.sendall(frame)
                corpus.check(corpus.parse_error(), one.receive())

    def test_closing(self, shared: Served) -> None:
        with shared.websocket() as one:
            self._works(one)
            one.socket.sendall(one.frame((1000).to_bytes(2, "big"), one.CLOSE))
            assert one.receive_frame() == (one.CLOSE, (1000).to_bytes(2, "big"))
            assert one.receive_frame() == (0, b"")


# -- the end


def test_stop_sends_the_answers_under_way(serve: Serve) -> None:
    served = serve()
    with served.unix() as unix, served.websocket() as web, served.http() as http:
        assert http.call("Sample.echo", {"value": 1})["result"] == 1
        for one in (unix, web):
            one.send(request("Sample.stuck", {"repoId": "one"}, "work"))
            one.send(request("Sample.wait", None, "wait"))
        text = request("Sample.wait", None, "wait")
        http.connection.request("POST", "/jsonrpc", text, {"Content-Type": "application/json"})
        for _ in range(5):
            assert served.sample.started.acquire(timeout=10)
        served.loop.call_soon_threadsafe(served._stopping.set)
        for one in (unix, web):
            assert one.message()["error"]["data"]["key"] == "stopping"
        served.sample.gate.set()
        for one in (unix, web):
            assert one.message()["result"] == "repo one"
            assert one.receive() is None
        assert b"stopping" in http.connection.getresponse().read()
    with pytest.raises(OSError):
        UnixPeer(served.path)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", served.port), 1)


def test_stop_leaves_stuck_calls_behind(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "DRAIN_S", 0.05)  # what a test can wait for
    monkeypatch.setattr(server, "FLUSH_S", 0.05)
    served = serve()
    with served.unix() as one, served.websocket() as two:
        one.send(request("Sample.stuck", {"repoId": "one"}))
        two.send(request("Sample.stuck", {"repoId": "two"}))
        for _ in range(2):
            assert served.sample.started.acquire(timeout=10)
        began = time.monotonic()
        served.loop.call_soon_threadsafe(served._stopping.set)
        assert one.receive() is None
        assert two.receive() is None
        assert time.monotonic() - began < 60
    assert isinstance(served, World)


def test_the_guard_sees_a_blocked_loop(new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    served = Served(tmp_path, new_loop)
    served.start()
    served.loop.call_soon_threadsafe(lambda: time.sleep(2 * LIMIT_S))
    with served.unix() as one:
        one.call("Spec.get_data")
    with pytest.raises(AssertionError, match="blocked for"):
        served.stop()


def test_the_guard_sees_a_loop_that_computes_without_letting_go(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    served = Served(tmp_path, new_loop)
    served.start()
    served.loop.call_soon_threadsafe(keep_the_interpreter, LIMIT_S)
    with served.unix() as one:
        one.call("Spec.get_data")
    with pytest.raises(AssertionError, match="blocked for"):
        served.stop()


def test_the_guard_does_not_blame_the_loop_for_another_thread(serve: Serve) -> None:
    served = serve()
    with served.unix() as one:
        keep_the_interpreter(2 * LIMIT_S)
        one.call("Spec.get_data")


def test_the_guard_does_not_blame_the_loop_for_the_garbage_of_others(serve: Serve) -> None:
    kept: list[list[object]] = []
    while collection_s() < 2 * LIMIT_S:
        kept += [[] for _ in range(1_000_000)]
    served = serve()
    served.loop.call_soon_threadsafe(gc.collect)
    with served.unix() as one:
        one.call("Spec.get_data")
    assert kept


def collection_s() -> float:
    """Seconds that a full collection computes."""
    began = time.thread_time()
    gc.collect()
    return time.thread_time() - began


def keep_the_interpreter(seconds: float) -> None:
    """Computes for longer than so many seconds in one instruction: no other thread of the process gets a turn."""
    size, used = 1 << 10, 0.0
    while used < seconds:
        size *= 2
        began = time.thread_time()
        sum(range(size))
        used = time.thread_time() - began
