"""Fails a test whose event loop was blocked: code on the loop must hand anything that takes time to a thread."""

import asyncio
import gc
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

    A blocked loop computes, or it waits while the other threads of the process go on. None of these is its own fault:
    that its thread was ready and the kernel had no CPU for it (schedstat's run delay); that another thread kept the
    interpreter, so that the watcher too stood still; that it fell to this thread to collect the garbage of all tests.
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
        self._beat, self._delay, self._used = time.monotonic(), self._run_delay(), time.thread_time()
        self._watched, self._collected, self._stack = 0.0, 0.0, ""
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        gc.callbacks.append(self._collecting)
        self._watcher.start()

    def stop(self) -> None:
        self._tick()
        self._timer.cancel()
        gc.callbacks.remove(self._collecting)
        self._ended.set()
        self._watcher.join()

    def _tick(self) -> None:
        """On the loop: how late is it, and whose fault is that?"""
        now, delay, used = time.monotonic(), self._run_delay(), time.thread_time()
        waited = now - self._beat - _TICK_S - (delay - self._delay)
        blocked = max(used - self._used - self._collected, min(waited, self._watched))
        if blocked > self._limit_s:
            self.stalls.append(f"the loop was blocked for {blocked * 1e3:.0f} ms in\n{self._stack}")
        self._beat, self._delay, self._used = now, delay, used
        self._watched, self._collected, self._stack = 0.0, 0.0, ""
        self._timer.cancel()
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _collecting(self, phase: str, _: dict[str, int]) -> None:
        """Called in whatever thread collects, before and after."""
        if threading.get_ident() == self._thread:
            self._collected += time.thread_time() if phase == "stop" else -time.thread_time()

    def _run_delay(self) -> float:
        return int(self._schedstat.read_text().split()[1]) / 1e9

    def _watch(self) -> None:
        """In a thread of its own: counts the time in which it could run itself; keeps the stack of what blocks it."""
        seen = time.monotonic()
        while not self._ended.wait(_TICK_S):
            seen, before = time.monotonic(), seen
            passed = min(seen - before, 2 * _TICK_S)
            self._watched += passed
            if not self._stack and seen - self._beat > self._limit_s / 2:
                frame = sys._current_frames().get(self._thread)
                self._stack = "".join(traceback.format_stack(frame)) if frame else ""
