"""One connection: read a call, check it, have it done, write the audit line, answer.

    server       accepts, looks at the peer, forks                    server.py
      session    reads what the peer sends, holds the deadline        this file
        worker   does the call, in a process that can be killed       worker.py

A worker that hangs is killed at the call's deadline, and the peer is told. If even SIGKILL does not end it (storage in
uninterruptible sleep), the session stays until it is gone, so that the server's limit counts it. Sessions and workers
are forked from processes with one thread, and handle one call in their life.
"""

import contextlib
import socket
import time
from typing import Any

from supervdsm import audit, contract, frames, settings, worker

# A call is a few hundred bytes on a local socket; who needs longer than this (seconds) is broken or malicious.
READ_S = 5.0
# An answer fits into the socket's buffer, nearly always; a peer that does not read it has gone.
SEND_S = 1.0


class Session:
    """What became known of one connection's call so far."""

    def __init__(self, link: socket.socket, peer: audit.Peer, context: settings.Settings, stop: int) -> None:
        """`stop` becomes readable when the server ends."""
        self._link = link
        self._peer = peer
        self._context = context
        self._stop = stop
        self._started = time.monotonic()
        self._name: str | None = None
        self._arguments: Any = None
        self._worker: worker.Worker | None = None

    def serve(self, trail: audit.Trail) -> None:
        """Handles the connection to its end. A peer that leaves without a byte has asked nothing: no line for it."""
        outcome, reason = "done", None
        try:
            data = self._read()
            if data is None:
                return
            reply = self._do(data)
        except contract.HelperError as error:
            reply, outcome, reason = contract.encode_error(error), error.kind, error.reason
        ms = (time.monotonic() - self._started) * 1000
        trail.write(self._peer, self._name, self._arguments, outcome, reason, ms)
        with contextlib.suppress(OSError):  # the peer has gone; what was done is in the trail
            frames.send(self._link, reply, time.monotonic() + SEND_S)
        self._link.close()
        if self._worker is not None:
            self._worker.wait_gone(self._stop)

    def _read(self) -> bytes | None:
        try:
            return frames.receive(self._link, frames.MAX_CALL_BYTES, self._started + READ_S)
        except TimeoutError as error:
            raise contract.Refused(f"no whole call within {READ_S:g} s") from error
        except OSError as error:
            raise contract.Refused(f"reading the call: {error.strerror}") from error
        except frames.FrameError as error:
            raise contract.Refused(str(error)) from error

    def _do(self, data: bytes) -> bytes:
        name, sent = contract.parse_call(data)
        told = contract.concealed(sent)
        self._name, self._arguments = audit.shortened(name), audit.shortened(told)
        call = contract.build_call(name, sent)
        self._name, self._arguments = name, told
        try:
            self._worker = worker.Worker(call, self._context, private=self._link.fileno())
        except OSError as error:
            raise contract.Unavailable(f"no process for the call: {error.strerror}") from error
        return contract.encode_result(call, self._worker.result(self._stop))
