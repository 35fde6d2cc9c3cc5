"""Runs jobs: a few threads, each of which starts one worker process, listens to it and sees how it ended.

One more thread concludes: it ends the work of workers that died and of jobs that were aborted before they began, with
a short worker of its own. So an abort never waits for a free thread, and a worker that cannot die, because its storage
hangs, keeps no thread. The agent itself touches neither leases nor records.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from vdsm import errors, forkserver, logs
from vdsm.jobs import job, worker

_log = logs.get("jobs.pool")

TICK_S = 1.0  # how often a busy thread looks at the clock, and waiting jobs are asked whether they can start
ABORT_GRACE_S = 10.0  # from an abort to the worker's end; then it is killed, and concluded by another
CONCLUDE_S = 60.0  # for one conclusion: its waits for leases and records (10 s each) and the undoing
EXIT_S = 5.0  # from a worker's last message to its end
GONE_SLICE_S = 0.05  # how long the concluding thread waits for one dead worker's tools before it looks at the next

TARGET = f"{worker.__name__}:run"

Outcome = tuple[job.Status, dict[str, Any] | None]


@dataclass(eq=False)
class _Entry:
    """A job in the pool. `child` is there from its start until it has been buried."""

    job: job.Job
    child: forkserver.Child | None = None
    abort_at: float | None = None  # when the abort was asked for
    stopped: bool = False  # the abort is to leave what was being made
    verdict: Outcome | None = None  # how a conclusion is to end it, unless the record knows better


class Pool:
    """`server` has preloaded `vdsm.jobs.worker` and the bodies' modules. Methods may be called from any thread."""

    def __init__(
        self,
        server: forkserver.ForkServer,
        *,
        workers: int = 4,
        queue: int = 100,
        lease_wait_s: float = 10.0,
        abort_grace_s: float = ABORT_GRACE_S,
    ) -> None:
        self._server = server
        self._queue = queue
        self._lease_wait_s = lease_wait_s
        self._abort_grace_s = abort_grace_s
        self._lock = threading.RLock()
        self._work_there = threading.Condition(self._lock)  # for the threads that run jobs
        self._ends_there = threading.Condition(self._lock)  # for the one that concludes
        self._waiting: deque[_Entry] = deque()
        self._running: dict[str, _Entry] = {}
        self._ending: list[_Entry] = []
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"job-{number}", daemon=True) for number in range(workers)
        ]
        self._threads.append(threading.Thread(target=self._conclude_all, name="job-conclusions", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, new: job.Job) -> None:
        """Queues the job. Raises `Overloaded` when too many wait."""
        with self._lock:
            if len(self._waiting) >= self._queue:
                raise errors.Overloaded(what="waiting jobs", limit=self._queue)
            new.announce()
            self._waiting.append(_Entry(new))
            self._work_there.notify()

    def poke(self) -> None:
        """Asks the gates of the waiting jobs again now: what they wait for may have come."""
        with self._lock:
            self._work_there.notify_all()

    def abort(self, wanted: job.Job, *, stop: bool = False) -> None:
        """Asks for the job's abort and returns; a job that is writing its result will end as done all the same.

        `stop`: what it was making is left, for a mend. The first word counts.
        """
        with self._lock:
            for entry in self._waiting:
                if entry.job is wanted:
                    self._waiting.remove(entry)
                    entry.stopped = stop
                    wanted.explain("being aborted")
                    self._hand_over(entry, (job.Status.ABORTED, None))
                    return
            entry_or_none = self._running.get(wanted.id)
            if entry_or_none is not None and entry_or_none.abort_at is None:
                entry_or_none.abort_at = time.monotonic()
                entry_or_none.stopped = stop
                self._tell_abort(entry_or_none)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Begins no job any more; running workers end as interrupted. True when all has ended within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._stopping = True
            for entry in self._running.values():
                if entry.child is not None:
                    entry.child.channel.hang_up()
            self._work_there.notify_all()
            self._ends_there.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        ended = not any(thread.is_alive() for thread in self._threads)
        for entry in self._ending if ended else ():
            if entry.child is not None:
                entry.child.close()
        return ended

    # -- the threads that run jobs -----------------------------------------------------------------------------------

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            with logs.about(f"job {entry.job.id}"):
                try:
                    self._supervise(entry)
                except Exception as error:  # noqa: BLE001 - the border of the thread: the next job needs it
                    _log.exception("supervising failed")
                    self._conclude_later(entry, errors.Unexpected(reason=type(error).__name__))

    def _next(self) -> _Entry | None:
        """Waits for a job that can start, and marks it as running; None when the pool stops."""
        with self._lock:
            while not self._stopping:
                entry = self._startable()
                if entry is not None:
                    self._waiting.remove(entry)
                    self._running[entry.job.id] = entry
                    return entry
                self._work_there.wait(TICK_S if self._waiting else None)
            return None

    def _startable(self) -> _Entry | None:
        for entry in list(self._waiting):
            gate = entry.job.request.gate
            try:
                wait = gate() if gate is not None else None
            except errors.VdsmError as error:
                self._waiting.remove(entry)
                entry.job.move(job.Status.RUNNING)
                self._hand_over(entry, (job.Status.FAILED, error.to_wire()))
                continue
            if wait is None:
                return entry
            entry.job.explain(str(wait))
        return None

    def _supervise(self, entry: _Entry) -> None:
        entry.job.move(job.Status.RUNNING)
        child = self._server.spawn(TARGET, self._order(entry))
        with self._lock:
            entry.child = child
            if self._stopping:
                child.channel.hang_up()
            elif entry.abort_at is not None:
                self._tell_abort(entry)
        outcome = self._listen(entry, child)
        if outcome is not None:
            with self._lock:
                self._running.pop(entry.job.id, None)
            entry.job.end(*outcome)
        exit_code = _see_off(child)
        if outcome is None and not self._stopping:
            self._conclude_later(entry, errors.WorkerDied(how=_how(exit_code)))
        else:
            child.close()

    def _order(self, entry: _Entry) -> dict[str, Any]:
        """For the job's worker or, once there is a verdict, for the one that concludes."""
        wanted, verdict = entry.job, entry.verdict
        order: dict[str, Any] = {
            "job_id": wanted.id,
            "kind": wanted.request.kind,
            "argument": wanted.request.argument,
            "lease_wait_s": self._lease_wait_s,
        }
        if verdict is not None:
            order["verdict"] = {"state": str(verdict[0]), "error": verdict[1], "stopped": entry.stopped}
        return order

    def _listen(self, entry: _Entry, child: forkserver.Child) -> Outcome | None:
        """Follows the worker to its last message; None when it died without one."""
        while True:
            try:
                message = child.channel.receive(TICK_S)
            except TimeoutError:
                self._escalate(entry, child)
                continue
            if message is None:
                return None
            if "ended" in message:
                return job.Status(message["ended"]), message["error"]
            self._hear(entry, message)

    def _hear(self, entry: _Entry, message: dict[str, Any]) -> None:
        if "progress" in message:
            standing = message["progress"]
            entry.job.report(standing["percent"], standing["stage"], standing["stages"], standing["stage_name"])
        elif "aborting" in message:
            if entry.job.status is job.Status.RUNNING:
                entry.job.move(job.Status.ABORTING)
        elif "refused" in message:
            entry.abort_at, entry.stopped = None, False
            entry.job.explain(f"cannot be aborted any more: {message['refused']}")

    def _escalate(self, entry: _Entry, child: forkserver.Child) -> None:
        if entry.abort_at is not None and time.monotonic() - entry.abort_at > self._abort_grace_s:
            _log.warning("killing worker %s: it did not end within %s s", child.pid, self._abort_grace_s)
            child.kill()

    def _tell_abort(self, entry: _Entry) -> None:
        if entry.child is not None:
            with contextlib.suppress(ConnectionError):  # it has just ended
                entry.child.channel.send({"stop" if entry.stopped else "abort": True})

    # -- the thread that concludes -----------------------------------------------------------------------------------

    def _conclude_later(self, entry: _Entry, error: errors.VdsmError) -> None:
        with self._lock:
            aborted = entry.abort_at is not None or entry.job.status is job.Status.ABORTING
            self._hand_over(entry, (job.Status.ABORTED, None) if aborted else (job.Status.FAILED, error.to_wire()))

    def _hand_over(self, entry: _Entry, verdict: Outcome) -> None:
        """With the lock held: the job runs no more, and waits to be concluded."""
        self._running.pop(entry.job.id, None)
        entry.verdict = verdict
        self._ending.append(entry)
        self._ends_there.notify()

    def _conclude_all(self) -> None:
        while (ending := self._to_conclude()) is not None:
            for entry in ending:
                with logs.about(f"job {entry.job.id}"):
                    try:
                        concluded = self._conclude(entry)
                    except Exception:  # noqa: BLE001 - the border of the thread: the others need it
                        _log.exception("the conclusion failed")
                        concluded = True
                if concluded:
                    with self._lock:
                        self._ending.remove(entry)

    def _to_conclude(self) -> list[_Entry] | None:
        with self._lock:
            while not self._ending and not self._stopping:
                self._ends_there.wait()
            return None if self._stopping else list(self._ending)

    def _conclude(self, entry: _Entry) -> bool:
        """Lets a short worker end the work; False while processes of the dead one are left.

        When that fails too, the job ends by the verdict, with an error also when it was aborted, and its record tells
        whoever looks that nobody works on it.
        """
        assert entry.verdict is not None
        if entry.child is not None:
            if not entry.child.wait_gone(GONE_SLICE_S):
                entry.job.explain("its worker died; waiting for the last of its processes to end")
                return False
            entry.child.close()
            entry.child = None
        status, why = entry.verdict
        outcome: Outcome = status, why or errors.WorkerDied(how="while it took the work back").to_wire()
        try:
            with self._server.spawn(TARGET, self._order(entry)) as child:
                outcome = self._hear_out(child) or outcome
                _see_off(child)
        except errors.VdsmError as error:
            _log.error("no worker to conclude with: %s", error)
        entry.job.end(*outcome)
        return True

    def _hear_out(self, child: forkserver.Child) -> Outcome | None:
        deadline = time.monotonic() + CONCLUDE_S
        with contextlib.suppress(TimeoutError):
            while (message := child.channel.receive(max(0.0, deadline - time.monotonic()))) is not None:
                if "ended" in message:
                    return job.Status(message["ended"]), message["error"]
        _log.error("the conclusion failed; the record may still call the work running")
        return None


def _see_off(child: forkserver.Child) -> int:
    """The exit code of a worker that has nothing more to say, and is made to go when it does not."""
    try:
        return child.wait_exit(EXIT_S)
    except TimeoutError:
        _log.warning("killing worker %s: it does not end", child.pid)
        child.kill()
        return -signal.SIGKILL


def _how(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
