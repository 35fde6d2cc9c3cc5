"""All jobs of this host: what the API asks and what events tell. In memory alone."""

import collections
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from vdsm import errors, events
from vdsm.jobs import job, pool

PROGRESS_EVENT_S = 1.0  # between two events of one job that tell mere progress

# Where a job stands with this agent: it has it, or its request is being committed; it had it; it knows nothing of it.
ACTIVE, ENDED, STRANGE = "active", "ended", "strange"

Infos = list[job.Info]


class Registry:
    """Methods may be called from any thread, and block for nothing but each other; `wait` blocks as it says.

    Ended jobs stay for `autodelete_s` seconds.
    """

    def __init__(self, runner: pool.Pool, log: events.EventLog, autodelete_s: float = 3600) -> None:
        self._pool = runner
        self._events = log
        self._autodelete_s = autodelete_s
        # Held while an event is published too, so that events come in the order of what they tell. Never held while
        # the pool is called: the pool's threads report under the pool's lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[str, job.Job] = {}
        self._ended: deque[job.Job] = deque()  # in the order of their end
        self._told: dict[str, float] = {}  # when progress was last published, of running jobs
        self._callbacks: dict[str, list[Callable[[job.Info], None]]] = {}
        self._expected: collections.Counter[str] = collections.Counter()

    def add(self, request: job.JobRequest) -> job.Info:
        """Queues a new job. A request that is here already, same id and same content, is answered with its job.

        Raises `JobExists` (same id, other content), `Overloaded`.
        """
        with self._lock:
            self._forget()
            known = self._jobs.get(request.job_id)
            if known is not None:
                if known.digest != request.digest:
                    raise errors.JobExists(job_id=request.job_id)
                return known.info()
            new = self._jobs[request.job_id] = job.Job(request, self._lock, self._on_change)
        try:
            self._pool.submit(new)
        except errors.Overloaded:
            with self._lock:
                del self._jobs[request.job_id]
            raise
        return new.info()

    @contextlib.contextmanager
    def expecting(self, job_id: str) -> Iterator[None]:
        """Inside the block the job's request is committed on storage, and then added: whoever reads the record in
        between must not take the work for dead."""
        with self._lock:
            self._expected[job_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._expected[job_id] -= 1
                self._expected += collections.Counter()  # drops what is zero

    def standing(self, job_id: str | None) -> str:
        """ACTIVE, ENDED or STRANGE."""
        with self._lock:
            known = self._jobs.get(job_id or "")
            if known is None:
                return ACTIVE if job_id in self._expected else STRANGE
            return ENDED if known.final else ACTIVE

    def active(self) -> list[str]:
        """Ids of the jobs that are here and have not ended, and of those whose request is being committed."""
        with self._lock:
            here = [known.id for known in self._jobs.values() if not known.final]
            return [*here, *(job_id for job_id in self._expected if job_id not in self._jobs)]

    def get(self, job_id: str) -> job.Info:
        """Raises `NoSuchJob`."""
        return self._find(job_id).info()

    def abort(self, job_id: str, *, stop: bool = False) -> None:
        """Asks for the job's abort and returns; events and `wait` tell how it ended. `stop`: see `pool.Pool.abort`.

        A job that is writing its result already ends as done. Raises `NoSuchJob`, `JobNotActive`.
        """
        found = self._find(job_id)
        if found.final:
            raise errors.JobNotActive(job_id=job_id, status=str(found.status))
        self._pool.abort(found, stop=stop)

    def delete(self, job_id: str) -> None:
        """Forgets an ended job. Raises `NoSuchJob`, `JobNotDone`."""
        with self._lock:
            found = self._find(job_id)
            if not found.final:
                raise errors.JobNotDone(job_id=job_id, status=str(found.status))
            self._ended.remove(found)
            self._drop(found)

    def wait(self, job_id: str, timeout_s: float | None = None) -> job.Info:
        """The job as it has ended, or as it is after `timeout_s`. Raises `NoSuchJob`."""
        found = self._find(job_id)
        with self._changed:
            self._changed.wait_for(lambda: found.final, timeout_s)
            return found.info()

    def on_end(self, job_id: str, callback: Callable[[job.Info], None]) -> Callable[[], None]:
        """Calls `callback` once with the ended job, at once when it has ended; returns what takes that back.

        For those who cannot give a thread to a wait: it runs in the thread that ended the job and must hand over
        (`loop.call_soon_threadsafe`). Raises `NoSuchJob`.
        """
        with self._lock:
            found = self._find(job_id)
            if found.final:
                callback(found.info())
                return lambda: None
            self._callbacks.setdefault(job_id, []).append(callback)

        def cancel() -> None:
            with self._lock:
                waiting = self._callbacks.get(job_id, [])
                if callback in waiting:
                    waiting.remove(callback)

        return cancel

    def list(self, job_type: str | None = None, job_ids: Iterable[str] | None = None) -> Infos:
        """Jobs of the type and with the ids, in the order in which they came; None and no ids mean all."""
        wanted = set(job_ids or ())
        with self._lock:
            self._forget()
            found = [known for known in self._jobs.values() if not wanted or known.id in wanted]
            return [known.info() for known in found if job_type in (None, known.request.job_type)]

    def _find(self, job_id: str) -> job.Job:
        with self._lock:
            self._forget()
            try:
                return self._jobs[job_id]
            except KeyError:
                raise errors.NoSuchJob(job_id=job_id) from None

    def _forget(self) -> None:
        """Deletes what ended long ago. Costs nothing when there is none, so everybody does it on the way."""
        oldest = time.time() - self._autodelete_s
        while self._ended and (self._ended[0].ended or 0.0) < oldest:
            self._drop(self._ended.popleft())

    def _drop(self, ended: job.Job) -> None:
        del self._jobs[ended.id]
        self._events.publish("job", ended.id, {**ended.info(), "deleted": True})

    def _on_change(self, changed: job.Job, moved: bool) -> None:
        """Called by the job, under the lock."""
        now = time.monotonic()
        if not moved and now - self._told.get(changed.id, 0.0) < PROGRESS_EVENT_S:
            return
        self._told[changed.id] = now
        info = changed.info()
        self._events.publish("job", changed.id, {**info, "deleted": False})
        if changed.final:
            self._ended.append(changed)
            self._told.pop(changed.id, None)
            self._changed.notify_all()
            for callback in self._callbacks.pop(changed.id, ()):
                callback(info)
