"""HTTP: `POST /jsonrpc`, and a WebSocket on the same path; plain on loopback, or over TLS for other hosts.

A JSON-RPC answer, be it a result or an error, is a 200; nothing to answer is a 204. Refused before anything is read:
any request with an Origin header (403: no page in a browser drives a host), other content types than application/json
(415: no form does either), encoded bodies (415), bodies over the limit (413), other paths and methods.

Whoever can open a connection to a loopback address of this host is taken for an admin, so the plain port is off unless
configured. Over TLS (`tls`) it is whoever has a certificate of our CA.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import hdrs, web

from vdsm import config, errors
from vdsm.api import caller as callers
from vdsm.api import dispatch, envelope, front, unixsocket, websocket

PATH = "/jsonrpc"
HOST = "127.0.0.1"
_ROLE = callers.Role.ADMIN
_JSON = "application/json"
# aiohttp does not see most requests of a connection that is in use, so it must not count how long it is idle. A peer
# that has gone from this host closes its connection.
_KEPT_ALIVE_S = 1e9

Admit = Callable[[callers.Identity], asyncio.Protocol]


class Listener(Protocol):
    """Where connections come from. `start` calls `admit` for each that may come in, and lets what it gave serve it."""

    async def start(self, admit: Admit) -> None: ...

    def close(self) -> None: ...


class Loopback:
    """Plain TCP for this host alone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None

    async def start(self, admit: Admit) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: admit(callers.LOOPBACK), HOST, self._port)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class HttpServer:
    """All methods belong to the event loop."""

    def __init__(
        self, wire: config.Wire, dispatcher: dispatch.Dispatcher, gone: unixsocket.Gone, listener: Listener
    ) -> None:
        """`gone` is called for each WebSocket connection that has ended."""
        self._wire = wire
        self._listener = listener
        self._dispatcher = dispatcher
        self._gone = gone
        self._sockets: set[websocket.WebSocketConnection] = set()
        self._fronts: dict[web.RequestHandler, front.Front] = {}
        self._web: web.Server | None = None

    async def start(self) -> None:
        """Raises what the listener raises, OSError when the port is taken."""
        # The low-level server: one path needs no router.
        self._web = web.Server(
            self._handle,
            request_factory=self._request,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=_KEPT_ALIVE_S,
        )
        await self._listener.start(self._front)

    def close(self) -> None:
        """Takes no new connections."""
        self._listener.close()

    async def stop(self, timeout_s: float) -> None:
        """Ends the connections once their answers are sent, or after `timeout_s`."""
        if running := [each.running for each in self._fronts.values() if each.running is not None]:
            await asyncio.wait(running, timeout=timeout_s)
        await asyncio.gather(*(connection.close(timeout_s) for connection in list(self._sockets)))
        if self._web is not None:
            await self._web.shutdown(timeout_s)

    def _front(self, identity: callers.Identity) -> front.Front:
        assert self._web is not None
        inner, limit = self._web(), self._wire.max_body_bytes
        made = front.Front(inner, self._dispatcher, _ROLE, limit, lambda: self._fronts.pop(inner, None), identity)
        self._fronts[inner] = made
        return made

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        limit = self._wire.max_body_bytes
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=limit)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != PATH:
            return _refusal(404, f"the agent serves {PATH}")
        if hdrs.ORIGIN in request.headers:
            return _refusal(403, "requests from web pages are refused")
        if request.method == hdrs.METH_POST:
            return await self._post(request)
        if request.method != hdrs.METH_GET:
            return _refusal(405, "POST a request, or GET a WebSocket", Allow="GET, POST")
        if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            return _refusal(426, "GET is for WebSockets", Upgrade="websocket", Connection="Upgrade")
        return await self._websocket(request)

    async def _post(self, request: web.BaseRequest) -> web.Response:
        connection = self._connection(request)
        if (refusal := self._unfit(request)) is not None:
            return refusal
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        answer = self._dispatcher.answer(body, connection.caller)
        if answer is not None and not isinstance(answer, bytes):
            answer = await answer
        connection.accepted(request)
        if answer is None:
            return web.Response(status=204)
        return web.Response(body=answer, content_type=_JSON)

    def _connection(self, request: web.BaseRequest) -> front.Front:
        """Raises ConnectionResetError when it is gone."""
        connection = self._fronts.get(request.protocol)
        if connection is None:
            raise ConnectionResetError
        return connection

    def _unfit(self, request: web.BaseRequest) -> web.Response | None:
        """The refusal of a POST whose headers say enough."""
        content_type = request.headers.get(hdrs.CONTENT_TYPE, "")
        if content_type != _JSON and not _is_json(content_type):
            return _refusal(415, f"the content type must be {_JSON}")
        if hdrs.CONTENT_ENCODING in request.headers:
            return _refusal(415, "encoded bodies are not read")
        if (request.content_length or 0) > self._wire.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> web.Response:
        error = errors.InvalidRequest(reason=f"longer than {self._wire.max_body_bytes} bytes")
        return web.Response(status=413, body=envelope.failure(None, error), content_type=_JSON)

    def _upgraded(self, request: web.BaseRequest, connection: websocket.WebSocketConnection) -> None:
        self._fronts[request.protocol].upgraded(connection)

    async def _websocket(self, request: web.BaseRequest) -> web.StreamResponse:
        identity = self._connection(request).caller.identity
        connection = websocket.WebSocketConnection(self._wire, self._dispatcher, _ROLE, identity)
        self._sockets.add(connection)
        try:
            await connection.serve(request, functools.partial(self._upgraded, request, connection))
        finally:
            self._sockets.discard(connection)
            self._gone(connection.caller)
        return connection.socket


def _is_json(content_type: str) -> bool:
    """Whether this is application/json, with no character set but UTF-8."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return kind == _JSON and all(part in ("", "charset=utf-8", 'charset="utf-8"') for part in parameters)


def _refusal(status: int, why: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=why + "\n", headers=headers)
