"""The agent's end of the root helper: one connection per call, blocking, for any thread."""

import contextlib
import socket
import time

from supervdsm import contract, frames

# Above the call's own deadline, so that the helper's answer "it hangs" arrives before this end gives up: time to read
# the call (5 s in `session.py`), to wait for room (1 s in `server.py`), and to send.
MARGIN_S = 8.0


class Helper:
    """The helper that listens on `path`. Holds no connection; may be shared by threads."""

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def path(self) -> str:
        return self._path

    def call(self, call: contract.Call[contract.R]) -> contract.R:
        """The result of `call`. Raises the `contract.HelperError` that the helper sent, `Unavailable` when it cannot
        be reached or goes away, `DeadlinePassed` when it is silent for the call's deadline and `MARGIN_S` more."""
        try:
            reply = self._exchange(contract.encode_call(call), time.monotonic() + call.deadline_s + MARGIN_S)
        except TimeoutError as error:
            raise contract.DeadlinePassed(f"no answer from {self._path}") from error
        except OSError as error:
            raise contract.Unavailable(f"{self._path}: {error.strerror}") from error
        except frames.FrameError as error:
            raise contract.Unavailable(f"{self._path}: {error}") from error
        if reply is None:
            raise contract.Unavailable(f"{self._path}: closed without an answer")
        return contract.decode_reply(call, reply)

    def _exchange(self, request: bytes, deadline: float) -> bytes | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(deadline - time.monotonic())
            link.connect(self._path)
            with contextlib.suppress(ConnectionError):  # refused before it was read: the reply says why
                frames.send(link, request, deadline)
            return frames.receive(link, frames.MAX_REPLY_BYTES, deadline)
