"""One WebSocket connection: a text (or binary) message is a request or a batch, an answer or event is a text message.

Calls begin in order and are answered as they end. While `max_calls_per_connection` calls are under way, or the peer
does not read its answers, no further message is taken.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import cast

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

    def __init__(
        self,
        wire: config.Wire,
        dispatcher: dispatch.Dispatcher,
        role: callers.Role,
        identity: callers.Identity = callers.LOOPBACK,
    ) -> None:
        # Texts stay bytes: the parser checks them, and a bad one is answered like any other bad request.
        # aiohttp refuses messages of max_msg_size and above.
        self.socket = web.WebSocketResponse(
            max_msg_size=wire.max_body_bytes + 1, compress=False, decode_text=False, timeout=_GOODBYE_S
        )
        self.caller = callers.Caller(f"ws-{next(_numbers)}", "websocket", role, self, identity)
        self._limit = wire.max_calls_per_connection
        self._answer = dispatcher.answer
        self._running: set[asyncio.Task[None]] = set()
        self._receiving = False

    @property
    def parked(self) -> bool:
        """Whether aiohttp has no message of this connection in hand, and another call may begin."""
        return self._receiving and len(self._running) < self._limit

    def handed_over(self) -> None:
        """aiohttp was given something: not parked until it is dealt with."""
        self._receiving = False

    async def serve(self, request: web.BaseRequest, upgraded: Callable[[], None]) -> None:
        """Calls `upgraded` once it is; returns when the peer has gone, or after `close`."""
        await self.socket.prepare(request)
        upgraded()
        logger.info("%s connected: %s, %s", self.caller.name, request.remote, self.caller.identity)
        try:
            while (message := await self._receive()).type in _MESSAGES:
                if len(self._running) >= self._limit:
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                if (answer := self.begin(message.data)) is not None:
                    await self.send(answer)
        except ConnectionError:
            pass  # lost while it was written to
        finally:
            self.caller.stop_waiting()
            logger.info("%s closed", self.caller.name)

    def begin(self, text: bytes) -> dispatch.Answer:
        """Begins a call. Returns its answer, or None when there is none or it is sent later."""
        answer = self._answer(text, self.caller)
        if answer is None or type(answer) is bytes:
            return answer
        task = asyncio.get_running_loop().create_task(self._later(cast(Awaitable[dispatch.Answer], answer)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return None

    async def send(self, frame: bytes) -> None:
        """`caller.Connection.send`."""
        await self.socket.send_frame(frame, web.WSMsgType.TEXT)

    async def close(self, timeout_s: float) -> None:
        """Sends the answers still to come, says goodbye, and closes."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        self.handed_over()
        with contextlib.suppress(ConnectionError):
            await self.socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    async def _receive(self) -> aiohttp.WSMessage:
        self._receiving = True
        message = await self.socket.receive()
        self._receiving = False
        return message

    async def _later(self, answer: Awaitable[dispatch.Answer]) -> None:
        frame = await answer
        if frame is not None:
            with contextlib.suppress(ConnectionError):  # the peer has gone
                await self.send(frame)
