"""Leases as callers see them: what one is, who has it, and taking its work away from whoever had it.

A lease is known by the id of its VM or image. A fence ends the work in the record, so that a worker that comes late
finds that the work is no longer its own and leaves; it also counts the generation, so that a request that comes late
is refused. It needs the data lease: nothing that lives is fenced.

Runs in a repository's I/O child.
"""

import contextlib
import os
import signal
from typing import Any

from vdsm import errors, leases, logs, record
from vdsm.storage.repository import LEASE_WAIT_S, Repository
from vdsm.storage.rules import chain, models, verdicts
from vdsm.storage.steps import reading

_log = logs.get("storage.fences")

Argument = dict[str, Any]


def lease(repo: Repository, argument: Argument) -> dict[str, Any]:
    """What is known of lease `lease_id`: {"kind", "slot", "version"} and `reading.evidence`, and "processes": those of
    this host that hold it, in words, or None.

    `version` counts its owners. Takes no lease. Raises `NoSuchLease`.
    """
    kind, slot = _place(repo, argument["lease_id"])
    try:
        evidence = reading.evidence(repo, slot, lambda: record.read(slot))
    except (errors.NoRecord, FileNotFoundError) as error:
        raise errors.NoSuchLease(lease_id=slot.name, repo_id=repo.repo_id) from error
    data = slot.data_lease()
    processes = leases.holder(data) if leases.local_pids(data) else None
    return {
        "kind": kind,
        "slot": list(slot),
        "version": leases.version(data, repo.sector_bytes),
        "processes": processes,
        **evidence,
    }


def _place(repo: Repository, lease_id: str) -> tuple[str, record.Slot]:
    if repo.find_vm(lease_id) is not None:
        return models.VM, repo.vm_slot(lease_id)
    if repo.find(lease_id) is not None:
        return "image", repo.slot(lease_id)
    raise errors.NoSuchLease(lease_id=lease_id, repo_id=repo.repo_id)


def fence(repo: Repository, session: leases.Session, argument: Argument) -> None:
    """Ends open work as "fenced", and counts the generation. argument: lease_id, generation and job_id (expected, or
    None); force: True accepts a record of unknown make.

    Work that a call does by itself, without a job, has no worker that could come late: it stays open, for whoever
    finishes it. So does work past its commit point, which is refused; a VM's job that claims its disks has come there.
    A repeated fence of the same job changes nothing.

    Killed: the record is as before, accepted, or fenced. Raises `LeaseHeld`, `GenerationMismatch`, `WorkCommitted`,
    `Superseded` (other work is open), `RecordNotOwned`, `NoSuchLease`.
    """
    _, slot = _place(repo, argument["lease_id"])
    with session.holding([slot.data_lease()], LEASE_WAIT_S):
        try:
            record.check_writer(slot)
        except errors.RecordNotOwned as error:
            if not argument.get("force", False):
                raise
            _fenced(record.read(slot), argument)  # what is refused is not accepted either
            _log.warning("audit: accepted by force: %s", error)
            record.adopt(session, slot)
        record.update(session, slot, lambda known: _fenced(known, argument))


def _fenced(known: record.Record, argument: Argument) -> record.Record | None:
    work, job_id = known["work"] or {}, argument["job_id"]
    state, named = work.get("state"), work.get("job_id")
    if state == verdicts.FENCED and job_id == named is not None:
        return None
    models.check_generation(known, argument["generation"])
    fenced = {**known, "generation": known["generation"] + 1}
    if named is None or state not in (*models.OPEN, verdicts.INTERRUPTED):
        return fenced
    if job_id not in (None, named):
        raise errors.Superseded(entity=known["id"], work=work)
    if state == verdicts.COMMITTING or chain.claim(known) is not None:
        raise errors.WorkCommitted(entity=known["id"], job_id=named)
    return {**fenced, "work": {**work, "state": verdicts.FENCED}}


def force(repo: Repository, argument: Argument) -> None:
    """Has the owner of the lease killed, and returns before it is dead. argument: lease_id.

    A process of this host is killed here: sanlock passes requests to other hosts only. Raises `LeaseHeld` when it is
    another user's, as QEMU is; `LeaseFailed`, `NoSuchLease`.
    """
    _, slot = _place(repo, argument["lease_id"])
    data = slot.data_lease()
    pids = leases.local_pids(data)
    if not pids:
        leases.force(data)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _kill(pid, data)


def _kill(pid: int, held: leases.Lease) -> None:
    fd = os.pidfd_open(pid)
    try:
        if pid in leases.local_pids(held):  # still: the pid has not become another's before it was opened
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except PermissionError as error:
        why = "not killed: it is not the agent's to kill; a VM is ended by VM.destroy"
        raise errors.LeaseHeld(state=why, resource=str(held), holder=leases.holder(held)) from error
    finally:
        os.close(fd)
