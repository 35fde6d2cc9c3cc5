"""Whether a job in its worker goes on, is aborted, or ends with its process.

Shared by the worker's two threads: the main thread asks before each step, the control thread decides. One lock makes
each answer final: an abort comes before a step or after it, never between, and is never lost.
"""

import threading
import time
from collections.abc import Callable

from vdsm import errors, programs


class Fate:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tool: programs.Running | None = None
        self._aborted = False
        self._stopped = False
        self._committed = False
        self._undoing = False
        self._leaving = False

    # -- main thread -------------------------------------------------------------------------------------------------

    @property
    def aborted(self) -> bool:
        """True once the job is to be aborted, until its undoing begins."""
        return self._aborted and not self._undoing

    @property
    def stopped(self) -> bool:
        """True when whoever aborted the job wants to keep what it was making."""
        return self._stopped

    def check(self) -> None:
        """Raises `Aborted` when the job is to be aborted. Never returns once the process is about to end."""
        with self._lock:
            while self._leaving:
                time.sleep(60)
            if self.aborted:
                raise errors.Aborted()

    def commit(self) -> None:
        """From now on an abort is refused. Raises `Aborted` when it came before."""
        with self._lock:
            self.check()
            self._committed = True

    def begin_undo(self, stopped: bool = False) -> None:
        """From now on `check` never raises: what is being done is the end of the job, which was `stopped` or not."""
        with self._lock:
            self._undoing = True
            self._stopped = self._stopped or stopped
            self.check()

    def start(self, start: Callable[[], programs.Running]) -> programs.Running:
        """Starts the tool that an abort or the end of the process has to kill. One at a time."""
        with self._lock:
            self.check()
            self._tool = start()
            return self._tool

    def tool_ended(self) -> None:
        with self._lock:
            self._tool = None

    # -- control thread ----------------------------------------------------------------------------------------------

    def abort(self, stop: bool = False) -> bool:
        """Decides that the job is aborted and kills its tool; False when it is too late for that.

        `stop`: what it was making is kept. The first word counts.
        """
        with self._lock:
            if self._committed:
                return False
            self._stopped = self._stopped or (stop and not self._aborted)
            self._aborted = True
            if self._tool is not None and not self._undoing:
                self._tool.kill()
            return True

    def leave(self) -> None:
        """The process is about to end: its tool is killed, and the main thread does nothing more."""
        with self._lock:
            self._leaving = True
            if self._tool is not None:
                self._tool.kill()
