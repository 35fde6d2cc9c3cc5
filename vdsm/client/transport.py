"""A connection to an agent: calls, and events on the same connection.

Addresses:

    /run/vdsm/vdsmd.sock    a Unix socket (or unix:PATH): newline-delimited frames; the way for local programs
    HOST, HOST:PORT         a WebSocket over TLS (or wss://HOST:PORT): the way from other hosts
    https://HOST:PORT       one POST per call, over TLS; events open a WebSocket, which then carries the calls too
    ws:// and http://       the same two without TLS, where the agent's host has its plain port open

A `Client` belongs to one thread at a time. Calls and events may be mixed: what arrives while a call waits for its
answer is kept for `next_event`. Nothing reconnects by itself: after `ConnectionLost` make a new client, and subscribe
with the `instance_id` and the last `sequence` seen to miss no event.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque

from vdsm.client import channels, failures, stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, Self

    from vdsm.client import tls

DEFAULT_PORT = 54321


def connect(
    address: str, timeout_s: float = 60.0, flow_id: str | None = None, credentials: tls.Credentials | None = None
) -> Client:
    """A client of the agent at `address`; `timeout_s` bounds connecting, and each call that names no other.

    `flow_id` begins the ids of all requests, so that the agent's log shows what belongs together; a random one without.
    `credentials` are for TLS; without them they are looked for where `vdsm.client.tls` says. The host's name counts.
    Raises `CannotConnect`, `Denied`, `Untrusted`, `NoCertificate`; `ValueError` for an address of no known form.
    """
    scheme, rest = _split(address)
    if scheme == "unix":
        return Client(channels.Lines(stream.open_unix(rest, timeout_s)), timeout_s, flow_id)
    host, port = _host_and_port(rest)
    if scheme in ("wss", "https") and credentials is None:
        from vdsm.client import tls

        credentials = tls.Credentials()
    place = channels.Place(host, port, timeout_s, credentials if scheme in ("wss", "https") else None)
    if scheme in ("ws", "wss"):
        return Client(channels.WebSocket(place, time.monotonic() + timeout_s), timeout_s, flow_id)
    place.open().close()  # whether somebody listens, now and not at the first call
    return Client(channels.Post(place), timeout_s, flow_id)


class Client:
    """Made by `connect`. `subscription` is what the last `subscribe` answered: {instanceId, sequence, gap}."""

    def __init__(self, channel: channels.Channel, timeout_s: float, flow_id: str | None = None) -> None:
        self.timeout_s = timeout_s
        self.flow_id = flow_id or os.urandom(4).hex()
        self.subscription: dict[str, Any] = {}
        self._channel = channel
        self._events: deque[dict[str, Any]] = deque()
        self._calls = 0

    def call(self, method: str, params: Any = None, timeout_s: float | None = None) -> Any:
        """The result of one call. Raises `ClientError` with what the agent answered, or one of its subclasses.

        After `NoAnswer` the client can be used on; an answer that comes late is dropped. After the other subclasses
        it is closed.
        """
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        self._calls += 1
        request = {"jsonrpc": "2.0", "method": method, "id": f"{self.flow_id}:{self._calls}"}
        if params is not None:
            request["params"] = params
        self._send(json.dumps(request, allow_nan=False).encode(), deadline)
        while True:
            message = self._receive(deadline)
            # An error without an id answers a request that the agent could not read; ours is the only one under way.
            if message.get("id") == request["id"] or ("error" in message and message.get("id") is None):
                return self._result(message, request["id"])
            self._keep_event(message)

    def subscribe(
        self, topics: Sequence[str] | None = None, instance_id: str | None = None, since: int | None = None
    ) -> dict[str, Any]:
        """Let events come on this connection: of `topics` (all without), from the one after `since` on if given."""
        self._channel = self._channel.for_events(time.monotonic() + self.timeout_s)
        params = {"topics": topics, "instanceId": instance_id, "since": since}
        given = {name: value for name, value in params.items() if value is not None}
        self.subscription = self.call("Host.subscribe", given)
        return self.subscription

    def next_event(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next event, {instanceId, sequence, topic, subject, time, data}; None when none came in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            try:
                self._keep_event(self._receive(deadline))
            except failures.NoAnswer:
                return None
        return self._events.popleft()

    def events(
        self, topics: Sequence[str] | None = None, instance_id: str | None = None, since: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Subscribe now, and iterate over the events for ever; calls may be made meanwhile."""
        self.subscribe(topics, instance_id, since)
        return self._follow()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _follow(self) -> Iterator[dict[str, Any]]:
        while True:
            event = self.next_event()
            if event is not None:
                yield event

    def _send(self, text: bytes, deadline: float) -> None:
        try:
            self._channel.send(text, deadline)
        except failures.ConnectionLost:
            # An agent that refuses a request by its size says so and hangs up while we still send. Then its words are
            # there to be received; when not, the same failure comes again from there.
            pass
        except BaseException:
            self.close()  # a part of a frame may be out
            raise

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        try:
            text = self._channel.receive(deadline)
            return _message(text)
        except failures.NoAnswer:
            raise
        except failures.ClientError:
            self.close()
            raise

    def _result(self, message: dict[str, Any], request_id: str) -> Any:
        if "error" in message:
            raise failures.ClientError.from_wire(message["error"], request_id)
        if "result" not in message:
            self.close()
            raise failures.BadAnswer("The peer's answer has neither result nor error")
        return message["result"]

    def _keep_event(self, message: dict[str, Any]) -> None:
        if message.get("method") == "event" and isinstance(message.get("params"), dict):
            self._events.append(message["params"])


def _message(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise failures.BadAnswer(f"The peer answered something that is not JSON: {text[:100]!r}") from error
    if not isinstance(message, dict):
        raise failures.BadAnswer(f"The peer answered something that is not JSON-RPC: {text[:100]!r}")
    return message


def _split(address: str) -> tuple[str, str]:
    for scheme in ("unix", "http", "https", "ws", "wss"):
        prefix = "unix:" if scheme == "unix" else f"{scheme}://"
        if address.startswith(prefix) and len(address) > len(prefix):
            return scheme, address[len(prefix) :]
    if address and "://" not in address:
        return "unix" if "/" in address else "wss", address
    raise ValueError(f"{address!r} is no address: a socket's path, HOST, HOST:PORT, or wss:// or https:// before them")


def _host_and_port(rest: str) -> tuple[str, int]:
    """`host`, `host:port`, `::1`, `[::1]:port`; a path of / or /jsonrpc may follow."""
    place, _, path = rest.partition("/")
    host, colon, port = place.rpartition(":")
    if not colon or port.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = place, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or path not in ("", channels.PATH.lstrip("/")):
        raise ValueError(f"{rest!r} is no HOST:PORT")
    return host, int(port)
