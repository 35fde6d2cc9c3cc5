"""Job states and the registry: moves, requests, events, waiting, and what ended jobs cost. No worker runs here."""

import asyncio
import threading
import tracemalloc
from typing import Any

import pytest

from vdsm import errors, events, forkserver, ids
from vdsm.jobs import job, pool, registry

Status = job.Status


class Hands(pool.Pool):
    """A pool whose jobs are moved by the test. It is never started."""

    def __init__(self, queue: int = 100) -> None:
        super().__init__(forkserver.ForkServer([]), queue=queue)
        self.jobs: dict[str, job.Job] = {}

    def submit(self, new: job.Job) -> None:
        super().submit(new)
        self.jobs[new.id] = new


class Desk:
    def __init__(self, **options: Any) -> None:
        self.hands = Hands(queue=20_000)
        self.events = events.EventLog()
        self.jobs = registry.Registry(self.hands, self.events, **options)

    def add(self, **given: Any) -> job.Job:
        wanted = request(**given)
        self.jobs.add(wanted)
        return self.hands.jobs[wanted.job_id]

    def told(self, subject: job.Job) -> list[tuple[str, int | None]]:
        happened, _ = self.events.since(self.events.instance_id, 0)
        assert {event.topic for event in happened} <= {"job"}
        return [(event.params["status"], event.params["progress"]) for event in happened if event.subject == subject.id]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def request(**given: Any) -> job.JobRequest:
    defaults = {
        "kind": "probe",
        "job_id": ids.new(),
        "job_type": "storage",
        "description": "a probe",
        "entity": {"type": "image", "id": "i", "repo_id": "r"},
        "argument": {"path": "/data"},
    }
    return job.JobRequest(**(defaults | given))


def at(status: Status) -> job.Job:
    """A job in the state."""
    ways = {
        Status.PENDING: [],
        Status.RUNNING: [Status.RUNNING],
        Status.DONE: [Status.RUNNING, Status.DONE],
        Status.FAILED: [Status.RUNNING, Status.FAILED],
        Status.ABORTING: [Status.RUNNING, Status.ABORTING],
        Status.ABORTED: [Status.ABORTED],
    }
    made = job.Job(request())
    for step in ways[status]:
        made.move(step)
    return made


# -- states ----------------------------------------------------------------------------------------------------------

ALLOWED = {
    ("pending", "running"),
    ("pending", "aborted"),
    ("running", "done"),
    ("running", "failed"),
    ("running", "aborting"),
    ("aborting", "aborted"),
}


@pytest.mark.parametrize("origin", Status)
@pytest.mark.parametrize("goal", Status)
def test_only_the_moves_of_the_table(origin: Status, goal: Status) -> None:
    it = at(origin)
    if (origin, goal) in ALLOWED:
        it.move(goal)
        assert it.status is goal
    else:
        with pytest.raises(RuntimeError, match=f"from {origin} to {goal}"):
            it.move(goal)
        assert it.status is origin


@pytest.mark.parametrize("status", Status)
def test_final_states_have_an_end(status: Status) -> None:
    it = at(status)
    assert it.final == (status in ("done", "failed", "aborted"))
    assert (it.info()["ended"] is not None) == it.final


@pytest.mark.parametrize(
    ("origin", "outcome", "final"),
    [
        ("running", "done", "done"),
        ("running", "failed", "failed"),
        ("running", "aborted", "aborted"),
        ("aborting", "aborted", "aborted"),
        ("aborting", "failed", "aborted"),
        ("pending", "aborted", "aborted"),
        ("pending", "failed", "aborted"),
    ],
)
def test_an_outcome_means_a_final_state(origin: str, outcome: str, final: str) -> None:
    it = at(Status(origin))
    error = errors.Superseded(entity="i", work=None).to_wire()
    it.end(Status(outcome), error)
    assert (it.status, it.info()["error"]) == (final, error)


