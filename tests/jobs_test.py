"""Jobs on a real sanlock: what a worker holds, what its record says, and how it ends, whoever dies when."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import jobs_fixture, sanlock_fixture
from tests.jobs_fixture import free
from tests.until import exists, opened, running, until, zombie
from vdsm import errors, forkserver, ids, leases, record
from vdsm.jobs import control, job, pool

storage = sanlock_fixture.storage

# A tool that no parent-death signal ends: what a tool is that was started in the moment its worker died.
IMMORTAL = ["setpriv", "--pdeathsig", "clear", "sh", "-c", "echo $$; exec sleep 60"]


@pytest.fixture(scope="module")
def server(storage: sanlock_fixture.Storage) -> Iterator[forkserver.ForkServer]:
    server = forkserver.ForkServer(jobs_fixture.PRELOADED)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def host(server: forkserver.ForkServer) -> Iterator[jobs_fixture.Host]:
    with jobs_fixture.hosting(server) as host:
        yield host


@pytest.fixture
def probe(storage: sanlock_fixture.Storage, tmp_path: Path) -> Any:
    def make(*steps: list[Any], **given: Any) -> jobs_fixture.Probe:
        directory = tmp_path / ids.new()
        directory.mkdir()
        return jobs_fixture.Probe(storage, directory, list(steps), **given)

    return make


def worker_of(probe: jobs_fixture.Probe) -> int:
    """The pid that holds the probe's data lease."""
    until(lambda: leases.local_pids(probe.slot.data_lease()))
    (pid,) = leases.local_pids(probe.slot.data_lease())
    return pid


def tool_of(probe: jobs_fixture.Probe) -> int:
    """The pid that the tool printed, once it has become what it is to be."""
    until(lambda: any(word.isdigit() for word in probe.journal))
    pid = next(int(word) for word in probe.journal if word.isdigit())
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
    return pid


@contextlib.contextmanager
def holding(lease: leases.Lease) -> Iterator[leases.Session]:
    """This process holds the lease, as another job's worker or a VM would."""
    with leases.Session() as session:
        session.acquire([lease], 5)
        yield session


# -- the straight way ------------------------------------------------------------------------------------------------


def test_a_job_ends_in_one_record_write_with_result_and_generation(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["stage", "first"], ["progress", 40], ["stage", "second"], ["tool", "echo", "hello"])
    info = host.run(it)
    assert host.states(it) == ["pending", "running", "done"]
    assert (info["status"], info["progress"], info["error"]) == ("done", 100, None)
    assert it.record["result"] == "made"
    assert it.record["generation"] == 8
    assert it.work["state"] == "done"
    assert it.journal == ["run", "hello"]
    assert it.record["version"] == 5, "queued, running, second stage, done: each one write, the first one two"


def test_the_leases_are_free_when_the_job_is_reported_done(host: jobs_fixture.Host, probe: Any) -> None:
    for _ in range(5):
        it = probe()
        host.run(it)
        with leases.Session() as session:
            session.acquire([it.slot.data_lease()], 0)


def test_shared_leases_let_two_jobs_read_one_source(
    host: jobs_fixture.Host, probe: Any, storage: sanlock_fixture.Storage
) -> None:
    source = [list(storage.slot(ids.new()).data_lease(shared=True))]
    both = [probe(["pause", "here"], shared=source) for _ in range(2)]
    for it in both:
        host.jobs.add(it.request)
    for it in both:
        it.reached("here")
    for it in both:
        it.go("here")
        assert host.end(it)["status"] == "done"


def test_stages_and_percents_reach_the_agent(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["stage", "first"], ["progress", -1], ["pause", "one"], ["stage", "second"], ["pause", "two"])
    host.jobs.add(it.request)
    it.reached("one")
    until(lambda: host.jobs.get(it.job_id)["stage_name"] == "first")
    it.go("one")
    it.reached("two")
    until(lambda: host.jobs.get(it.job_id)["stage_name"] == "second")
    info = host.jobs.get(it.job_id)
    assert (info["stage"], info["stages"]) == (2, 2)
    assert (it.work["stage"], it.work["stages"], it.work["stage_name"], it.work["state"]) == (2, 2, "second", "running")
    it.go("two")
    host.end(it)


