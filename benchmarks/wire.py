"""What a call costs on each transport, against a bare asyncio echo of the same length; TLS; and dispatch alone.

One trivial verb with two validated parameters, logged at INFO to a file. Closed loop, one call under way on each
connection. The servers are processes pinned to CPU 0, each as it is in production (the agent on uvloop); the load is
this process, pinned to CPU 1, and does as little as it can: a busier one would hide the difference. Both sides of a
ratio are measured in turn. Counted is the server's CPU time for a call, all threads; the best of a few pieces, for
whoever else works on the machine takes the caches, and the agent needs more of them than an echo.
"""

import asyncio
import base64
import contextlib
import grp
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jsonrpcserver
import trustme
import uvloop

from benchmarks import table
from vdsm import config, events, logs
from vdsm.api import caller, calls, dispatch, pools, server, verb
from vdsm.client import tls

SERVER_CPU, LOAD_CPU = 0, 1
# In one piece, by connections: not fewer than the log of calls gathers, or the best piece is one without its writing.
CALLS = {16: 2 * calls.GATHER, 1: calls.GATHER}
PIECES = 3
DISPATCHED = 2000
REQUEST = b'{"jsonrpc":"2.0","method":"Bench.greet","params":{"name":"world","count":3},"id":1234567}'
SERVE = "serve"

Connect = Callable[[], socket.socket]


class Params(verb.Params):
    name: str
    count: int


class Bench:
    @verb.verb(role="monitor", blocking=False)
    def greet(self, params: Params) -> str:
        return f"hello {params.name}"


class Case(NamedTuple):
    """A transport, and the echo it is compared with. `goal` holds at 16 connections."""

    name: str
    connect: Connect
    request: bytes
    echo: str
    connect_echo: Connect
    goal: float


def rows(rounds: int) -> list[table.Row]:
    """Three rows at 16 connections, with their goals; three at one; a WebSocket over TLS; dispatch alone."""
    with tempfile.TemporaryDirectory() as directory, _servers(Path(directory)) as (agent, echo), _pinned():
        cases = _cases(Path(directory))
        compared = [_row(case, n, agent, echo, rounds) for n in CALLS for case in cases]
        return [*compared, _tls_row(Path(directory), agent, rounds), _dispatch_row(rounds)]


def _cases(directory: Path) -> list[Case]:
    port, echo_port = (int((directory / name).read_text()) for name in ("agent.port", "echo.port"))
    unix, echo_unix = _unix(directory / "agent.sock"), _unix(directory / "echo.sock")
    tcp, echo_tcp = _tcp(port), _tcp(echo_port)
    return [
        Case("Unix-socket", unix, REQUEST + b"\n", "Unix", echo_unix, 2.2),
        Case("WebSocket", lambda: _websocket(tcp), _masked(REQUEST), "TCP", echo_tcp, 2.5),
        Case("POST", tcp, _post(REQUEST), "TCP", echo_tcp, 5.5),
    ]


def _row(case: Case, connections: int, agent: int, echo: int, rounds: int) -> table.Row:
    return table.compare(
        f"{case.name} call, {connections} connections, CPU us",
        f"asyncio echo over {case.echo}",
        lambda: _cost(agent, case.connect, case.request, connections),
        lambda: _cost(echo, case.connect_echo, REQUEST + b"\n", connections),
        rounds,
        case.goal if connections == 16 else None,
    )


def _tls_row(directory: Path, agent: int, rounds: int) -> table.Row:
    """What TLS adds to a connection that is there; a new one costs a handshake, some milliseconds on each side."""
    plain = _tcp(int((directory / "agent.port").read_text()))
    tcp = _tcp(int((directory / "agent.tls_port").read_text()))
    context = tls.client_context(_credentials(directory))
    frame = _masked(REQUEST)

    def secured() -> socket.socket:
        return context.wrap_socket(tcp(), server_hostname="localhost")

    return table.compare(
        "WebSocket call over TLS, 16 connections, CPU us",
        "WebSocket call",
        lambda: _cost(agent, lambda: _websocket(secured), frame, 16),
        lambda: _cost(agent, lambda: _websocket(plain), frame, 16),
        rounds,
        2.0,
    )


def _credentials(directory: Path) -> tls.Credentials:
    """Of both sides."""
    return tls.Credentials(*(str(directory / f"{name}.pem") for name in ("cert", "key", "ca")))


# -- load


