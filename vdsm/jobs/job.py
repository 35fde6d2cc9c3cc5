"""A host job as the agent sees it: what was asked for, and how far it is.

    pending --> running --> done
       |           |  \\--> failed
       |           v
       |        aborting
       v           v
     aborted    aborted

A job is a view of one process on this host and is not persisted. What happened to the image or VM stands in its
record; the job's final state is read from there when its worker could not say.
"""

import enum
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vdsm import errors

Info = dict[str, Any]


class Status(enum.StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTING = "aborting"
    ABORTED = "aborted"


# Every move there is. A state without moves is final.
MOVES: Mapping[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.RUNNING, Status.ABORTED}),
    Status.RUNNING: frozenset({Status.DONE, Status.FAILED, Status.ABORTING}),
    Status.ABORTING: frozenset({Status.ABORTED}),
    Status.DONE: frozenset(),
    Status.FAILED: frozenset(),
    Status.ABORTED: frozenset(),
}


class Wait(NamedTuple):
    """Why a job cannot start yet; `seconds_left` is an estimate."""

    reason: str
    seconds_left: float | None = None

    def __str__(self) -> str:
        return self.reason if self.seconds_left is None else f"{self.reason} (about {self.seconds_left:.0f} s left)"


# Asked in any thread and under the pool's lock: answers from memory, at once. A VdsmError ends the job.
Gate = Callable[[], Wait | None]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What is to be done. `kind` names the body; `argument` is JSON and holds all that the body needs.

    `argument["generation"]`, when it is there and not None, is the generation that the entity's record must have.
    `gate` answers why the job cannot start yet, None when it can. `identity` is what makes two requests with one
    job id the same request; left out, it is the argument: give it when the argument holds names made up anew.
    """

    kind: str
    job_id: str
    job_type: str
    description: str
    entity: dict[str, str]
    argument: dict[str, Any]
    gate: Gate | None = None
    identity: Any = None

    @property
    def digest(self) -> str:
        """SHA-256 over what makes this request this request."""
        told = [self.kind, self.job_type, self.entity, self.argument if self.identity is None else self.identity]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


_FORGOTTEN: dict[str, Any] = {}


@dataclass(slots=True)
class _Progress:
    percent: int | None = None  # -1: the work goes on, but does not tell how far it is
    stage: int | None = None  # from 1
    stages: int | None = None
    stage_name: str | None = None


@dataclass(slots=True)
class _Times:
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None


class Job:
    """One job. Methods may be called from any thread; `changed(job, moved)` runs under `lock`, in the caller's thread.

    `moved` is true for a new state, a new stage or a new reason to wait, false for mere progress.
    """

    __slots__ = ("_changed", "_detail", "_digest", "_error", "_lock", "_progress", "_request", "_status", "_times")

    def __init__(
        self,
        request: JobRequest,
        lock: "threading.RLock | None" = None,
        changed: Callable[["Job", bool], None] = lambda job, moved: None,
    ) -> None:
        self._request = request
        self._digest = request.digest
        self._lock = lock or threading.RLock()
        self._changed = changed
        self._status = Status.PENDING
        self._detail: str | None = None
        self._error: dict[str, Any] | None = None
        self._progress = _Progress()
        self._times = _Times()

    @property
    def id(self) -> str:
        return self._request.job_id

    @property
    def request(self) -> JobRequest:
        """What was asked for; the argument and the gate of an ended job are forgotten."""
        return self._request

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def status(self) -> Status:
        return self._status

    @property
    def final(self) -> bool:
        return not MOVES[self._status]

    @property
    def ended(self) -> float | None:
        return self._times.ended

    def announce(self) -> None:
        """The job exists: the first thing told of it."""
        with self._lock:
            self._changed(self, True)

    def move(self, status: Status, error: errors.VdsmError | dict[str, Any] | None = None) -> None:
        """Goes to `status`, with the error that led there. Raises RuntimeError for a move that is not in the table."""
        with self._lock:
            if status not in MOVES[self._status]:
                raise RuntimeError(f"job {self.id} cannot go from {self._status} to {status}")
            self._status = status
            self._detail = None
            if error is not None:
                self._error = error.to_wire() if isinstance(error, errors.VdsmError) else error
            if status is Status.RUNNING:
                self._times.started = time.time()
            if self.final:
                self._settle()
            self._changed(self, True)

    def end(self, outcome: Status, error: dict[str, Any] | None) -> None:
        """Goes to the final state that `outcome` (done, failed or aborted) means where the job stands.

        Whatever ends a job that never ran, or one that is aborting, it is aborted then; the error tells the rest.
        """
        with self._lock:
            if self._status is Status.RUNNING and outcome is Status.ABORTED:
                self.move(Status.ABORTING)
            self.move(outcome if self._status is Status.RUNNING else Status.ABORTED, error)

    def report(
        self, percent: int | None, stage: int | None = None, stages: int | None = None, stage_name: str | None = None
    ) -> None:
        """How far the work is: -1 when it does not tell."""
        with self._lock:
            moved = (self._progress.stage, self._progress.stage_name) != (stage, stage_name)
            self._progress = _Progress(percent, stage, stages, stage_name)
            self._changed(self, moved)

    def explain(self, detail: str | None) -> None:
        """Says in words why the job is where it is, until it moves. A reason that merely changes is progress."""
        with self._lock:
            if detail != self._detail:
                known, self._detail = self._detail, detail
                self._changed(self, known is None or detail is None)

    def info(self) -> Info:
        """Everything there is to tell, as JSON. Times are in seconds since 1970."""
        with self._lock:
            request, progress, times = self._request, self._progress, self._times
            return {
                "id": self.id,
                "kind": request.kind,
                "status": str(self._status),
                "description": request.description,
                "job_type": request.job_type,
                "progress": progress.percent,
                "stage": progress.stage,
                "stages": progress.stages,
                "stage_name": progress.stage_name,
                "detail": self._detail,
                "error": self._error,
                "entity": request.entity,
                "created": times.created,
                "started": times.started,
                "ended": times.ended,
            }

    def _settle(self) -> None:
        """An ended job is kept for an hour: without what only its worker needed."""
        self._times.ended = time.time()
        known = self._request
        self._request = JobRequest(
            known.kind, known.job_id, known.job_type, known.description, known.entity, _FORGOTTEN
        )
        if self._status is Status.DONE:
            self._progress.percent = 100