def test_a_job_without_a_record_runs_too(host: jobs_fixture.Host, tmp_path: Path) -> None:
    argument = {"slot": None, "shared": [], "directory": str(tmp_path), "steps": []}
    request = job.JobRequest("probe", ids.new(), "storage", "", {}, argument)
    host.jobs.add(request)
    assert host.jobs.wait(request.job_id, 30)["status"] == "done"


def test_an_unknown_kind_fails_the_job(host: jobs_fixture.Host, probe: Any) -> None:
    info = host.run(probe(kind="no such kind"))
    assert (info["status"], info["error"]["data"]["key"]) == ("failed", "worker_died")


def exporting(
    storage: sanlock_fixture.Storage, directory: Path, source_format: str
) -> tuple[job.JobRequest, record.Slot]:
    """A request of the example kind, for an image of 2 MiB."""
    content, data = directory / "content", directory / "data"
    content.write_bytes(os.urandom(1 << 20) + bytes(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", source_format, str(content), str(data)], check=True)
    job_id = ids.new()
    slot = storage.slot(ids.new(), work={"job_id": job_id, "state": "queued"})
    argument = {"slot": list(slot), "data": str(data), "format": source_format, "target": str(directory / "target")}
    return job.JobRequest("exampleExport", job_id, "storage", "", {}, argument), slot


@pytest.mark.parametrize("source_format", ["raw", "qcow2"])
def test_the_example_of_the_documentation(
    host: jobs_fixture.Host, storage: sanlock_fixture.Storage, tmp_path: Path, source_format: str
) -> None:
    export, slot = exporting(storage, tmp_path, source_format)
    host.jobs.add(export)
    assert host.jobs.wait(export.job_id, 30)["status"] == "done"
    assert (tmp_path / "target").read_bytes() == (tmp_path / "content").read_bytes()
    assert record.read(slot)["exported"] == [str(tmp_path / "target")]


def test_data_that_cannot_be_made_durable_is_not_called_done(storage: sanlock_fixture.Storage, tmp_path: Path) -> None:
    """Trap 27: qemu-img may be content while the disk is not. The first fsync of the worker fails."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt install strace")
    export, slot = exporting(storage, tmp_path, "raw")
    server = forkserver.ForkServer(jobs_fixture.PRELOADED)
    server.start()
    inject = ["-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1", "-o", str(tmp_path / "calls")]
    with contextlib.ExitStack() as last:
        last.callback(server.stop)
        tracer = last.enter_context(subprocess.Popen(["strace", "-f", "-qq", *inject, "-p", str(server.pid)]))
        last.callback(tracer.terminate)
        until(lambda: f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{server.pid}/status").read_text())
        host = last.enter_context(jobs_fixture.hosting(server))
        host.jobs.add(export)
        info = host.jobs.wait(export.job_id, 60)
    assert "INJECTED" in (tmp_path / "calls").read_text()
    assert (info["status"], info["error"]["data"]["facts"]) == ("failed", {"reason": "Input/output error"})
    assert record.read(slot)["work"]["state"] == "failed"
    assert not (tmp_path / "target").exists()


def test_percents_cost_neither_record_writes_nor_messages(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["stage", "first"], *(["progress", percent] for percent in range(100)), ["pause", "here"])
    host.jobs.add(it.request)
    it.reached("here")
    assert it.record["version"] == 3, "the claim alone"
    it.go("here")
    host.end(it)
    told, _ = host.events.since(host.events.instance_id, 0)
    running_events = [event for event in told if event.subject == it.job_id and event.params["status"] == "running"]
    assert len(running_events) < 5


def test_percents_are_recorded_from_time_to_time(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["stage", "first"], ["record_every_percent"], ["progress", 41], ["pause", "here"])
    host.jobs.add(it.request)
    it.reached("here")
    assert (it.work["stage_name"], it.work["percent"]) == ("first", 41)
    it.go("here")
    host.end(it)


def test_the_documentation_shows_the_example_as_it_is() -> None:
    root = Path(__file__).parent.parent
    (shown,) = re.findall(r"```python\n(.*?)```", (root / "docs/jobs.md").read_text(), re.DOTALL)
    example = (root / "tests/kinds/export_image.py").read_text()
    assert example.endswith(shown)
    assert len(example.splitlines()) < 60


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_is_undone_and_recorded(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["fail"])
    info = host.run(it)
    assert info["status"] == "failed"
    assert info["error"]["data"]["facts"] == {"program": "probe", "exitCode": 9, "reason": "as told"}
    assert it.work["state"] == "failed"
    assert it.work["error"] == info["error"]
    assert it.record["generation"] == 7
    assert it.journal == ["run", "undo"]
    assert not it.leftover


def test_a_failing_tool_fails_the_job_with_its_last_line(host: jobs_fixture.Host, probe: Any) -> None:
    info = host.run(probe(["tool", "sh", "-c", "echo first; echo last >&2; exit 3"]))
    assert info["error"]["data"]["facts"] | {"output": []} == {
        "program": "sh",
        "exitCode": 3,
        "reason": "last",
        "output": [],
    }


def test_when_a_tool_has_ended_nothing_of_it_is_left(host: jobs_fixture.Host, probe: Any) -> None:
    """Also no daemon, in a session of its own: it could still write while the body believes that it is alone."""
    it = probe(["tool", "sh", "-c", "setsid sleep 60 >/dev/null & echo $!; sleep 0.1"], ["pause", "after"])
    host.jobs.add(it.request)
    it.reached("after")
    assert not exists(int(it.journal[1]))
    it.go("after")
    assert host.end(it)["status"] == "done"


def test_a_bug_tells_no_secrets(host: jobs_fixture.Host, probe: Any) -> None:
    info = host.run(probe(["bug"]))
    assert (info["status"], info["error"]["data"]["key"]) == ("failed", "internal_error")
    assert "secret" not in json.dumps(info)


def test_a_failing_undo_does_not_hide_the_first_failure(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["fail"], ["undo_bug"])
    assert host.run(it)["error"]["data"]["facts"]["exitCode"] == 9
    assert it.work["state"] == "failed"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"work_of": "another job"}, "superseded"),
        ({"state": "fenced"}, "superseded"),
        ({"generation": 6}, "generation_mismatch"),
    ],
    ids=["taken over", "fenced", "other generation"],
)
def test_work_that_is_not_as_expected_is_not_begun(
    host: jobs_fixture.Host, probe: Any, given: dict[str, Any], key: str
) -> None:
    it = probe(**given)
    before = it.record
    info = host.run(it)
    assert (info["status"], info["error"]["data"]["key"]) == ("failed", key)
    assert "run" not in it.journal
    assert it.record["generation"] == 7
    if key == "superseded":
        assert (it.record, it.journal) == (before, [])
    else:
        assert it.work["state"] == "failed"


def test_a_job_whose_work_is_taken_over_while_it_runs_writes_nothing_more(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["pause", "here"], ["stage", "second"])
    host.jobs.add(it.request)
    it.reached("here")
    with leases.Session() as session:
        other = record.update(session, it.slot, lambda known: {**known, "work": {"job_id": "other", "state": "queued"}})
    it.go("here")
    assert host.end(it)["error"]["data"]["key"] == "superseded"
    assert it.record == other
    assert it.journal == ["run", "here"]


def test_a_lease_that_is_held_fails_the_job_with_the_holders_name(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe()
    with jobs_fixture.hosting(server, lease_wait_s=0.5) as host, holding(it.slot.data_lease()):
        info = host.run(it)
    assert (info["status"], info["error"]["data"]["key"]) == ("failed", "lease_held")
    assert f"process {os.getpid()}" in info["error"]["message"]
    assert it.work["state"] == "failed"
    assert it.journal == []


# -- abort -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        [["loop"]],
        [["tool", "sh", "-c", "echo loop; exec sleep 60"]],
        [["tool", "sh", "-c", "echo loop; setsid sleep 60"]],
    ],
    ids=["python loop", "tool", "tool with a daemon"],
)
def test_abort_undoes_and_leaves_nothing(host: jobs_fixture.Host, probe: Any, steps: list[list[Any]]) -> None:
    it = probe(*steps)
    host.jobs.add(it.request)
    it.reached("loop")
    host.jobs.abort(it.job_id)
    info = host.end(it)
    assert (info["status"], info["error"]) == ("aborted", None)
    assert host.states(it) == ["pending", "running", "aborting", "aborted"]
    assert it.journal == ["run", "loop", "undo"]
    assert not it.leftover
    assert (it.work["state"], it.record["was"], it.record["generation"]) == ("aborted", "aborted", 7)
    assert free(it.slot)


def test_a_body_may_remove_its_record_on_abort(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["vanish"], ["loop"])
    host.jobs.add(it.request)
    it.reached("loop")
    host.jobs.abort(it.job_id)
    assert host.end(it)["status"] == "aborted"
    with pytest.raises(errors.NoRecord):
        it.record  # noqa: B018


def test_abort_that_comes_before_the_tool_is_not_lost(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["pause", "before"], ["tool", "sh", "-c", "echo started; sleep 60"])
    host.jobs.add(it.request)
    it.reached("before")
    host.jobs.abort(it.job_id)
    until(lambda: host.jobs.get(it.job_id)["status"] == "aborting")
    it.go("before")
    assert host.end(it)["status"] == "aborted"
    assert "started" not in it.journal


@pytest.mark.parametrize("wanted", ["data", "source"])
def test_abort_while_waiting_for_a_lease(
    server: forkserver.ForkServer, probe: Any, storage: sanlock_fixture.Storage, wanted: str
) -> None:
    source = storage.slot(ids.new())
    it = probe(shared=[list(source.data_lease(shared=True))])
    held = it.slot.data_lease() if wanted == "data" else source.data_lease()
    with jobs_fixture.hosting(server, lease_wait_s=60) as host, holding(held):
        host.jobs.add(it.request)
        until(lambda: host.jobs.get(it.job_id)["status"] == "running")
        host.jobs.abort(it.job_id)
        assert host.end(it)["status"] == "aborted"
        assert it.work["state"] == "aborted"
        # The target's own lease is free while only the source's is held: what was prepared for the job is undone.
        assert it.journal == ([] if wanted == "data" else ["undo"])


def test_abort_of_a_waiting_job_is_recorded_although_no_thread_is_free(
    server: forkserver.ForkServer, probe: Any
) -> None:
    busy, waiting = probe(["pause", "busy"]), probe()
    with jobs_fixture.hosting(server, workers=1) as host:
        host.jobs.add(busy.request)
        busy.reached("busy")
        host.jobs.add(waiting.request)
        host.jobs.abort(waiting.job_id)
        assert host.end(waiting)["status"] == "aborted"
        assert host.states(waiting) == ["pending", "aborted"]
        assert (waiting.work["state"], waiting.journal) == ("aborted", ["undo"])
        busy.go("busy")
        assert host.end(busy)["status"] == "done"


def test_an_abort_that_is_refused_changes_no_state(host: jobs_fixture.Host, probe: Any) -> None:
    it = probe(["commit"], ["pause", "committed"])
    host.jobs.add(it.request)
    it.reached("committed")
    assert (it.work["state"], it.record["decided"]) == ("committing", True)
    host.jobs.abort(it.job_id)
    until(lambda: "cannot be aborted" in (host.jobs.get(it.job_id)["detail"] or ""))
    assert host.jobs.get(it.job_id)["status"] == "running"
    it.go("committed")
    assert host.end(it)["status"] == "done"
    assert it.work["state"] == "done"
    with pytest.raises(errors.JobNotActive):
        host.jobs.abort(it.job_id)


def test_a_worker_that_ignores_its_abort_is_killed_and_concluded(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe(["pause", "deaf"])
    with jobs_fixture.hosting(server, abort_grace_s=0.2) as host:
        host.jobs.add(it.request)
        it.reached("deaf")
        host.jobs.abort(it.job_id)
        assert host.end(it)["status"] == "aborted"
        assert it.work["state"] == "aborted"
        assert it.journal == ["run", "deaf", "undo"]
        assert not it.leftover


def test_an_abort_that_nobody_could_conclude_is_told_with_an_error(
    server: forkserver.ForkServer, probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its caller would take for gone what is still there."""
    it = probe(["pause", "deaf"])

    def refuses(*_: object, **__: object) -> None:
        raise errors.Unexpected(reason="no memory")

    with jobs_fixture.hosting(server, abort_grace_s=0.2) as host:
        host.jobs.add(it.request)
        it.reached("deaf")
        monkeypatch.setattr(server, "spawn", refuses)  # no server refuses on request
        host.jobs.abort(it.job_id)
        ended = host.end(it)
    assert (ended["status"], ended["error"]["data"]["key"]) == ("aborted", "worker_died")
    assert it.work["state"] == "running"


STOPS: dict[str, tuple[list[list[Any]], list[str]]] = {
    "in its work": ([["loop"]], ["run", "loop", "undo"]),
    "deaf, so it is killed": ([["pause", "deaf"]], ["run", "deaf", "undo"]),
    "before it began": ([], ["undo"]),
}


@pytest.mark.parametrize("kind", ["probe", "resumable"])
@pytest.mark.parametrize("moment", STOPS)
def test_stop_leaves_the_record_of_what_can_be_resumed(
    server: forkserver.ForkServer, probe: Any, kind: str, moment: str
) -> None:
    """Whenever it comes, what was half made goes. Any other kind of job is aborted."""
    steps, journal = STOPS[moment]
    busy, it = probe(["pause", "busy"]), probe(*steps, kind=kind)
    with jobs_fixture.hosting(server, workers=1, abort_grace_s=0.2) as host:
        if not steps:
            host.jobs.add(busy.request)
            busy.reached("busy")
        host.jobs.add(it.request)
        if steps:
            it.reached(journal[1])
        host.jobs.abort(it.job_id, stop=True)
        info = host.end(it)
        busy.go("busy")
    assert info["status"] == "aborted"
    assert it.journal == journal and not it.leftover
    if kind == "resumable":
        assert (it.work["state"], it.work["error"], "was" in it.record) == ("interrupted", info["error"], False)
        assert info["error"]["data"]["key"] == "stopped"
    else:
        assert (it.work["state"], info["error"], it.record["was"]) == ("aborted", None, "aborted")
    assert it.record["generation"] == 7


@pytest.mark.parametrize("moment_ms", range(0, 100, 5))
def test_abort_at_any_moment_leaves_all_or_nothing(
    host: jobs_fixture.Host, storage: sanlock_fixture.Storage, tmp_path: Path, moment_ms: int
) -> None:
    export, slot = exporting(storage, tmp_path, "raw")
    target, source = Path(export.argument["target"]), Path(export.argument["data"])
    before = source.read_bytes()
    host.jobs.add(export)
    time.sleep(moment_ms / 1000)  # the moment is what is tested
    with contextlib.suppress(errors.JobNotActive):
        host.jobs.abort(export.job_id)
    status = host.jobs.wait(export.job_id, 30)["status"]
    assert record.read(slot)["work"]["state"] == status
    assert status in ("aborted", "done")
    assert target.exists() == (status == "done")
    assert source.read_bytes() == before
    assert free(slot)


# -- who dies when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "status", "journal"),
    [
        ([["die"]], "failed", ["run", "undo"]),
        ([["kill_in_commit"]], "failed", ["run", "undo"]),
        ([["die_before_message"]], "done", ["run"]),
        ([["commit"], ["die"]], "done", ["run", "roll_forward"]),
    ],
    ids=["while working", "before the final record", "after the final record", "after the commit point"],
)
def test_the_record_decides_how_the_job_of_a_dead_worker_ended(
    host: jobs_fixture.Host, probe: Any, steps: list[list[Any]], status: str, journal: list[str]
) -> None:
    """Trap 26: the worker may have done its job and died before it could say so."""
    it = probe(*steps)
    info = host.run(it)
    assert info["status"] == it.work["state"] == status
    assert it.journal == journal
    assert it.record["generation"] == (8 if status == "done" else 7)
    assert it.leftover == (status == "done")
    if status == "failed":
        assert info["error"]["data"]["facts"] == {"how": "signal 9"}
        assert it.work["error"] == info["error"]


def test_a_lease_outlives_its_worker_until_the_tool_is_gone(server: forkserver.ForkServer, probe: Any) -> None:
    """Trap 1. The fork server, which would kill the tool, is stopped meanwhile."""
    it = probe(["tool", *IMMORTAL])
    assert server.pid is not None
    with server.spawn(pool.TARGET, it.order()) as child:
        tool = tool_of(it)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            child.kill()
            until(lambda: zombie(child.pid))
            assert running(tool)
            assert not free(it.slot, within_s=0.5)
            assert not child.wait_gone(0)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert child.wait_gone(10)
        assert free(it.slot)
        until(lambda: not exists(child.pid))


def test_the_conclusion_waits_for_the_last_writer(server: forkserver.ForkServer, probe: Any) -> None:
    """Traps 1 and 2. This process is the writer: it adopts the worker's descriptors, as libguestfs's appliance does."""
    it = probe(["adopt", ["sleep", "60"]])
    with jobs_fixture.hosting(server) as host:
        host.jobs.add(it.request)
        until(lambda: any(word.startswith("@vdsm-lease") for word in it.journal))
        fds = adopt(it.journal[-1])
        worker = worker_of(it)
        os.kill(worker, signal.SIGKILL)
        until(lambda: "waiting for the last" in (host.jobs.get(it.job_id)["detail"] or ""))
        assert zombie(worker)
        assert not free(it.slot, within_s=0.3)
        assert it.work["state"] == "running"
        assert "undo" not in it.journal
        for fd in fds:
            os.close(fd)
        assert host.end(it)["status"] == "failed"
        assert it.work["state"] == "failed"
        assert it.journal[-1] == "undo"
        until(lambda: not exists(worker))


def adopt(address: str) -> list[int]:
    """What QEMU's launcher does, see `leased_exec`."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"\0{address[1:]}")
        line.sendall(b"?")
        _, fds, _, _ = socket.recv_fds(line, 1, 2)
    assert len(fds) == 2
    return fds


def test_the_appliances_launcher_adopts_the_lease(server: forkserver.ForkServer, probe: Any, tmp_path: Path) -> None:
    """Trap 2, with the launcher itself in QEMU's place: a daemon in a session of its own, all descriptors closed."""
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho $$\nls -l /proc/$$/fd >&2\nexec sleep 60\n")
    qemu.chmod(0o755)
    launch = f'exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; VDSM_QEMU={qemu} exec {sys.executable} -I "$LIBGUESTFS_HV"'
    it = probe(["adopt", ["sh", "-c", launch]])
    with server.spawn(pool.TARGET, it.order()) as child:
        appliance = tool_of(it)
        held = opened(appliance)
        assert any(link.startswith("socket:") for link in held), "the sanlock descriptor"
        assert any(link.startswith("pipe:") for link in held), "the liveness pipe"
        child.kill()
        assert child.wait_gone(10)
        assert free(it.slot)
        until(lambda: not exists(appliance))


def test_sigterm_means_the_lease_is_lost_and_nothing_is_written(server: forkserver.ForkServer, probe: Any) -> None:
    """Trap 14: sanlock sends it when another host may own the data soon."""
    it = probe(["tool", "sh", "-c", "echo $$; exec sleep 60"])
    with server.spawn(pool.TARGET, it.order()) as child:
        tool = tool_of(it)
        before = it.record
        child.kill(signal.SIGTERM)
        assert child.wait_exit(30) == control.LEASE_LOST
        assert child.wait_gone(5)
        until(lambda: not running(tool))
        assert it.record == before
        assert it.work["state"] == "running"
        assert it.journal[-1] != "undo"


def test_sigterm_ends_a_worker_whose_main_thread_waits(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe()
    with holding(it.slot.data_lease()), server.spawn(pool.TARGET, it.order(lease_wait_s=60)) as child:
        until(lambda: registered(child.pid))
        child.kill(signal.SIGTERM)
        assert child.wait_exit(2) == control.LEASE_LOST
        assert it.work["state"] == "queued"


def registered(pid: int) -> bool:
    listing = subprocess.run(["sanlock", "client", "status"], capture_output=True, text=True, check=True)
    return f"p {pid} " in listing.stdout


@pytest.mark.parametrize(
    ("steps", "state"),
    [([], "running"), ([["commit"]], "committing")],
    ids=["to be undone or done again", "to be rolled forward"],
)
def test_the_worker_ends_with_its_agent_and_the_record_says_so(
    storage: sanlock_fixture.Storage, probe: Any, steps: list[list[Any]], state: str
) -> None:
    """Trap 18. The agent is a process of its own and is killed."""
    it = probe(*steps, ["tool", "sh", "-c", "echo $$; exec sleep 60"])
    agent_code = (
        "import sys, json, time; sys.path[:] = json.loads(sys.argv[1])\n"
        "from tests import jobs_fixture\n"
        "from vdsm import forkserver\n"
        "from vdsm.jobs import job\n"
        "host = jobs_fixture.Host(forkserver.ForkServer(jobs_fixture.PRELOADED))\n"
        "host.jobs.add(job.JobRequest(**json.loads(sys.argv[2])))\n"
        "time.sleep(60)\n"
    )
    fields = ("kind", "job_id", "job_type", "description", "entity", "argument")
    request = {name: getattr(it.request, name) for name in fields}
    with subprocess.Popen([sys.executable, "-c", agent_code, json.dumps(sys.path), json.dumps(request)]) as agent:
        tool = tool_of(it)
        worker = worker_of(it)
        assert it.work["state"] == state
        agent.kill()
        until(lambda: not running(worker))  # long before its tool would end
    until(lambda: not running(tool))
    assert it.work["state"] == ("interrupted" if state == "running" else state)
    assert "undo" not in it.journal
    assert it.leftover
    assert free(it.slot)


def test_an_interrupted_job_leaves_the_record_of_its_successor_alone(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe(["pause", "here"])
    with server.spawn(pool.TARGET, it.order()) as child:
        it.reached("here")
        with leases.Session() as session:
            change = {"work": {"job_id": "other", "state": "queued"}}
            other = record.update(session, it.slot, lambda known: {**known, **change})
        child.channel.hang_up()
        assert child.wait_exit(30) == control.INTERRUPTED
        assert it.record == other


def test_a_worker_that_waits_for_a_lease_ends_with_its_agent(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe()
    with holding(it.slot.data_lease()), server.spawn(pool.TARGET, it.order(lease_wait_s=60)) as child:
        until(lambda: registered(child.pid))
        child.channel.hang_up()
        assert child.wait_exit(30) == control.INTERRUPTED
        assert it.work["state"] == "interrupted"


def test_an_interruption_waits_for_who_holds_the_record(server: forkserver.ForkServer, probe: Any) -> None:
    """Also when the main thread waits for it too, with a write of its own to make."""
    it = probe(["pause", "here"], ["stage", "second"])
    with server.spawn(pool.TARGET, it.order()) as child:
        it.reached("here")
        with holding(it.slot.record_lease()):
            it.go("here")
            child.channel.hang_up()
            with pytest.raises(TimeoutError):
                child.wait_exit(0.3)
        assert child.wait_exit(30) == control.INTERRUPTED
        assert it.work["state"] == "interrupted"


def test_stopping_the_pool_interrupts_what_runs(server: forkserver.ForkServer, probe: Any) -> None:
    it = probe(["tool", "sh", "-c", "echo $$; exec sleep 60"])
    with jobs_fixture.hosting(server) as host:
        host.jobs.add(it.request)
        tool = tool_of(it)
        assert host.pool.stop(30)  # long before the tool would end
    assert it.work["state"] == "interrupted"
    until(lambda: not running(tool))


# -- the queue -------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_keeps_no_trace(server: forkserver.ForkServer, probe: Any) -> None:
    busy = probe(["pause", "busy"])
    waiting, refused = probe(), probe()
    with jobs_fixture.hosting(server, workers=1, queue=1) as host:
        host.jobs.add(busy.request)
        busy.reached("busy")
        host.jobs.add(waiting.request)
        with pytest.raises(errors.Overloaded):
            host.jobs.add(refused.request)
        with pytest.raises(errors.NoSuchJob):
            host.jobs.get(refused.job_id)
        assert host.states(refused) == []
        busy.go("busy")
        assert host.end(waiting)["status"] == "done"


def test_a_job_waits_behind_its_gate_without_a_thread(server: forkserver.ForkServer, probe: Any) -> None:
    answers: list[job.Wait | None] = [job.Wait("the repository is joining", 3)]
    gated, other = probe(gate=lambda: answers[0]), probe()
    with jobs_fixture.hosting(server, workers=1) as host:
        host.jobs.add(gated.request)
        until(lambda: host.jobs.get(gated.job_id)["detail"] == "the repository is joining (about 3 s left)")
        assert host.run(other)["status"] == "done"
        assert host.jobs.get(gated.job_id)["status"] == "pending"
        answers[0] = None
        host.pool.poke()
        assert host.end(gated)["status"] == "done"


def test_a_gate_opens_without_a_poke(server: forkserver.ForkServer, probe: Any) -> None:
    asked: list[int] = []
    it = probe(gate=lambda: asked.append(1) or (job.Wait("not yet") if len(asked) < 3 else None))
    with jobs_fixture.hosting(server) as host:
        assert host.run(it)["status"] == "done"


def test_a_gate_that_can_never_open_fails_the_job(host: jobs_fixture.Host, probe: Any) -> None:
    def gone() -> None:
        raise errors.NoSuchRepository(repo_id="tests")

    it = probe(gate=gone)
    info = host.run(it)
    assert (info["status"], info["error"]["data"]["key"]) == ("failed", "no_such_repository")
    assert (it.work["state"], it.journal) == ("failed", ["undo"])


def test_an_idle_pool_stops_at_once(server: forkserver.ForkServer) -> None:
    with jobs_fixture.hosting(server) as host:
        assert host.pool.stop(30)  # its threads wait for work, without an end


def test_a_dead_fork_server_costs_its_jobs_and_no_other(storage: sanlock_fixture.Storage, probe: Any) -> None:
    server = forkserver.ForkServer(jobs_fixture.PRELOADED)
    first, second = probe(["pause", "here"]), probe()
    try:
        with jobs_fixture.hosting(server) as host:
            host.jobs.add(first.request)
            first.reached("here")
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            assert host.end(first)["status"] == first.work["state"] == "failed"
            assert host.run(second)["status"] == "done"
    finally:
        server.stop()
