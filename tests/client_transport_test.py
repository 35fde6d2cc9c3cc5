"""The client's connection over a Unix socket: calls, events, broken peers, deadlines."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_agent
import pytest

from vdsm import errors
from vdsm.client import failures, transport


@pytest.fixture
def agent() -> fake_agent.Agent:
    return fake_agent.Agent()


@pytest.fixture
def client(agent: fake_agent.Agent, tmp_path: Path) -> Iterator[transport.Client]:
    with fake_agent.on_unix(tmp_path / "sock", agent.talk) as address, transport.connect(address, 10) as connected:
        yield connected


def answer(result: Any, request_id: str = "f:1") -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}).encode() + b"\n"


def connected(address: str, timeout_s: float = 10) -> transport.Client:
    return transport.connect(address, timeout_s, flow_id="f")


# -- calls -----------------------------------------------------------------------------------------------------------


def test_a_call_gives_the_result(agent: fake_agent.Agent, client: transport.Client) -> None:
    assert client.call("Host.echo", {"message": "hello"}) == "hello"
    assert client.call("Host.echo", {"message": None}) is None


@pytest.mark.parametrize("text", ["häuser 家 🏠", "two\nlines\r", "\x00\x7f", '"{}[]'], ids=ascii)
def test_any_text_comes_back_as_it_was(client: transport.Client, text: str) -> None:
    assert client.call("Host.echo", {"message": text}) == text


def test_a_call_without_parameters_sends_none(agent: fake_agent.Agent, client: transport.Client) -> None:
    agent.verbs["Host.ping2"] = lambda call: call.params is None
    assert client.call("Host.ping2") is True


def test_the_flow_id_begins_each_request_id(agent: fake_agent.Agent, tmp_path: Path) -> None:
    agent.verbs["id"] = lambda call: call.id
    with fake_agent.on_unix(tmp_path / "sock", agent.talk) as address:
        with transport.connect(address, flow_id="backup-7") as client:
            assert [client.call("id"), client.call("id")] == ["backup-7:1", "backup-7:2"]
        with transport.connect(address) as one, transport.connect(address) as other:
            assert one.call("id") != other.call("id")


def test_an_error_carries_what_the_agent_said(agent: fake_agent.Agent, client: transport.Client) -> None:
    def refuse(call: fake_agent.Call) -> None:
        raise errors.LeaseHeld(resource="image 7", holder="host 3", state="running")

    agent.verbs["VM.create"] = refuse
    with pytest.raises(failures.ClientError) as caught:
        client.call("VM.create")
    error = caught.value
    assert (error.code, error.key, str(error)) == (651, "lease_held", "image 7 is in use by host 3")
    assert error.data["facts"] == {"resource": "image 7", "holder": "host 3"}
    assert error.data["state"] == "running"
    assert error.request_id == f"{client.flow_id}:1"
    assert errors.VdsmError.from_wire(error.to_wire()).to_wire() == error.to_wire()
    assert client.call("Host.echo", {"message": "alive"}) == "alive"


@pytest.mark.parametrize("error", [None, "text", [], {}, {"code": "x"}, {"code": 5, "data": "text"}], ids=repr)
def test_a_sloppy_error_is_an_error_still(tmp_path: Path, error: Any) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(json.dumps({"id": None, "error": error}).encode() + b"\n")

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        with pytest.raises(failures.ClientError) as caught:
            client.call("Host.ping2")
        assert type(caught.value) is failures.ClientError
        assert isinstance(caught.value.data, dict) and isinstance(caught.value.code, int)


def test_big_requests_and_answers(client: transport.Client) -> None:
    message = "0123456789abcdef" * (1 << 20)
    assert client.call("Host.echo", {"message": message}) == message


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_not_a_number_is_not_sent(client: transport.Client, timeout_s: float | None) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        client.call("Host.echo", {"message": float("nan")}, timeout_s)
    assert client.call("Host.echo", {"message": 1}, timeout_s) == 1


# -- frames ----------------------------------------------------------------------------------------------------------


def test_an_answer_in_pieces(tmp_path: Path) -> None:
    def dribble(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        for position, byte in enumerate(answer("häuser")):
            peer.sendall(bytes([byte]))
            if position % 7 == 0:
                time.sleep(0.001)  # so that the pieces really arrive one by one

    with fake_agent.on_unix(tmp_path / "sock", dribble) as address, connected(address) as client:
        assert client.call("Host.ping2") == "häuser"


def test_several_answers_in_one_piece(tmp_path: Path) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(answer(1) + answer(2, "f:2") + b'{"jsonrpc":"2.0","met')
        peer.recv(1 << 16)
        peer.sendall(b'hod":"event","params":{"sequence":9}}\n' + answer(3, "f:3"))
        peer.recv(1 << 16)

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        assert [client.call("a"), client.call("b"), client.call("c")] == [1, 2, 3]
        assert client.next_event(5) == {"sequence": 9}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"id":"f:1","result":"\xff"}\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[]\n", "not JSON-RPC"),
        (b"null\n", "not JSON-RPC"),
        (b'{"jsonrpc":"2.0","id":"f:1"}\n', "neither result nor error"),
    ],
    ids=["HTTP", "empty line", "no UTF-8", "nested deeply", "an array", "null", "no result"],
)
def test_a_peer_that_speaks_something_else(tmp_path: Path, line: bytes, what: str) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(line)
        peer.recv(1 << 16)

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        with pytest.raises(failures.BadAnswer, match=what):
            client.call("Host.ping2")
        with pytest.raises(failures.ConnectionLost):
            client.call("Host.ping2")


def test_what_concerns_nobody_is_ignored(tmp_path: Path) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(b'{"method":"other","params":{}}\n{"method":"event"}\n{"id":"g:1","result":5}\n' + answer(6))

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        assert client.call("Host.ping2") == 6


# -- deadlines and broken connections --------------------------------------------------------------------------------


def test_a_late_answer_is_dropped_and_the_client_goes_on(agent: fake_agent.Agent, client: transport.Client) -> None:
    release = threading.Event()
    agent.verbs["slow"] = lambda call: release.wait(100) and "late"
    began = time.monotonic()
    with pytest.raises(failures.NoAnswer, match="did not answer in time"):
        client.call("slow", timeout_s=0.2)
    assert 0.2 <= time.monotonic() - began < 60
    release.set()
    assert client.call("Host.echo", {"message": "next"}) == "next"


def test_half_an_answer_at_the_deadline_is_not_lost(tmp_path: Path) -> None:
    timed_out = threading.Event()

    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(answer("late")[:10])
        timed_out.wait(10)
        peer.sendall(answer("late")[10:])
        peer.recv(1 << 16)
        peer.sendall(answer("second", "f:2"))

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        with pytest.raises(failures.NoAnswer):
            client.call("Host.ping2", timeout_s=0.2)
        timed_out.set()
        assert client.call("Host.ping2") == "second"


def test_an_agent_that_does_not_read(tmp_path: Path) -> None:
    done = threading.Event()

    def talk(peer: socket.socket) -> None:
        done.wait(20)

    with fake_agent.on_unix(tmp_path / "sock", talk) as address:
        with connected(address) as client:
            with pytest.raises(failures.NoAnswer, match="did not take the request"):
                client.call("Host.echo", {"message": "x" * (8 << 20)}, timeout_s=1)
            with pytest.raises(failures.ConnectionLost):  # half a frame is out: nothing may follow it
                client.call("Host.ping2")
        done.set()


@pytest.mark.parametrize("said", [b"", b'{"jsonrpc":"2.0","id":"f:1","resu'], ids=["nothing", "half an answer"])
def test_the_connection_breaks_while_waiting(tmp_path: Path, said: bytes) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(said)

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        with pytest.raises(failures.ConnectionLost, match="closed the connection"):
            client.call("Host.ping2")
        with pytest.raises(failures.ConnectionLost):
            client.call("Host.ping2")


def test_parting_words_are_heard_when_a_request_is_too_large(tmp_path: Path) -> None:
    """The agent reads a part, says why it will not have it, and hangs up while we still send."""
    refusal = {"jsonrpc": "2.0", "id": None, "error": errors.Overloaded(what="bytes", limit=4).to_wire()}

    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(json.dumps(refusal).encode() + b"\n")

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        with pytest.raises(failures.ClientError, match="the limit of 4") as caught:
            client.call("Host.echo", {"message": "x" * (32 << 20)})
        assert caught.value.key == "resource_exhausted"


# -- connecting ------------------------------------------------------------------------------------------------------


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(failures.CannotConnect, match="No such file") as caught:
        transport.connect(str(tmp_path / "sock"))
    assert caught.value.key == "cannot_connect"


def test_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    socket.create_server(str(tmp_path / "sock"), family=socket.AF_UNIX).close()
    with pytest.raises(failures.CannotConnect, match="refused"):
        transport.connect(str(tmp_path / "sock"))


@pytest.mark.parametrize("path", ["/x" * 200, "./a\0b"], ids=["too long", "NUL"])
def test_a_path_that_cannot_be(path: str) -> None:
    with pytest.raises(failures.CannotConnect):
        transport.connect(path)


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """Non-blocking connects fail at once on a busy Unix socket; many clients at a time are nothing special."""
    path = str(tmp_path / "sock")
    server = socket.create_server(path, family=socket.AF_UNIX, backlog=0)
    with server, transport.connect(path):  # fills it
        began = time.monotonic()
        with pytest.raises(failures.CannotConnect, match="does not accept in time"):
            transport.connect(path, 0.3)
        assert time.monotonic() - began >= 0.2
        accepting = threading.Timer(0.2, lambda: server.accept()[0].close())
        accepting.start()
        transport.connect(path, 10).close()
        accepting.join()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("/run/vdsm/vdsmd.sock", ("unix", "/run/vdsm/vdsmd.sock")),
        ("./sock", ("unix", "./sock")),
        ("unix:sock", ("unix", "sock")),
        ("http://h:1", ("http", "h:1")),
        ("ws://h", ("ws", "h")),
        ("https://h", ("https", "h")),
        ("wss://h", ("wss", "h")),
        ("h", ("wss", "h")),
        ("h:1", ("wss", "h:1")),
    ],
)
def test_addresses(address: str, parts: tuple[str, str]) -> None:
    assert transport._split(address) == parts


@pytest.mark.parametrize(
    ("rest", "place"),
    [
        ("h", ("h", 54321)),
        ("h:1", ("h", 1)),
        ("h:1/", ("h", 1)),
        ("h/jsonrpc", ("h", 54321)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 54321)),
        ("::1", ("::1", 54321)),
    ],
)
def test_hosts_and_ports(rest: str, place: tuple[str, int]) -> None:
    assert transport._host_and_port(rest) == place


@pytest.mark.parametrize(
    "address", ["", "ftp://h", "host:", "host:x", "unix:", "http://", "http://h:x", "ws://h/y", "wss://h/y"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"no address|no HOST:PORT"):
        transport.connect(address)


# -- events ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def publishing(agent: fake_agent.Agent) -> fake_agent.Agent:
    """An agent that sends event 1 before it answers Host.subscribe, 2 after, and one within each `work`."""

    def subscribe(call: fake_agent.Call) -> dict[str, Any]:
        call.event(sequence=1, topic="job", subject="a")
        return {"instanceId": "i", "sequence": 0, "gap": False}

    def work(call: fake_agent.Call) -> str:
        call.event(sequence=len(agent.calls), topic="vm", subject="b")
        return "worked"

    agent.verbs |= {"Host.subscribe": subscribe, "work": work}
    return agent


def test_events_and_calls_share_a_connection(publishing: fake_agent.Agent, client: transport.Client) -> None:
    events = client.events(["job", "vm"])
    assert client.subscription == {"instanceId": "i", "sequence": 0, "gap": False}
    assert client.call("work") == "worked"
    assert next(events) == {"sequence": 1, "topic": "job", "subject": "a"}
    assert client.call("work") == "worked"
    assert [next(events)["sequence"], next(events)["sequence"]] == [2, 3]


def test_a_subscriber_that_comes_back_says_what_it_has_seen(
    publishing: fake_agent.Agent, client: transport.Client
) -> None:
    client.subscribe()
    client.subscribe(["job"], instance_id="i", since=7)
    client.subscribe(since=0)
    assert [call.params for call in publishing.calls] == [
        {},
        {"topics": ["job"], "instanceId": "i", "since": 7},
        {"since": 0},
    ]


def test_waiting_for_an_event_ends_at_its_deadline(publishing: fake_agent.Agent, client: transport.Client) -> None:
    client.subscribe()
    assert client.next_event(5) is not None
    assert client.next_event(0.1) is None
    client.call("work")
    assert client.next_event(5) is not None


def test_the_end_of_the_connection_ends_the_events(tmp_path: Path) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(answer({}) + b'{"method":"event","params":{"sequence":1}}\n')

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        events = client.events()
        assert next(events) == {"sequence": 1}
        with pytest.raises(failures.ConnectionLost):
            next(events)


def test_an_event_that_fails_to_arrive_whole_is_no_event(tmp_path: Path) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(answer({}) + b'{"method":"event","params":{"seq')

    with fake_agent.on_unix(tmp_path / "sock", talk) as address, connected(address) as client:
        client.subscribe()
        with pytest.raises(failures.ConnectionLost):
            client.next_event(5)
