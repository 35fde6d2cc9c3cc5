"""Peers for the client's tests: a server whose connections are talked to by a function, and an agent made of verbs.

They stand in for vdsmd where a test needs it to misbehave; `tests/` also runs the client against the real one.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vdsm import errors

Talk = Callable[[socket.socket], None]


class Server:
    """Accepts connections and runs `talk` for each in a thread. `failures` are what these threads raised."""

    def __init__(self, listening: socket.socket, talk: Talk) -> None:
        self._listening = listening
        self._talk = talk
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.failures: list[BaseException] = []
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._talk(connection)
        except (ConnectionError, TimeoutError):
            pass  # the client went, or the test is over
        except BaseException as error:  # noqa: BLE001 - reported by the test's thread
            self.failures.append(error)
        finally:
            connection.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]


@contextlib.contextmanager
def on_unix(path: Path, talk: Talk) -> Iterator[str]:
    """A server on a Unix socket: its address."""
    server = Server(socket.create_server(str(path), family=socket.AF_UNIX), talk)
    try:
        yield str(path)
    finally:
        server.close()


@contextlib.contextmanager
def on_tcp(talk: Talk) -> Iterator[str]:
    """A server on a free port of loopback: its host:port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(listening, talk)
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.close()


class Call:
    """A request as a verb sees it, with the way to send something else on its connection."""

    def __init__(self, connection: socket.socket, request: dict[str, Any]) -> None:
        self.connection = connection
        self.method: str = request["method"]
        self.params: Any = request.get("params")
        self.id: Any = request["id"]

    def event(self, **params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": "event", "params": params})

    def send(self, message: Any) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")


class Agent:
    """A vdsmd of a few verbs: `agent.verbs["Host.ping2"] = lambda call: True`. A verb may raise a `VdsmError`.

    `calls` are the requests so far, `called` is set by each.
    """

    def __init__(self) -> None:
        self.verbs: dict[str, Callable[[Call], Any]] = {"Host.echo": lambda call: call.params["message"]}
        self.calls: list[Call] = []
        self.called = threading.Event()

    def talk(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            for line in lines:
                call = Call(connection, json.loads(line))
                self.calls.append(call)
                self.called.set()
                call.send({"jsonrpc": "2.0", "id": call.id, **self._answer(call)})

    def _answer(self, call: Call) -> dict[str, Any]:
        try:
            if call.method not in self.verbs:
                raise errors.UnknownMethod(method=call.method)
            return {"result": self.verbs[call.method](call)}
        except errors.VdsmError as error:
            return {"error": error.to_wire()}
