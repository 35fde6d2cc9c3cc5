"""The worker process: one job, from its leases to the end of its work in the record.

How to write a job kind: `docs/jobs.md`. The order of steps is the same for all kinds:

    1  register with sanlock, take the leases                    a crash leaves the work "queued"
    2  reread the record: still mine, generation as expected     "
    3  record: work running                                      "running", nothing made yet
    4  run: stages, each ends with a record write                "running", stage and percent as last written
    5  flush the outputs                                         "
    6  record: result, generation + 1, work done                 "running" or "done"
    7  tidy up what nobody needs now                             "done"; the agent reads that from the record
    8  give the leases back, tell the agent                      "

After an abort or a failure the body undoes, and the record says "aborted" or "failed". After a crash the agent starts
another worker that does the same, with the leases taken again (`conclude`).
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from vdsm import channels, errors, leases, logs, record
from vdsm.jobs import context, control, fate, ledger

Context = context.Context
Argument = dict[str, Any]

_log = logs.get("jobs.worker")

UNDO_WAIT_S = 1.0  # for the body's own leases, when a job ends that never got all it wanted


class Body(abc.ABC):
    """What one kind of job does. Made anew in each worker; all it needs is in the request's argument."""

    job_type: ClassVar[str] = "storage"
    stages: ClassVar[Sequence[str]] = ()
    # Whether a fix can go on with what a stopped job leaves after `undo`: then its record stays, "interrupted".
    resumable: ClassVar[bool] = False

    @abc.abstractmethod
    def leases(self, argument: Argument) -> list[leases.Lease]:
        """What is held from the first step to the last: exclusive where data is written, shared where it is read."""

    @abc.abstractmethod
    def entity(self, argument: Argument) -> record.Slot | None:
        """The record that carries the job's work; None when the job changes nothing that has a record."""

    @abc.abstractmethod
    def run(self, ctx: Context) -> None:
        """The work. Raises what it likes; a VdsmError reaches the caller as it is."""

    @abc.abstractmethod
    def undo(self, ctx: Context) -> None:
        """Leaves nothing half made, after an abort, a failure or a death at any point of `run`, or before it.

        Runs with the exclusive leases held, perhaps in another process than `run`, and perhaps twice.
        """

    def outputs(self, argument: Argument) -> Sequence[str]:
        """Paths of the data that `run` writes: made durable before the record calls the work done."""
        return ()

    def commit(self, ctx: Context, known: record.Record) -> dict[str, Any]:
        """Fields of the final record besides work and generation. Quick and pure: runs under the record lease."""
        return {}

    def aborted(self, ctx: Context, known: record.Record) -> dict[str, Any] | None:
        """Called after `undo` of an aborted job: fields for the record, or None when this removed the record."""
        return {}

    def after(self, ctx: Context) -> None:  # noqa: B027 - most bodies leave nothing
        """Takes away what nobody needs now that the record says done; the leases are still held.

        A crash before or in it, or a failure, which is only logged, leaves that to a check of the repository.
        """

    def roll_forward(self, ctx: Context) -> None:
        """Goes on after `ctx.commit`, in another process, perhaps twice. Needed by bodies that call that."""
        raise NotImplementedError


_Body = TypeVar("_Body", bound=Body)
_bodies: dict[str, type[Body]] = {}


def body(kind: str) -> Callable[[type[_Body]], type[_Body]]:
    """Registers the class as what jobs of `kind` do, when its module is imported (preloaded in the fork server)."""

    def register(found: type[_Body]) -> type[_Body]:
        if kind in _bodies:
            raise TypeError(f"two bodies for jobs of kind {kind}")
        _bodies[kind] = found
        return found

    return register


def bodies() -> dict[str, type[Body]]:
    """What is registered in this process, by kind."""
    return dict(_bodies)


def run(order: dict[str, Any], channel: channels.Channel) -> None:
    """The fork server's target. `order`: job_id, kind, argument, lease_wait_s, and for a conclusion the verdict
    {"state", "error", "stopped"}.

    Says how far it is ({"progress": ...}), answers an abort ({"aborting"} or {"refused"}), and says once how the job
    ended ({"ended": state, "error": error}), after the record says the same and the leases are free.
    """
    with logs.about(f"job {order['job_id']}"):
        body = _bodies[order["kind"]]()
        course = fate.Fate()
        books = ledger.Ledger(order["job_id"], body.entity(order["argument"]))
        control.Control(channel, course, books).start()
        ctx = Context(order["argument"], body.stages, channel, course, books)
        work = _Work(body, ctx, course, books, order["lease_wait_s"])
        verdict = order.get("verdict")
        state, error = work.do() if verdict is None else work.conclude(**verdict)
        try:
            books.let_go()
        except errors.VdsmError as refused:  # the end of this process frees them
            _log.warning("%s", refused)
        channel.send({"ended": state, "error": error})


