"""The worker's second thread: hears the agent, and sanlock.

    {"abort"} from the agent     the job's tool is killed, the main thread undoes and says so
    {"stop"} from the agent      the same, but what was being made is left for a mend, where the body can
    the channel ends             the agent is gone: the tool is killed, the record says "interrupted", the process ends
    SIGTERM                      the lease is lost: the tool is killed, the process ends; nothing is written any more,
                                 not even the record, for another host may own it by now (trap 14)

It works whatever the main thread is waiting for: sanlock, storage, a tool.
"""

import contextlib
import os
import select
import signal
import threading
from typing import Any, NoReturn

from vdsm import channels, errors, logs
from vdsm.jobs import fate, ledger

_log = logs.get("jobs.worker")

# How a worker exits that did not end its job.
INTERRUPTED, LEASE_LOST = 75, 76


class Control:
    def __init__(self, channel: channels.Channel, fate: fate.Fate, ledger: ledger.Ledger) -> None:
        self._channel = channel
        self._fate = fate
        self._ledger = ledger

    def start(self) -> None:
        """Called once, by the main thread: only that may set signal handlers."""
        hear, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(tell)  # written by the kernel's own delivery, also while the main thread cannot run
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._run, args=(hear,), name="control", daemon=True).start()

    def _run(self, signals: int) -> None:
        poller = select.poll()
        poller.register(signals, select.POLLIN)
        poller.register(self._channel, select.POLLIN)
        try:
            while True:
                self._obey_all()  # first: an abort may have been received together with the order
                if signals in [fd for fd, _ in poller.poll()]:
                    self._lease_lost()
        except BaseException:  # noqa: BLE001 - the border of the thread: a worker that nobody can stop must not go on
            _log.exception("the control thread failed")
            self._interrupt()

    def _obey_all(self) -> None:
        with contextlib.suppress(TimeoutError):
            while (order := self._channel.receive(0)) is not None:
                aborting = self._fate.abort("stop" in order)
                self._tell({"aborting": True} if aborting else {"refused": "it is writing its result"})
            self._interrupt()

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):
            self._channel.send(message)

    def _lease_lost(self) -> NoReturn:
        self._fate.leave()
        _log.error("sanlock ends this worker: the lease is lost")
        os._exit(LEASE_LOST)

    def _interrupt(self) -> NoReturn:
        """Leaves the data as it is, for whoever mends it. Holds the ledger to the end: nothing is written after it."""
        self._fate.leave()
        with self._ledger.lock:
            try:
                self._ledger.interrupt()
            except (errors.VdsmError, OSError) as error:
                _log.error("the record does not say that the work was interrupted: %s", error)
            os._exit(INTERRUPTED)
