r"""A job's leases, and its work in the record of the entity that it changes. Runs in the worker.

The work in the record goes

    queued --> running --> done
       |          |  \--> committing --> done
       |          v
       +-----> failed | aborted | interrupted

written by the worker alone, each time under the record lease and only while the record names this job. Whoever finds
"queued", "running" or "committing" and no owner of the data lease knows that the worker died there; "committing" is to
be rolled forward, everything else may be undone.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from vdsm import errors, leases, record

# The work has not ended: whoever holds the data lease and finds its own job's id may go on or end it.
OPEN = ("queued", "running", "committing", "interrupted")
WAIT_SLICE_S = 0.3  # how often a wait for somebody else's lease looks whether it still makes sense

Change = Callable[[record.Record], record.Record]


class Ledger:
    """`slot` is the entity's place, None for a job that changes nothing that has a record."""

    def __init__(self, job_id: str, slot: record.Slot | None) -> None:
        self.job_id = job_id
        self.slot = slot
        self.holding: list[leases.Lease] = []
        # Around each read-check-write of the worker's two threads. Whoever ends the process keeps it.
        self.lock = threading.RLock()
        self._session: leases.Session | None = None

    @property
    def session(self) -> leases.Session:
        """The main thread's registration, made when it is first needed. Raises `LeaseDaemonDown`."""
        if self._session is None:
            self._session = leases.Session()
        return self._session

    @property
    def fds(self) -> list[int]:
        """The registration's descriptor, for whoever writes on this job's behalf; none when nothing is held."""
        return [self.session.fd] if self.holding else []

    def hold(self, wanted: Sequence[leases.Lease], wait_s: float, check: Callable[[], None]) -> None:
        """Takes all of `wanted`, waiting up to `wait_s` for others to let go; `check` raises to give up waiting.

        Raises `LeaseHeld` with the holder's name, `LeaseNotReady`, `LeaseFailed`.
        """
        deadline = time.monotonic() + wait_s
        while wanted:
            check()
            left_s = deadline - time.monotonic()
            try:
                self.session.acquire(wanted, max(0.0, min(left_s, WAIT_SLICE_S)), patient=True)
            except errors.LeaseHeld:
                if left_s <= WAIT_SLICE_S:
                    raise
            else:
                self.holding = leases.ordered(wanted)
                break

    def let_go(self) -> None:
        """Gives the leases back: nothing that this job started can write any more."""
        held, self.holding = self.holding, []
        if held:
            self.session.release(held)

    def find(self) -> record.Record | None:
        """The record when its work is this job's, in whatever state; None when it is another's, or gone."""
        if self.slot is None:
            return {"work": {"job_id": self.job_id, "state": "running"}}
        try:
            known = record.read(self.slot)
        except (errors.NoRecord, FileNotFoundError):
            return None
        return known if self._names_me(known) else None

    def claim(self, generation: int | None, **work: Any) -> record.Record:
        """queued > running. Raises `Superseded` or, when `generation` is given and differs, `GenerationMismatch`."""

        def begin(known: record.Record) -> record.Record:
            if known["work"]["state"] != "queued":
                raise errors.Superseded(entity=known["id"], work=known["work"])
            if generation not in (None, known["generation"]):
                raise errors.GenerationMismatch(entity=known["id"], actual=known["generation"], expected=generation)
            return working(known, state="running", percent=None, error=None, **work)

        return self.write(begin)

    def write(self, change: Change) -> record.Record:
        """One read-check-write; returns the record. Raises `Superseded` when the work is not this job's any more."""

        def checked(known: record.Record) -> record.Record:
            if not self._names_me(known) or known["work"]["state"] not in OPEN:
                raise errors.Superseded(entity=known["id"], work=known.get("work"))
            return change(known)

        if self.slot is None:
            return {}
        with self.lock:
            return record.update(self.session, self.slot, checked)

    def finish(self, fields: Callable[[record.Record], dict[str, Any]]) -> None:
        """The result, the generation and the work's end in one atomic write. What was made is the record's own now, or
        another one's: ended work that went on naming it would keep it from being removed, or be taken for unfinished.
        """

        def end(known: record.Record) -> record.Record:
            result = {**known, **fields(known), "generation": known["generation"] + 1}
            return working(result, state="done", percent=100, error=None, names={})

        self.write(end)

    def end(self, state: str, error: dict[str, Any] | None, fields: dict[str, Any]) -> None:
        """The work's end without a result: "failed" or "aborted"."""
        self.write(lambda known: working({**known, **fields}, state=state, error=error))

    def interrupt(self) -> None:
        """The worker leaves with its agent. A commit that has begun stays one: it must be rolled forward.

        Called by the control thread, with the lock, which nobody gets any more. It registers for itself, for the main
        thread may be in the middle of a call on the other registration; a record lease held there is waited for.
        """

        def change(known: record.Record) -> record.Record | None:
            if not self._names_me(known) or known["work"]["state"] not in ("queued", "running"):
                return None
            return working(known, state="interrupted")

        if self.slot is not None:
            with leases.Session() as session:
                record.update(session, self.slot, change)

    def _names_me(self, known: record.Record) -> bool:
        return (known.get("work") or {}).get("job_id") == self.job_id


def working(known: record.Record, **fields: Any) -> record.Record:
    """The record with `fields` in its work."""
    return {**known, "work": {**known["work"], **fields}}
