"""What aiohttp is given, and what it is spared: the front with a protocol behind it that only takes notes.

`transports_test` shows over sockets that both ways answer alike; this shows which way is taken.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.sample_verbs import World
from tests.wire_fixture import WebSocketPeer, request
from vdsm import config
from vdsm.api import caller as callers
from vdsm.api import dispatch, front, websocket

BODY = request("Spec.get_data")
HEAD = b"POST /jsonrpc HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY)


class Notes(asyncio.Protocol):
    """Stands where aiohttp's protocol stands."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.given.append(data)


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return False


class Accepted:
    """The parts of a parsed request that the front asks for."""

    version = front.HttpVersion11

    def __init__(self, content_length: int | None = len(BODY), keep_alive: bool = True, **headers: str) -> None:
        self.content_length, self.keep_alive, self.headers = content_length, keep_alive, headers


class Connection:
    def __init__(self, world: World) -> None:
        self.inner, self.wire = Notes(), Wire()
        self.dispatcher = dispatch.Dispatcher(world.verbs, 100)
        self.front = front.Front(self.inner, self.dispatcher, callers.Role.ADMIN, 1 << 20, lambda: None)
        self.front.connection_made(self.wire)

    def give(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.front.data_received(piece)

    def accept(self, **parsed: Any) -> None:
        self.front.accepted(Accepted(**parsed))  # type: ignore[arg-type]  # any field may be given


@pytest.fixture
def connection() -> Iterator[Connection]:
    world = World()
    with asyncio.Runner() as runner:
        # Everything here happens within one turn of the loop, so it need not run; the log's timer wants to see it.
        asyncio.events._set_running_loop(runner.get_loop())
        try:
            yield Connection(world)
        finally:
            asyncio.events._set_running_loop(None)
    world.close()


@pytest.mark.parametrize("pieces", [[HEAD + BODY], [HEAD, BODY], [HEAD + BODY[:5], BODY[5:]]], ids=len)
def test_a_known_head_is_answered_here(connection: Connection, pieces: list[bytes]) -> None:
    connection.give(*pieces)
    assert connection.inner.given == pieces and connection.wire.written == []
    connection.accept()
    connection.give(*pieces)
    assert connection.inner.given == pieces
    assert len(connection.wire.written) == 1 and connection.wire.written[0].endswith(b'"result":["hello",5],"id":1}\n')


@pytest.mark.parametrize(
    "parsed",
    [{"content_length": len(BODY) + 1}, {"content_length": None}, {"keep_alive": False}, {"Expect": "100-continue"}],
    ids=lambda parsed: next(iter(parsed)),
)
def test_a_request_of_another_kind_is_not_learnt(connection: Connection, parsed: dict[str, Any]) -> None:
    connection.give(HEAD + BODY)
    connection.accept(**parsed)
    connection.give(HEAD + BODY)
    assert connection.inner.given == [HEAD + BODY] * 2 and connection.wire.written == []


def test_what_was_not_accepted_is_not_learnt(connection: Connection) -> None:
    connection.give(HEAD + BODY)
    connection.give(HEAD + BODY)
    assert connection.inner.given == [HEAD + BODY] * 2


@pytest.mark.parametrize(
    "data",
    [HEAD.replace(b"Host: x", b"Host: y") + BODY, HEAD + BODY + b"P", HEAD + BODY + HEAD + BODY],
    ids=["another-head", "more-behind", "pipelined"],
)
def test_anything_else_goes_to_aiohttp(connection: Connection, data: bytes) -> None:
    connection.give(HEAD + BODY)
    connection.accept()
    connection.give(data)
    assert connection.inner.given == [HEAD + BODY, data] and connection.wire.written == []


def test_a_body_in_three_pieces_goes_to_aiohttp_whole(connection: Connection) -> None:
    connection.give(HEAD + BODY)
    connection.accept()
    connection.give(HEAD, BODY[:5], BODY[5:])
    assert b"".join(connection.inner.given[1:]) == HEAD + BODY and connection.wire.written == []
    connection.accept()
    connection.give(HEAD + BODY)
    assert len(connection.wire.written) == 1


def test_pipelined_requests_make_the_connection_aiohttps_for_good(connection: Connection) -> None:
    connection.give(HEAD + BODY + HEAD + BODY)
    connection.accept()
    connection.accept()
    connection.give(HEAD + BODY)
    assert len(connection.inner.given) == 2 and connection.wire.written == []


def test_a_peer_that_does_not_read_is_aiohttps(connection: Connection) -> None:
    connection.give(HEAD + BODY)
    connection.accept()
    connection.front._blocked = True  # as `pause_writing` sets it; aiohttp's own half of that is not here
    connection.give(HEAD + BODY)
    assert len(connection.inner.given) == 2 and connection.wire.written == []


def test_the_number_of_known_heads_is_bounded(connection: Connection) -> None:
    for number in range(front._HEADS + 10):
        connection.give(HEAD.replace(b"Host: x", b"Host: %d" % number) + BODY)
        connection.accept()
    assert len(connection.front._heads) == front._HEADS


# -- WebSocket

UPGRADE = b"GET /jsonrpc HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"
MESSAGE = WebSocketPeer.frame(BODY)
PING = WebSocketPeer.frame(b"", WebSocketPeer.PING)


@pytest.fixture
def upgraded(connection: Connection) -> tuple[Connection, websocket.WebSocketConnection]:
    behind = websocket.WebSocketConnection(config.Wire(), connection.dispatcher, callers.Role.ADMIN)
    connection.give(UPGRADE)
    connection.front.upgraded(behind)
    connection.inner.given.clear()
    behind._receiving = True  # as while it waits for a message
    return connection, behind


Upgraded = tuple[Connection, websocket.WebSocketConnection]


def test_a_whole_message_is_answered_here(upgraded: Upgraded) -> None:
    connection, _ = upgraded
    connection.give(MESSAGE, MESSAGE)
    assert connection.inner.given == []
    answer = b'{"jsonrpc":"2.0","result":["hello",5],"id":1}\n'
    assert connection.wire.written == [bytes([0x81, len(answer)]) + answer] * 2


def test_messages_wait_behind_what_aiohttp_has(upgraded: Upgraded) -> None:
    connection, behind = upgraded
    connection.give(PING, MESSAGE)
    assert connection.inner.given == [PING, MESSAGE]
    behind._receiving = True
    connection.give(MESSAGE)
    assert len(connection.wire.written) == 1


@pytest.mark.parametrize(
    "data",
    [
        MESSAGE[:-1],
        MESSAGE + MESSAGE,
        WebSocketPeer.frame(BODY, final=False),
        WebSocketPeer.frame(BODY, 0),
        bytes([0xC1]) + MESSAGE[1:],
        bytes([0x81, len(BODY)]) + BODY,
        WebSocketPeer.frame(BODY, 3),
        b"\x81",
    ],
    ids=["part", "two", "fragment", "continuation", "extension", "unmasked", "reserved", "byte"],
)
def test_other_frames_make_the_connection_aiohttps_for_good(upgraded: Upgraded, data: bytes) -> None:
    connection, behind = upgraded
    connection.give(data)
    behind._receiving = True
    connection.give(MESSAGE)
    assert connection.inner.given == [data, MESSAGE] and connection.wire.written == []


def test_an_upgrade_with_something_behind_it_is_aiohttps(connection: Connection) -> None:
    # The rest of the frame that begins behind the upgrade looks like a frame itself.
    begun = WebSocketPeer.frame(MESSAGE)[: -len(MESSAGE)]
    behind = websocket.WebSocketConnection(config.Wire(), connection.dispatcher, callers.Role.ADMIN)
    connection.give(UPGRADE + begun)
    connection.front.upgraded(behind)
    behind._receiving = True
    connection.give(MESSAGE)
    assert connection.inner.given == [UPGRADE + begun, MESSAGE] and connection.wire.written == []
