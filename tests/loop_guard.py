"""Fails a test whose event loop was blocked: code on the loop must hand anything that takes time to a thread."""

import asyncio
import sys
import threading
import time
import traceback
from pathlib import Path

# A blocked loop is one that waits for something. Short of that, two cores full of other work cost a tenth of a second.
LIMIT_S = 0.25
_TICK_S = 0.01


class LoopGuard:
    """Watches the running loop from `start` to `stop`. `stalls` has a line and a stack for each time it was blocked.

    Time that the loop's thread was ready and the kernel had no CPU for it does not count (schedstat's run delay).
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self.stalls: list[str] = []
        self._thread = threading.get_ident()
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="loop guard", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._beat, self._delay = time.monotonic(), self._run_delay()
        self._stack = ""
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        self._watcher.start()

    def stop(self) -> None:
        self._tick()
        self._timer.cancel()
        self._ended.set()
        self._watcher.join()

    def _tick(self) -> None:
        """On the loop: how late is it, and whose fault is that?"""
        now, delay = time.monotonic(), self._run_delay()
        blocked = now - self._beat - _TICK_S - (delay - self._delay)
        if blocked > self._limit_s:
            self.stalls.append(f"the loop was blocked for {blocked * 1e3:.0f} ms in\n{self._stack}")
        self._beat, self._delay, self._stack = now, delay, ""
        self._timer.cancel()
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _run_delay(self) -> float:
        return int(self._schedstat.read_text().split()[1]) / 1e9

    def _watch(self) -> None:
        """In a thread of its own: keeps the stack of what blocks the loop."""
        while not self._ended.wait(_TICK_S):
            if not self._stack and time.monotonic() - self._beat > self._limit_s / 2:
                frame = sys._current_frames().get(self._thread)
                self._stack = "".join(traceback.format_stack(frame)) if frame else ""
