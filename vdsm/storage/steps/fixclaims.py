"""The request of a fix: what the caller holds is compared with what the repository needs now, and the work is claimed.

Runs in a repository's I/O child. A fix that came back from a caller is only a wish: all that is done is decided from
the records, read again under the leases.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from vdsm import errors, leases, record
from vdsm.storage.repository import LEASE_WAIT_S, Repository
from vdsm.storage.rules import chain, findings, models
from vdsm.storage.steps import checking

Argument = dict[str, Any]
Change = Callable[[record.Record], record.Record | None]


def begin_fix(repo: Repository, session: leases.Session, argument: Argument) -> Argument | None:
    """Commits a fix in the record that it is going to change; answers the job's argument, None: nothing is left to do.

    argument: fix, entity and guard (as in a finding), job_id, active and takeover (see `checking.survey`). The answer
    has what the job's kind needs besides `target`, and `before`, the work that the claim replaces. A repeated request
    of the same job is answered {"begun": job id}.

    Raises `FixOutdated`, `CannotMend`, `ImageBusy`, `ImageInUse`, `VmRuns`, `RecordNotOwned`. Killed: the work is
    claimed, "queued", or it is not.
    """
    fix, entity = argument["fix"], argument["entity"]
    found = _find(repo, argument, held=())
    if found is None:
        return _nothing(repo, argument)
    if found.obstacle is not None:
        raise errors.CannotMend(image_id=entity, reason=found.obstacle)
    with _holding(repo, session, found):
        found = _find(repo, argument, held=_concerned(found))
        if found is None:
            raise errors.FixOutdated(fix=fix, entity=entity, reason="it has just changed")
        for concerned in _concerned(found):
            record.check_writer(repo.vm_slot(concerned) if found.is_vm else repo.slot(concerned))
        return _claim(repo, session, found, argument["job_id"])


def _find(repo: Repository, argument: Argument, held: tuple[str, ...]) -> findings.Finding | None:
    """The finding that the caller means, as it is now. Raises `FixOutdated` when it is another by now."""
    survey = checking.survey(repo, argument["active"], takeover=argument["takeover"], held=held)
    found = findings.find(survey, argument["fix"], argument["entity"])
    if found is not None and found.guard != argument["guard"]:
        now = ", ".join(f"{name} is {found.guard.get(name)}" for name in _changed(found.guard, argument["guard"]))
        raise errors.FixOutdated(fix=found.fix, entity=found.entity, reason=now)
    return found


def _changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def _nothing(repo: Repository, argument: Argument) -> Argument | None:
    """What to answer when the finding is not there: it was begun, or is done, or the caller's picture is an old one."""
    fix, entity = argument["fix"], argument["entity"]
    where = _where(repo, argument)
    known = repo.find_vm(entity) if fix in (findings.MEND_VM, findings.CLEAN_VM_SLOT) else repo.find(where)
    if known is not None and (known["work"] or {}).get("job_id") == argument["job_id"]:
        return {"begun": argument["job_id"]}
    if known is not None and models.is_open(known):
        raise models.busy(known)
    reached = {
        findings.CLEAN_IMAGE: repo.find(entity) is None,
        findings.MERGE_IMAGE: repo.find(entity) is None,
        findings.CLEAN_LEFTOVERS: True,
        findings.CLEAN_VM_SLOT: True,
    }
    settled = known is not None and not known["deleted"] and known["status"] == _aim(known) and not chain.counts(known)
    if reached.get(fix, settled):
        return None
    reason = "it is gone" if known is None else f"it is {'deleted' if known['deleted'] else known['status']}"
    raise errors.FixOutdated(fix=fix, entity=entity, reason=reason)


def _aim(known: record.Record) -> str:
    return models.settled(known) if "data" in known else models.OPTIMIZED


def _where(repo: Repository, argument: Argument) -> str:
    """The image whose record carries the work: of a merge it is the upper one."""
    return str(argument["guard"].get("into", argument["entity"]))


