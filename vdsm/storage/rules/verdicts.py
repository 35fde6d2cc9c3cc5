"""The fate of the last work on an image or a VM, as any host can tell it from storage. The one place that judges.

The record says how far the work got; whether somebody is still at it is told by the owners of the data lease, by what
sanlock knows of their hosts, and, for this host's own work, by the agent's jobs:

    the record says     and                                            the verdict is
    done, failed, aborted, interrupted, fenced                         the same: nobody writes it any more
    wanted                                                             the same: nobody begins it but a fix
    queued              its host is in the lockspace, as it was then   queued; for this host: if its agent has the job
                        its host has gone, or joined anew              interrupted
    running, committing its host owns the data lease and lives         the same
                        its host does not own the data lease           interrupted
    any open state      its host is failing, or not known yet          unknown: judged when sanlock knows

A job that the record does not name is "superseded" when the record names another, and "absent" when it names none.
Neither says how it ended; absent is final only after a fence, since its request may still be on its way.

Pure. `reading.evidence` gathers what is judged, in an order that makes the verdict right; `holders.Holders.judge` adds
what the agent knows.
"""

from typing import Any, NamedTuple

from vdsm.storage.rules import models

QUEUED, RUNNING, COMMITTING = models.OPEN
DONE, FAILED, ABORTED, INTERRUPTED, FENCED = "done", "failed", "aborted", "interrupted", "fenced"
SUPERSEDED, ABSENT, UNKNOWN = "superseded", "absent", "unknown"

# Nothing that is going on now will change these.
_FINAL = frozenset({DONE, FAILED, ABORTED, INTERRUPTED, FENCED, SUPERSEDED, models.WANTED})
_ENDS = {"dead": "is dead", "free": "is not in the lockspace", "joined anew": "joined anew since"}
_MOMENT = "look again"


class Verdict(NamedTuple):
    """`reason` is for people, None where the state says it all."""

    state: str
    reason: str | None = None

    @property
    def final(self) -> bool:
        """False while the verdict may become another without anybody's doing."""
        return self.state in _FINAL

    def told(self) -> dict[str, Any]:
        return {"state": self.state, "final": self.final, "reason": self.reason}


class Here(NamedTuple):
    """The host that judges. `at_it`: its agent has the job of the record's work, and the job has not ended."""

    host_id: int
    boot_id: str
    at_it: bool


def judge(evidence: dict[str, Any], here: Here, job_id: str | None = None) -> Verdict:
    """The fate of the record's work or, when `job_id` is given, of that job. `evidence` as `reading.evidence`."""
    work = evidence["record"]["work"]
    if job_id is not None and (work is None or work["job_id"] != job_id):
        return _not_named(work)
    if work is None:
        return Verdict(ABSENT, "there has been no work yet")
    if work["state"] not in models.OPEN:
        return Verdict(work["state"])
    if work["host_id"] == here.host_id:
        return _own(work, evidence, here)
    if work["state"] == QUEUED:
        return _queued_elsewhere(work, evidence["hosts"])
    return _at_work_elsewhere(work, evidence)


def shown(work: dict[str, Any] | None, verdict: Verdict) -> dict[str, Any] | None:
    """The record's work with its fate for its state; where that cannot be told yet, what the record says."""
    return None if work is None else {**work, "state": work["state"] if verdict.state == UNKNOWN else verdict.state}


def _not_named(work: dict[str, Any] | None) -> Verdict:
    if work is None or work["job_id"] is None:
        return Verdict(ABSENT, "the record does not name it; that it never starts is final only after a fence")
    return Verdict(SUPERSEDED, f"the record names job {work['job_id']} ({work['state']}); this one cannot go on")


def _own(work: dict[str, Any], evidence: dict[str, Any], here: Here) -> Verdict:
    """Work of this host: its processes and jobs are known for sure."""
    state = work["state"]
    if work["boot_id"] != here.boot_id:
        return Verdict(INTERRUPTED, "this host was booted since")
    if here.at_it:
        return Verdict(state)
    if state == QUEUED:
        return Verdict(INTERRUPTED, "it was queued by an agent of this host that has ended")
    owners = evidence["owners"]
    if owners is None:
        return Verdict(UNKNOWN, f"sanlock does not tell who owns the data lease; {_MOMENT}")
    if here.host_id in _ids(owners):
        return Verdict(state)
    return Verdict(INTERRUPTED, _taken(owners) or "its worker has ended")


def _queued_elsewhere(work: dict[str, Any], hosts: list[dict[str, Any]] | None) -> Verdict:
    """Another host's queue cannot be seen; it is there as long as that host has not left the lockspace."""
    host_id = work["host_id"]
    alive = _lives(host_id, work.get("host_generation"), hosts)
    if alive.state == RUNNING:
        return Verdict(QUEUED, f"as far as can be seen from here: host {host_id} lives, and knows its queue")
    return alive


def _at_work_elsewhere(work: dict[str, Any], evidence: dict[str, Any]) -> Verdict:
    owners, host_id = evidence["owners"], work["host_id"]
    if owners is None:
        return Verdict(UNKNOWN, f"sanlock does not tell who owns the data lease; {_MOMENT}")
    owner = next((found for found in owners if found["host_id"] == host_id), None)
    if owner is None:
        return Verdict(INTERRUPTED, _taken(owners) or f"no process of host {host_id} owns the data lease")
    alive = _lives(host_id, owner["generation"], evidence["hosts"])
    return Verdict(work["state"]) if alive.state == RUNNING else alive


def _lives(host_id: int, generation: int | None, hosts: list[dict[str, Any]] | None) -> Verdict:
    """Running when the host is in the lockspace as it was then, interrupted when it is not, or unknown."""
    state = host_state(host_id, generation, hosts)
    if state == "unknown":
        return Verdict(UNKNOWN, f"this host does not know yet how host {host_id} is; {_MOMENT}")
    if state == "failing":
        return Verdict(UNKNOWN, f"host {host_id} is failing: it may come back, or be declared dead")
    if state == "live":
        return Verdict(RUNNING)
    return Verdict(INTERRUPTED, f"host {host_id} {_ENDS[state]}")


def host_state(host_id: int, generation: int | None, hosts: list[dict[str, Any]] | None) -> str:
    """How a host is that was in the lockspace with `generation`: live, failing or unknown, or one of the `_ENDS`.

    Each join gives a host another generation. sanlock shows every host that is or was in the lockspace, and a host
    shows there before it has joined: one that is not listed is not in it.
    """
    if hosts is None:
        return "unknown"
    found = next((known for known in hosts if known["host_id"] == host_id), None)
    if found is None:
        return "free"
    if generation is not None and found["generation"] > generation:
        return "joined anew"
    return str(found["state"])


def _taken(owners: list[dict[str, Any]]) -> str | None:
    """The lease of work that is over may be somebody else's by now: whoever mends it, or uses what is there."""
    return f"its data lease is held by host {', '.join(map(str, sorted(_ids(owners))))} now" if owners else None


def _ids(owners: list[dict[str, Any]]) -> set[int]:
    return {owner["host_id"] for owner in owners}