def test_info_tells_everything() -> None:
    it = job.Job(request(job_id="j"))
    it.move(Status.RUNNING)
    it.report(40, 2, 3, "convert")
    info = it.info()
    assert info.pop("created") <= info.pop("started")
    assert info == {
        "id": "j",
        "kind": "probe",
        "status": "running",
        "description": "a probe",
        "job_type": "storage",
        "progress": 40,
        "stage": 2,
        "stages": 3,
        "stage_name": "convert",
        "detail": None,
        "error": None,
        "entity": {"type": "image", "id": "i", "repo_id": "r"},
        "ended": None,
    }


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (job.Wait("joining", 12.4), "joining (about 12 s left)"),
        (job.Wait("the repository does not answer"), "the repository does not answer"),
    ],
)
def test_a_wait_in_words(wait: job.Wait, words: str) -> None:
    assert str(wait) == words


# -- requests --------------------------------------------------------------------------------------------------------


def test_the_same_request_again_is_the_same_job(desk: Desk) -> None:
    first = desk.add(job_id="j")
    first.move(Status.RUNNING)
    assert desk.jobs.add(request(job_id="j"))["status"] == "running"
    assert len(desk.jobs.list()) == 1


@pytest.mark.parametrize(
    "other", [{"kind": "copy"}, {"argument": {"path": "/other"}}, {"entity": {"type": "vm", "id": "v", "repo_id": "r"}}]
)
def test_another_request_with_the_same_id_is_refused(desk: Desk, other: dict[str, Any]) -> None:
    desk.add(job_id="j")
    with pytest.raises(errors.JobExists):
        desk.jobs.add(request(job_id="j", **other))


def test_a_request_may_say_what_makes_it_the_same(desk: Desk) -> None:
    """A retried verb makes up new data names; the caller asked for the same thing."""
    desk.add(job_id="j", identity=["copy", "a", "b"], argument={"data_name": ids.new()})
    desk.jobs.add(request(job_id="j", identity=["copy", "a", "b"], argument={"data_name": ids.new()}))
    with pytest.raises(errors.JobExists):
        desk.jobs.add(request(job_id="j", identity=["copy", "a", "c"], argument={"data_name": ids.new()}))


# -- listing, deleting, forgetting -----------------------------------------------------------------------------------


def test_list_by_type_and_ids(desk: Desk) -> None:
    kinds = [desk.add(job_type=job_type).id for job_type in ("storage", "virt", "storage")]

    def found(*given: Any) -> list[str]:
        return [info["id"] for info in desk.jobs.list(*given)]

    assert found() == kinds
    assert found("virt") == [kinds[1]]
    assert found(None, [kinds[2], "unknown"]) == [kinds[2]]
    assert found("virt", [kinds[0]]) == []


@pytest.mark.parametrize("moves", [[], ["running"], ["running", "aborting"]])
def test_only_ended_jobs_can_be_deleted(desk: Desk, moves: list[str]) -> None:
    it = desk.add()
    for move in moves:
        it.move(Status(move))
    with pytest.raises(errors.JobNotDone):
        desk.jobs.delete(it.id)
    it.end(Status.ABORTED, None)
    desk.jobs.delete(it.id)
    with pytest.raises(errors.NoSuchJob):
        desk.jobs.get(it.id)
    with pytest.raises(errors.NoSuchJob):
        desk.jobs.delete(it.id)


@pytest.mark.parametrize("status", ["done", "failed", "aborted"])
def test_an_ended_job_cannot_be_aborted(desk: Desk, status: str) -> None:
    it = desk.add()
    it.move(Status.RUNNING)
    it.end(Status(status), None)
    with pytest.raises(errors.JobNotActive):
        desk.jobs.abort(it.id)


def test_ended_jobs_are_forgotten_after_their_time() -> None:
    desk = Desk(autodelete_s=0)
    ended, living = desk.add(), desk.add()
    ended.move(Status.RUNNING)
    ended.move(Status.DONE)
    assert [info["id"] for info in desk.jobs.list()] == [living.id]
    with pytest.raises(errors.NoSuchJob):
        desk.jobs.get(ended.id)


