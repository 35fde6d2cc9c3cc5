"""One WebSocket connection: a text (or binary) message is a request or a batch, an answer or event is a text message.

Calls begin in order and are answered as they end. While `max_calls_per_connection` calls are under way, or the peer
does not read its answers, no further message is taken.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable
from typing import Any

import aiohttp
from aiohttp import web

from vdsm import config, logs
from vdsm.api import caller as callers
from vdsm.api import dispatch

logger = logs.get("api.websocket")

_MESSAGES = (web.WSMsgType.TEXT, web.WSMsgType.BINARY)
# How long (seconds) a peer may take to answer our closing of the connection.
_GOODBYE_S = 1.0
_numbers = itertools.count(1)


class WebSocketConnection:
    """Serves one upgraded request. All methods belong to the event loop."""

    def __init__(self, wire: config.Wire, dispatcher: dispatch.Dispatcher, role: callers.Role) -> None:
        # Texts stay bytes: the parser checks them, and a bad one is answered like any other bad request.
        # aiohttp refuses messages of max_msg_size and above.
        self.socket = web.WebSocketResponse(
            max_msg_size=wire.max_body_bytes + 1, compress=False, decode_text=False, timeout=_GOODBYE_S
        )
        self._limit = wire.max_calls_per_connection
        self._answer = dispatcher.answer
        self.caller = callers.Caller(f"ws-{next(_numbers)}", "websocket", role, self)
        self._running: set[asyncio.Task[None]] = set()

    async def serve(self, request: web.BaseRequest) -> None:
        """Returns when the peer has closed or broken the connection, or `close` has been called."""
        await self.socket.prepare(request)
        logger.info("%s connected: %s", self.caller.name, request.remote)
        try:
            while (message := await self.socket.receive()).type in _MESSAGES:
                await self._begin(message.data)
        except ConnectionError:
            pass  # lost while it was written to
        finally:
            self.caller.stop_waiting()
            logger.info("%s closed", self.caller.name)

    async def send(self, frame: bytes) -> None:
        """`caller.Connection.send`."""
        await self.socket.send_frame(frame, web.WSMsgType.TEXT)

    async def close(self, timeout_s: float) -> None:
        """Sends the answers still to come, says goodbye, and closes."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        with contextlib.suppress(ConnectionError):
            await self.socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    async def _begin(self, text: Any) -> None:
        while len(self._running) >= self._limit:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        answer = self._answer(text, self.caller)
        if isinstance(answer, bytes):
            await self.socket.send_frame(answer, web.WSMsgType.TEXT)
        elif answer is not None:
            task = asyncio.get_running_loop().create_task(self._later(answer))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _later(self, answer: Awaitable[dispatch.Answer]) -> None:
        frame = await answer
        if frame is not None:
            with contextlib.suppress(ConnectionError):  # the peer has gone
                await self.send(frame)
