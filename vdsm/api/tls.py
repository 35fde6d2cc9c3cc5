"""TLS connections of other hosts: who may come in, and how many may be at the door.

A peer shows a certificate that one of the configured CAs has signed, and for the time being is an admin by that. Each
handshake is a task of its own with a deadline, so that a peer that stalls delays nobody; their number is bounded, and
one more cuts off the oldest. The files are looked at every `check_s` and on SIGHUP (`reload`): connections that come
later get what is in them, connections that exist go on with what they began with. What became of a change is logged,
and published as an event of the topic "host" with the subject "certificates".
"""

import asyncio
import functools
import socket
import time
from typing import Any

from vdsm import config, events, logs
from vdsm.api import caller as callers
from vdsm.api import certificates, http

logger = logs.get("api.tls")

_BACKLOG = 128
# How long (seconds) accepting pauses when the kernel cannot: out of descriptors or memory, mostly.
_ACCEPT_PAUSE_S = 0.2
# How long (seconds) a peer may take to answer the goodbye of a connection that we close.
_GOODBYE_S = 5.0
# A peer that has lost its power says nothing. After a minute of silence it is asked, and given up two minutes later.
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 30,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 180_000,
}
# Failed handshakes that get a line of their own in the log within a minute; the others are counted.
_LINES_PER_MINUTE = 20
# A certificate that ends within so many seconds is spoken of when it is loaded.
_SOON_S = 30 * 86400


class TlsListener:
    """All methods belong to the event loop."""

    def __init__(self, settings: config.Tls, log: events.EventLog) -> None:
        self._settings = settings
        self._events = log
        self._certificates = certificates.Certificates(settings)
        self._listening: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._handshakes: dict[asyncio.Task[None], None] = {}  # oldest first
        self._asked = asyncio.Event()
        self._failures = _Failures()

    async def start(self, admit: http.Admit) -> None:
        """Raises OSError when the port is taken, `certificates.CertificateError` when the files cannot be used."""
        if problem := self._certificates.load():
            logger.error("the certificate is of no use: %s", problem)
        self._say_expiry()
        self._listening = _listen(self._settings.address, self._settings.port)
        self._tasks = [asyncio.create_task(self._accept(self._listening, admit)), asyncio.create_task(self._watch())]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for handshake in self._handshakes:
            # Not at once: a task that has not begun would leave its socket to nobody.
            asyncio.get_running_loop().call_soon(handshake.cancel)
        if self._listening is not None:
            self._listening.close()

    def reload(self) -> None:
        """Reads the files now, changed or not."""
        self._asked.set()

    # -- connections

    async def _accept(self, listening: socket.socket, admit: http.Admit) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:
                logger.error("cannot accept connections: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._handshakes) >= self._settings.max_handshakes:
                oldest = next(iter(self._handshakes))
                oldest.cancel()
                del self._handshakes[oldest]
            handshake = loop.create_task(self._shake_hands(connection, address[0], admit))
            self._handshakes[handshake] = None
            handshake.add_done_callback(lambda task: self._handshakes.pop(task, None))
            await asyncio.sleep(0)  # a burst of connections must not hold up what those that are in ask for

    async def _shake_hands(self, connection: socket.socket, host: str, admit: http.Admit) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                functools.partial(_Newcomer, admit),
                connection,
                ssl=self._certificates.context,
                ssl_handshake_timeout=self._settings.handshake_s,
                ssl_shutdown_timeout=_GOODBYE_S,
            )
        except asyncio.CancelledError:
            self._failures.say(host, "cut off: too many handshakes at once")
            raise
        except OSError as error:
            self._failures.say(host, getattr(error, "verify_message", "") or str(error))

    # -- files

    async def _watch(self) -> None:
        while True:
            asked = await self._wait()
            try:
                if not await asyncio.to_thread(self._certificates.refresh, asked):
                    continue
            except certificates.CertificateError as error:
                logger.error("new certificates are refused, those before stay in force: %s", error)
                self._publish(state="refused", reason=str(error))
            else:
                logger.info("new certificates are in force for new connections")
                self._say_expiry()
                self._publish(state="loaded", expires=self._certificates.expires)

    async def _wait(self) -> bool:
        """True when it was asked for, False when it is time."""
        try:
            await asyncio.wait_for(self._asked.wait(), self._settings.check_s)
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    def _say_expiry(self) -> None:
        if expires := self._certificates.expires:
            say = logger.warning if expires < time.time() + _SOON_S else logger.info
            say("the certificate is good until %s", certificates.date(expires))

    def _publish(self, **params: Any) -> None:
        self._events.publish("host", "certificates", params)


class _Newcomer(asyncio.Protocol):
    """Stands at the door until the handshake is over; a peer that fails it never gets further."""

    def __init__(self, admit: http.Admit) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        identity = callers.Identity.of_certificate(transport.get_extra_info("peercert"))
        host, port = transport.get_extra_info("peername")[:2]
        logger.info("https-%s-%d connected: %s", host, port, identity)
        admitted = self._admit(identity)
        transport.set_protocol(admitted)
        admitted.connection_made(transport)


class _Failures:
    """Logs failed handshakes, few of many: whoever reaches the port could fill the disk with them."""

    def __init__(self) -> None:
        self._minute = 0
        self._said = 0
        self._unsaid = 0

    def say(self, host: str, reason: str) -> None:
        minute = int(time.monotonic() / 60)
        if minute != self._minute:
            if self._unsaid:
                logger.warning("%d more handshakes failed", self._unsaid)
            self._minute, self._said, self._unsaid = minute, 0, 0
        if self._said >= _LINES_PER_MINUTE:
            self._unsaid += 1
            return
        self._said += 1
        logger.warning("handshake with %s failed: %s", host, reason)


def _listen(address: str, port: int) -> socket.socket:
    if not address and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"
    family = socket.AF_INET if "." in address and ":" not in address else socket.AF_INET6
    both = address in ("", "::")
    listening = socket.create_server((address, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listening.setblocking(False)
    return listening
