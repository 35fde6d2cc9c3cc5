"""The log of calls: verb, caller, request id, duration and outcome of each. Parameters never: they may hold secrets.

A line of the logging library costs as much as a short call. So calls that only look and end well at once are gathered
for a moment and written in one record; a crash of the agent loses that moment of them. All others are written as they
end, by whichever thread ended them.
"""

import asyncio
import time
from typing import Any

from vdsm import logs

logger = logs.get("api.calls")

# How long (seconds) finished short calls wait to be written together, and how many at most.
GATHER_S = 0.1
GATHER = 1000
# Ids and verb names come from callers: shown as JSON-like text, and no longer than this.
_LONGEST = 64


def request(caller: str, ident: Any) -> str:
    """How the log names a request: "unix-3 id 'x'". A notification has no id and shows None."""
    return f"{caller} id {ident if type(ident) is int else shown(ident)}"


def shown(text: Any) -> str:
    """Text of a caller, safe for one line."""
    return ascii(text[:_LONGEST] if isinstance(text, str) else text)


_Short = tuple[str, str, Any, float]  # verb, caller, request id, seconds


class CallLog:
    """`short` belongs to the event loop; `ended` may be called from any thread."""

    def __init__(self) -> None:
        self._short: list[_Short] = []
        self._timer: asyncio.TimerHandle | None = None

    def short(self, verb: str, caller: str, ident: Any, seconds: float) -> None:
        """A call that only looked and has ended well."""
        self._short.append((verb, caller, ident, seconds))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)
        elif len(self._short) >= GATHER:
            self.flush()

    def ended(self, verb: str, caller: str, ident: Any, began: float, outcome: str = "done") -> None:
        """Any other call. `began` is of `time.perf_counter`."""
        logger.info("%s %s: %s in %.2f ms", verb, request(caller, ident), outcome, (time.perf_counter() - began) * 1e3)

    def flush(self) -> None:
        """Writes what is gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._short = self._short, []
        if gathered and logger.isEnabledFor(20):
            lines = [
                f"{verb} {caller} id {ident if type(ident) is int else shown(ident)}: done in {int(seconds * 1e6)} us"
                for verb, caller, ident, seconds in gathered
            ]
            logger.info("%d short calls:\n  %s", len(lines), "\n  ".join(lines))
