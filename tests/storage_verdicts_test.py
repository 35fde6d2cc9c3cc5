"""The fate of work: the table, row by row (traps 22, 23, 24)."""

from typing import Any

import pytest

from vdsm.storage.rules import verdicts

HERE, OTHER = 1, 7
BOOT = "this life"


def hosts(state: str, generation: int = 3) -> list[dict[str, Any]]:
    """What this host's sanlock knows: itself, and the other one as told."""
    own = {"host_id": HERE, "generation": 5, "state": "live"}
    return [own] if state == "unlisted" else [own, {"host_id": OTHER, "generation": generation, "state": state}]


def judge(
    state: str,
    *,
    by: int = HERE,
    owners: dict[int, int] | None,
    known: list[dict[str, Any]] | None = None,
    boot: str = BOOT,
    at_it: bool = False,
    job_id: str | None = None,
) -> str:
    """The verdict on work in `state`; `owners` is {host id: generation}."""
    work = {"job_id": "its job", "host_id": by, "boot_id": boot, "host_generation": 3, "state": state}
    found = None if owners is None else [{"host_id": host, "generation": since} for host, since in owners.items()]
    evidence = {"record": {"work": work}, "owners": found, "hosts": known}
    verdict = verdicts.judge(evidence, verdicts.Here(HERE, BOOT, at_it), job_id)
    assert verdict.state in ("done", "failed", "aborted", "interrupted", "fenced", "superseded") or not verdict.final
    return verdict.state


@pytest.mark.parametrize("state", ["done", "failed", "aborted", "interrupted", "fenced"])
def test_what_has_ended_is_as_the_record_says(state: str) -> None:
    for by in (HERE, OTHER):
        assert judge(state, by=by, owners=None) == state
        assert judge(state, by=by, owners={OTHER: 3}, known=hosts("live")) == state


@pytest.mark.parametrize("state", ["queued", "running", "committing"])
@pytest.mark.parametrize(
    ("owners", "given", "verdict"),
    [
        pytest.param({}, {"at_it": True}, "open", id="its agent has the job"),
        pytest.param({}, {}, "interrupted", id="no agent has it, nobody owns the lease"),
        pytest.param({OTHER: 3}, {}, "interrupted", id="another host owns the lease"),
        pytest.param({HERE: 5}, {"boot": "the life before"}, "interrupted", id="booted since"),
    ],
)
def test_work_of_this_host(state: str, owners: dict[int, int], given: dict[str, Any], verdict: str) -> None:
    assert judge(state, owners=owners, **given) == (state if verdict == "open" else verdict)


@pytest.mark.parametrize("state", ["running", "committing"])
def test_worker_that_outlives_its_agent_is_at_it(state: str) -> None:
    assert judge(state, owners={HERE: 5}) == state
    assert judge(state, owners=None) == "unknown"


HOSTS: dict[str, tuple[list[dict[str, Any]] | None, str]] = {
    "live": (hosts("live"), "open"),
    "joined anew": (hosts("live", 4), "interrupted"),
    "failing": (hosts("failing"), "unknown"),
    "not known yet": (hosts("unknown"), "unknown"),
    "dead": (hosts("dead"), "interrupted"),
    "left": (hosts("free"), "interrupted"),
    "never seen": (hosts("unlisted"), "interrupted"),
    "nobody is known": (None, "unknown"),
}


@pytest.mark.parametrize("state", ["queued", "running", "committing"])
@pytest.mark.parametrize("other", HOSTS)
def test_work_of_another_host(state: str, other: str) -> None:
    known, verdict = HOSTS[other]
    owners = {} if state == "queued" else {OTHER: 3}
    assert judge(state, by=OTHER, owners=owners, known=known) == (state if verdict == "open" else verdict)


@pytest.mark.parametrize("state", ["running", "committing"])
def test_work_whose_host_lost_the_lease(state: str) -> None:
    """Whatever its host is: its writer has gone."""
    for owners in ({}, {HERE: 5}, {9: 1}):
        assert judge(state, by=OTHER, owners=owners, known=hosts("live")) == "interrupted"
    assert judge(state, by=OTHER, owners=None, known=hosts("live")) == "unknown"


def test_another_job_is_asked_for() -> None:
    for state in ("queued", "done"):
        assert judge(state, owners={}, job_id="another") == "superseded"
    assert judge("done", owners={}, job_id="its job") == "done"
    nothing = {"record": {"work": None}, "owners": [], "hosts": None}
    assert verdicts.judge(nothing, verdicts.Here(HERE, BOOT, False), "another").state == "absent"
    assert not verdicts.judge(nothing, verdicts.Here(HERE, BOOT, False), "another").final
