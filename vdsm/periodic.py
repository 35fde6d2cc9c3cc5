"""A named thread that does one thing again and again."""

import threading
from collections.abc import Callable

from vdsm import logs

_log = logs.get("periodic")


class Periodic:
    """Calls `tick` every `interval_s` seconds, counted from the end of one call to the start of the next; a function is
    asked for them after each call.

    The first call comes at once. A tick that raises is logged and the next one comes in its time. `stop` takes effect
    between two ticks, without waiting for the interval.
    """

    def __init__(self, name: str, interval_s: float | Callable[[], float], tick: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._tick = tick
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def poke(self) -> None:
        """The next tick comes now instead of at its time."""
        self._wake.set()

    def stop(self, timeout_s: float | None = None) -> bool:
        """No further tick begins; True when the thread has ended within `timeout_s`."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._tick()
            except Exception:  # noqa: BLE001 - the border of the thread: a failed tick must not end all later ones
                _log.exception("%s failed; trying again in %s s", self._thread.name, self._pause_s())
            self._wake.wait(self._pause_s())
            if not self._stopping:
                self._wake.clear()

    def _pause_s(self) -> float:
        return self._interval_s() if callable(self._interval_s) else self._interval_s