_Ended = tuple[str, dict[str, Any] | None]


class _Work:
    """The steps above, for one body."""

    def __init__(self, body: Body, ctx: Context, course: fate.Fate, books: ledger.Ledger, lease_wait_s: float) -> None:
        self._body = body
        self._ctx = ctx
        self._fate = course
        self._ledger = books
        self._lease_wait_s = lease_wait_s

    def do(self) -> _Ended:
        """Steps 1 to 6. Returns how it ended, which the record says too if it could be written."""
        argument = self._ctx.argument
        try:
            self._ledger.hold(self._body.leases(argument), self._lease_wait_s, self._fate.check)
            self._ctx.begin(argument.get("generation"))
            self._body.run(self._ctx)
            self._finish()
        except errors.Superseded as error:  # the record is another's, and so is the data
            return "failed", error.to_wire()
        except errors.Aborted:
            return self._end("aborted", None)
        except Exception as error:  # noqa: BLE001 - the border of the body
            return self._end("failed", _told(error))
        return "done", None

    def conclude(self, state: str, error: dict[str, Any] | None, stopped: bool) -> _Ended:
        """Ends the work of a dead worker, or of a job that never began: as `state`, unless the record knows better.

        Runs after the last process of that worker is gone.
        """
        self._fate.begin_undo(stopped)
        try:
            self._ledger.hold(self._body.leases(self._ctx.argument), self._lease_wait_s, self._fate.check)
        except errors.VdsmError as refused:
            _log.warning("concluding without all leases: %s", refused)
        return self._end(state, error)

    def _finish(self) -> None:
        for path in self._body.outputs(self._ctx.argument):
            self._ctx.flush(path)
        self._fate.commit()
        self._ledger.finish(lambda known: self._body.commit(self._ctx, known))
        try:
            self._body.after(self._ctx)
        except Exception:  # noqa: BLE001 - the border of the body: its work is done all the same
            _log.exception("done, but not tidied up")

    def _end(self, state: str, error: dict[str, Any] | None) -> _Ended:
        self._fate.begin_undo()
        if state == "aborted" and self._fate.stopped and self._body.resumable:
            ended, error = self._end("interrupted", errors.Stopped().to_wire())
            return "aborted" if ended == "interrupted" else ended, error  # the job ends, its work waits
        try:
            return self._settle(state, error)
        except Exception as failure:  # noqa: BLE001 - the border of the body's undo, and storage that is gone
            return state, error or _told(failure)

    def _settle(self, state: str, error: dict[str, Any] | None) -> _Ended:
        """Undoes or rolls forward what the record says is there, and writes how the work ended."""
        owned = self._own()
        known = self._ledger.find()
        if known is None:  # removed already, or taken over: nothing here is this job's
            return state, error
        found = known["work"]["state"]
        if found not in ledger.OPEN:
            return _final(known)
        if found == "committing":
            if owned:
                self._body.roll_forward(self._ctx)
                self._finish()
                return "done", None
            return "failed", error
        fields: dict[str, Any] | None = {}
        if owned:
            error, fields = self._undo(state, error, known)
        if fields is not None:
            self._ledger.end(state, error, fields)
        return state, error

    def _own(self) -> bool:
        """Holds the leases for writing: those that the work began with, or the body's exclusive ones now."""
        own = [lease for lease in self._body.leases(self._ctx.argument) if not lease.shared]
        if not self._ledger.holding:
            try:
                self._ledger.hold(own, UNDO_WAIT_S, self._fate.check)
            except errors.VdsmError as refused:
                _log.warning("not undone: %s", refused)
                return False
        return True

    def _undo(
        self, state: str, error: dict[str, Any] | None, known: record.Record
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(what went wrong first, fields for the record or None when there is no record any more)."""
        try:
            self._body.undo(self._ctx)
            return error, self._body.aborted(self._ctx, known) if state == "aborted" else {}
        except Exception as failure:  # noqa: BLE001 - the record must say how the work ended all the same
            return error or _told(failure), {}


def _told(error: Exception) -> dict[str, Any]:
    """The error as it crosses to the agent; a failure without a name is logged here, and only its kind crosses."""
    if isinstance(error, errors.VdsmError):
        _log.warning("%s", error)
        return error.to_wire()
    _log.exception("unexpected failure", exc_info=error)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return errors.Unexpected(reason=reason).to_wire()


def _final(known: record.Record) -> _Ended:
    """How the record says the work ended, whoever wrote that."""
    work = known["work"]
    if work["state"] in ("done", "failed", "aborted"):
        return work["state"], work.get("error")
    return "failed", errors.Superseded(entity=known["id"], work=work).to_wire()