def _cost(server: int, connect: Connect, request: bytes, connections: int) -> float:
    """The server's CPU time for a call, in microseconds."""
    count = CALLS[connections]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(connect()) for _ in range(connections)]
        # The first call on a connection is answered with other headers than all that follow.
        length = [_answer_length(each, request) for each in sockets * 2][-1]
        _load(sockets, request, length, count // 10)
        return min(_piece(server, sockets, request, length, count) for _ in range(PIECES))


def _piece(server: int, sockets: list[socket.socket], request: bytes, length: int, count: int) -> float:
    before = _cpu(server)
    _load(sockets, request, length, count)
    return (_cpu(server) - before) / count * 1e6


def _load(sockets: list[socket.socket], request: bytes, length: int, count: int) -> None:
    """`count` calls over all sockets, each sending the next when its answer of `length` bytes is there."""
    missing = dict.fromkeys(sockets, length)
    unsent, unanswered = count - len(sockets), count
    with selectors.EpollSelector() as waiting:
        for each in sockets:
            waiting.register(each, selectors.EVENT_READ)
            each.send(request)
        while unanswered:
            for key, _ in waiting.select():
                each = key.fileobj  # type: ignore[assignment]
                missing[each] -= len(each.recv(65536))
                if missing[each]:
                    continue
                unanswered -= 1
                missing[each] = length
                if unsent:
                    unsent -= 1
                    each.send(request)


def _answer_length(connection: socket.socket, request: bytes) -> int:
    """The length of the answer to one call. Fails when it is no answer."""
    connection.send(request)
    answer = connection.recv(65536)
    while not answer.endswith(b"}\n"):
        answer += connection.recv(65536)
    assert answer == request or b'"result":"hello world"' in answer, answer
    return len(answer)


def _cpu(pid: int) -> float:
    """CPU seconds of another process with all its threads, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def _unix(path: Path) -> Connect:
    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        return connection

    return connect


def _tcp(port: int) -> Connect:
    def connect() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    return connect


def _websocket(connect: Connect) -> socket.socket:
    connection = connect()
    key = base64.b64encode(bytes(16)).decode()
    connection.send(
        f"GET /jsonrpc HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b" 101 " in connection.recv(65536)
    return connection


def _masked(text: bytes) -> bytes:
    """A text frame as clients send it, with a mask that changes bytes."""
    mask = b"\x01\x02\x03\x04"
    return bytes([0x81, 0x80 | len(text)]) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))


def _post(body: bytes) -> bytes:
    head = b"POST /jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


# -- dispatch without a network


def _dispatch_row(rounds: int) -> table.Row:
    dispatcher = dispatch.Dispatcher(_verbs(), max_batch=100)
    admin = caller.Caller("bench", "unix", caller.Role.ADMIN)

    async def greet(name: str, count: int) -> object:
        return jsonrpcserver.Success(f"hello {name}")

    async def ours() -> float:
        began = time.process_time()
        for _ in range(DISPATCHED):
            dispatcher.answer(REQUEST, admin)
        return (time.process_time() - began) / DISPATCHED * 1e6

    async def theirs() -> float:
        count, text = DISPATCHED // 20, REQUEST.decode()
        began = time.process_time()
        for _ in range(count):
            await jsonrpcserver.async_dispatch(text, methods={"Bench.greet": greet})
        return (time.process_time() - began) / count * 1e6

    with asyncio.Runner() as runner:
        return table.compare(
            "dispatch without a network, CPU us",
            "jsonrpcserver as it comes",
            lambda: runner.run(ours()),
            lambda: runner.run(theirs()),
            rounds,
            0.06,
        )


# -- servers


@contextlib.contextmanager
def _servers(directory: Path) -> Iterator[tuple[int, int]]:
    """The process ids of the agent's api and of the bare echo, both listening."""
    started = []
    try:
        for kind in ("agent", "echo"):
            command = [sys.executable, "-m", "benchmarks.wire", SERVE, kind, str(directory)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        yield started[0].pid, started[1].pid
    finally:
        for process in started:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def _pinned() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LOAD_CPU})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _serve(kind: str, directory: Path) -> None:
    os.sched_setaffinity(0, {SERVER_CPU})

    async def main() -> None:
        serving = await (_serve_agent if kind == "agent" else _serve_echo)(directory)
        assert serving, "held as long as it serves: uvloop closes what nobody refers to"
        print("ready", flush=True)
        await asyncio.Event().wait()

    (uvloop.run if kind == "agent" else asyncio.run)(main())


async def _serve_echo(directory: Path) -> object:
    # asyncio asks for 256 KiB at each read. Until glibc has once freed more than that in one piece it maps and unmaps
    # memory each time, and the echo costs five times as much: a comparison that flatters us. So free something large.
    bytes(1 << 20)

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            self._transport.write(data)

    loop = asyncio.get_running_loop()
    unix = await loop.create_unix_server(Echo, str(directory / "echo.sock"))
    listening = await loop.create_server(Echo, "127.0.0.1", 0)
    (directory / "echo.port").write_text(str(listening.sockets[0].getsockname()[1]))
    return unix, listening


async def _serve_agent(directory: Path) -> object:
    logs.setup(path=str(directory / "log"))
    with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("127.0.0.1", 0)) as another:
        port, tls_port = probe.getsockname()[1], another.getsockname()[1]
    group = grp.getgrgid(os.getgid()).gr_name
    wire = config.Wire(unix_socket=str(directory / "agent.sock"), unix_group=group, tcp_port=port)
    _sign(directory)
    files = _credentials(directory)
    secured = config.Tls(cert=files.cert, key=files.key, ca=files.ca, address="127.0.0.1", port=tls_port)
    api = server.Api(config.Config(wire=wire, tls=secured), _verbs(), events.EventLog())
    await api.start()
    (directory / "agent.port").write_text(str(port))
    (directory / "agent.tls_port").write_text(str(tls_port))
    return api


def _sign(directory: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    (directory / "key.pem").touch(mode=0o600)
    issued.private_key_pem.write_to_path(directory / "key.pem")


def _verbs() -> verb.Verbs:
    verbs = verb.Verbs(pools.Pools(repository_threads=1))
    verbs.add("Bench", Bench())
    return verbs


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        _serve(sys.argv[2], Path(sys.argv[3]))
    else:
        print(table.render(rows(5)))
