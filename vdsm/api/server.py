"""The agent's face: the transports, the dispatcher and the events behind one object."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from vdsm import config, events, logs
from vdsm.api import certificates, discover, dispatch, http, notify, tls, unixsocket, verb

logger = logs.get("api.server")

# How long (seconds) `stop` waits for calls at work; a stuck repository must not hold the agent's end. After it, ...
DRAIN_S = 5.0
# ... connections have this long to take their last answers.
FLUSH_S = 1.0


class Transport(Protocol):
    """A way in. `close` may follow a `start` that failed."""

    async def start(self) -> None: ...

    def close(self) -> None: ...

    async def stop(self, timeout_s: float) -> None: ...


class Api:
    """Serves `verbs` on the configured transports. Its methods belong to the event loop that `start` runs on.

    Adds `rpc.discover`, `Host.subscribe` and `Host.unsubscribe` to the verbs. `shapes` gives, for an event topic, what
    its params look like on the wire.
    """

    def __init__(
        self,
        settings: config.Config,
        verbs: verb.Verbs,
        log: events.EventLog,
        shapes: Mapping[str, notify.Shape] | None = None,
    ) -> None:
        wire = settings.wire
        self.notifier = notify.Notifier(log, shapes or {})
        verbs.add("Host", self.notifier)
        verbs.add("rpc", discover.Discovery(verbs))
        self.dispatcher = dispatch.Dispatcher(verbs, wire.max_batch)
        self._transports: list[Transport] = []
        if wire.unix_socket:
            self._transports.append(unixsocket.UnixServer(wire, self.dispatcher, self.notifier.forget))
        if wire.tcp_port:
            self._listen(wire, http.Loopback(wire.tcp_port))
        self._tls = tls.TlsListener(settings.tls, log) if settings.tls.cert else None
        if self._tls is not None:
            self._listen(wire, self._tls)

    async def start(self) -> None:
        """Begins to listen. Raises OSError when a socket or port cannot be had, `certificates.CertificateError` when
        the files of [tls] cannot be used; then nothing listens."""
        self.notifier.start()
        try:
            for transport in self._transports:
                await transport.start()
        except (OSError, certificates.CertificateError):
            await self.stop()
            raise

    def reload(self) -> None:
        """Reads again what can change while the agent runs: the certificates."""
        if self._tls is not None:
            self._tls.reload()

    async def stop(self) -> None:
        """Takes no new connections or calls, ends what only waits, lets what works end within DRAIN_S, and closes."""
        for transport in self._transports:
            transport.close()
        if not await self.dispatcher.stop(DRAIN_S):
            logger.warning("calls still at work after %.0f s are left behind", DRAIN_S)
        self.notifier.stop()
        await asyncio.gather(*(transport.stop(FLUSH_S) for transport in self._transports))
        self.dispatcher.log.flush()

    def _listen(self, wire: config.Wire, listener: http.Listener) -> None:
        self._transports.append(http.HttpServer(wire, self.dispatcher, self.notifier.forget, listener))