# -- leases ----------------------------------------------------------------------------------------------------------


def _concerned(found: findings.Finding) -> tuple[str, ...]:
    into = found.guard.get("into")
    return (found.entity, into) if into else (found.entity,)


@contextlib.contextmanager
def _holding(repo: Repository, session: leases.Session, found: findings.Finding) -> Iterator[None]:
    """The data leases of what the fix changes. What a maker left that died early may have none yet: the fix's job
    gives it one, and looks again under that."""
    if found.fix in (findings.CLEAN_LEFTOVERS, findings.CLEAN_VM_SLOT):
        yield
    elif found.is_vm:
        try:
            with session.holding([repo.vm_slot(found.entity).data_lease()], LEASE_WAIT_S):
                yield
        except errors.LeaseHeld as error:
            raise errors.VmRuns(vm_id=found.entity, holder=error.facts["holder"]) from error
    else:
        with repo.owning(session, exclusive=_concerned(found)):
            yield


# -- the claim -------------------------------------------------------------------------------------------------------


def _claim(repo: Repository, session: leases.Session, found: findings.Finding, job_id: str) -> Argument:
    if found.type == findings.CLEAN:
        # Its record goes, and what that says already is enough to go on with.
        return {"entity": found.entity, "guard": found.guard}
    entity = found.guard.get("into", found.entity)
    slot = repo.vm_slot(entity) if found.is_vm else repo.slot(entity)
    before = record.read(slot)["work"]
    known = record.update(session, slot, _claiming(repo, found, job_id, slot))
    claimed = {"entity": entity, "generation": known["generation"], "before": before}
    if found.is_vm:
        return {**claimed, "committed": known["work"].get("committed", False)}
    below = [image["id"] for image in chain.down(entity, repo.find)[1:]]
    return {**claimed, "image_id": entity, "below": below, "names": known["work"]["names"]}


def _claiming(repo: Repository, found: findings.Finding, job_id: str, slot: record.Slot) -> Change:
    since = repo.host_generation(slot)
    expected = found.guard.get("into_generation", found.guard.get("generation"))

    def change(known: record.Record) -> record.Record:
        models.check_generation(known, expected)
        before = known["work"] or {}
        kind, names = _work(found, known)
        work = models.work(kind, repo.host_id, names, job_id=job_id, host_generation=since)
        committed = {"committed": True} if before.get("committed") and before["state"] != "done" else {}
        return {**known, "work": {**work, **committed}}

    return change


def _work(found: findings.Finding, known: record.Record) -> tuple[str, dict[str, Any]]:
    """(kind, names) of the work in the record: what is gone on with keeps both."""
    before = known["work"] or {}
    if found.fix == findings.MERGE_IMAGE:
        return found.fix, {"merged": found.entity}
    if found.fix == findings.OPTIMIZE_IMAGE:
        # The same name again takes the place of what a dead worker left.
        begun = before.get("kind") == found.fix and before["state"] != "done"
        return found.fix, {"data": before["names"]["data"] if begun else models.data_name(known["id"])}
    if found.fix in (*findings.FINISHED, findings.MEND_VM):
        return before["kind"], before["names"]
    # Work that has ended may still name a snapshot: taken over, it would be made again, over the disk's data.
    return found.fix, {}


def withdraw_fix(repo: Repository, session: leases.Session, argument: Argument) -> None:
    """Takes back the claim of a job that was refused. argument: entity, is_vm, job_id, before (the work before it)."""
    slot = repo.vm_slot(argument["entity"]) if argument["is_vm"] else repo.slot(argument["entity"])

    def change(known: record.Record) -> record.Record | None:
        mine = (known["work"]["job_id"], known["work"]["state"]) == (argument["job_id"], "queued")
        return {**known, "work": argument["before"]} if mine else None

    record.update(session, slot, change)