def test_ten_thousand_ended_jobs_stay_below_20_mib() -> None:
    desk = Desk()
    desk.events = events.EventLog(capacity=1)
    desk.jobs = registry.Registry(desk.hands, desk.events)
    desk.hands.submit = lambda new: new.announce()  # type: ignore[method-assign]  # nobody would take them out again
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(10_000):
            wanted = request(
                argument={"slot": ["repository", ids.new(), f"/some/where/{number}", 0], "steps": ["x" * 1000]},
                entity={"type": "image", "id": ids.new(), "repo_id": "main"},
                description=f"copy image {ids.new()} to repository main",
            )
            desk.jobs.add(wanted)
            it = desk.jobs._jobs[wanted.job_id]
            it.move(Status.RUNNING)
            it.report(50, 1, 2, "convert")
            it.move(Status.FAILED, errors.ToolFailed(program="qemu-img", exit_code=1, reason=f"no space for {number}"))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(desk.jobs.list()) == 10_000
    assert after - before < 20 << 20, f"{(after - before) >> 20} MiB"


# -- events and waiting ----------------------------------------------------------------------------------------------


def test_each_state_is_told_at_once_and_progress_once_a_second(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(registry.time, "monotonic", lambda: now[0])  # the second must pass without waiting for it
    it = desk.add()
    it.move(Status.RUNNING)
    for percent in range(10):
        it.report(percent)
    now[0] += registry.PROGRESS_EVENT_S
    for percent in range(10, 20):
        it.report(percent)
    it.report(20, 2, 2, "second")
    it.move(Status.DONE)
    assert desk.told(it) == [
        ("pending", None),
        ("running", None),
        ("running", 10),
        ("running", 20),
        ("done", 100),
    ]


def test_events_come_in_the_order_of_what_they_tell(desk: Desk) -> None:
    it = desk.add()
    it.move(Status.RUNNING)
    it.move(Status.ABORTING)
    it.move(Status.ABORTED)
    assert [status for status, _ in desk.told(it)] == ["pending", "running", "aborting", "aborted"]


def test_wait_returns_the_ended_job(desk: Desk) -> None:
    it = desk.add()
    it.move(Status.RUNNING)
    ender = threading.Timer(0.05, it.move, [Status.DONE])
    ender.start()
    assert desk.jobs.wait(it.id, 10)["status"] == "done"
    ender.join()
    assert desk.jobs.wait(it.id, 10)["status"] == "done"


def test_wait_that_is_too_short_returns_the_job_as_it_is(desk: Desk) -> None:
    assert desk.jobs.wait(desk.add().id, 0.01)["status"] == "pending"


def test_waiting_for_a_job_that_is_not_there(desk: Desk) -> None:
    with pytest.raises(errors.NoSuchJob):
        desk.jobs.wait("nobody", 1)
    with pytest.raises(errors.NoSuchJob):
        desk.jobs.on_end("nobody", lambda info: None)


def test_the_loop_can_wait_without_a_thread(desk: Desk) -> None:
    async def wait(job_id: str) -> job.Info:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[job.Info] = loop.create_future()
        desk.jobs.on_end(job_id, lambda info: loop.call_soon_threadsafe(ended.set_result, info))
        return await asyncio.wait_for(ended, 10)

    it = desk.add()
    it.move(Status.RUNNING)
    ender = threading.Timer(0.05, it.move, [Status.DONE])
    ender.start()
    assert asyncio.run(wait(it.id))["status"] == "done"
    ender.join()
    assert asyncio.run(wait(it.id))["status"] == "done", "at once when it has ended already"


def test_a_wait_can_be_taken_back(desk: Desk) -> None:
    it, called = desk.add(), []
    desk.jobs.on_end(it.id, called.append)()
    it.move(Status.ABORTED)
    assert called == []
