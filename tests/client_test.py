"""vdsm-client as its users run it: a process, its output, its exit code."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_agent
import pytest

from tests.until import until
from vdsm import errors
from vdsm.client import arguments, exits, failures, output, waiting

ROOT = Path(__file__).resolve().parent.parent
# A test runner in the background ignores Ctrl-C, and its children would inherit that.
SCRIPT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from vdsm.client import cli; sys.exit(cli.main())"
)
COMMAND = [sys.executable, "-c", SCRIPT]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}


@pytest.fixture
def agent() -> fake_agent.Agent:
    return fake_agent.Agent()


@pytest.fixture
def address(agent: fake_agent.Agent, tmp_path: Path) -> Iterator[str]:
    with fake_agent.on_unix(tmp_path / "sock", agent.talk) as path:
        yield path


@pytest.fixture
def run(address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*argv: str, stdin: str = "", **changes: Any) -> subprocess.CompletedProcess[str]:
        environment = {**ENVIRONMENT, "VDSM_ADDRESS": address, **changes}
        return subprocess.run(
            [*COMMAND, *argv], input=stdin, capture_output=True, encoding="utf-8", timeout=30, env=environment
        )

    return run


Run = Callable[..., subprocess.CompletedProcess[str]]


def raising(error: errors.VdsmError) -> Callable[[fake_agent.Call], None]:
    def verb(call: fake_agent.Call) -> None:
        raise error

    return verb


# -- calls and what they print ---------------------------------------------------------------------------------------


def test_a_result_is_json_with_sorted_keys_and_four_spaces(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["Host.getVMList"] = lambda call: {"b": [1, "häuser 🏠"], "a": None}
    done = run("Host", "getVMList")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{\n    "a": null,\n    "b": [\n        1,\n        "häuser 🏠"\n    ]\n}\n'
    assert agent.calls[0].params is None


def test_a_null_result_prints_nothing(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["Host.ping2"] = lambda call: None
    done = run("Host", "ping2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=str)
def test_json_stays_json_where_the_terminal_knows_no_unicode(run: Run, environment: dict[str, str]) -> None:
    done = run("Host", "echo", 'message="\\u00e4 \\ud83c\\udfe0 \\u0085"', **environment)
    assert json.loads(done.stdout) == "ä 🏠 \x85"
    assert done.stdout.isascii() or environment.get("LC_ALL")


def test_no_control_character_reaches_the_terminal(agent: fake_agent.Agent, run: Run) -> None:
    evil = "\x1b]0;pwned\x07 \x9b2J \x7f \ud800"
    agent.verbs["list"] = lambda call: [{"name": evil}]
    agent.verbs["a.list"] = agent.verbs["list"]
    agent.verbs["a.fail"] = raising(errors.NoSuchImage(image_id=evil, where=evil, state=evil))
    for argv in (["a", "list"], ["a", "list", "-o", "table"], ["a", "fail"], ["a", "fail", "-o", "json"]):
        done = run(*argv)
        shown = done.stdout + done.stderr
        assert "pwned" in shown
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800]", shown), argv
    assert json.loads(run("a", "list").stdout) == [{"name": evil}]


def test_a_list_of_objects_as_a_table(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["Storage.listImages"] = lambda call: [
        {"id": "one", "size": 5, "base": None},
        {"id": "second", "size": 1024, "tags": ["a", "ä"]},
    ]
    assert run("Storage", "listImages", "-o", "table").stdout.splitlines() == [
        "id      size     base  tags",
        "one     5 B      -     -",
        'second  1.0 KiB  -     ["a", "ä"]',
    ]


def test_jobs_by_id_as_a_table(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["Host.getJobs"] = lambda call: {"j1": {"id": "j1", "status": "done"}, "j2": {"id": "j2", "status": "x"}}
    assert run("-o", "table", "Host", "getJobs").stdout.splitlines() == ["id  status", "j1  done", "j2  x"]


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ([], []),
        ({}, []),
        ([{}], ["", ""]),
        ({"a": 1, "long": {"x": "y"}}, ["a     1", 'long  {"x": "y"}']),
        ({"vm1": {"up": True}, "vm2": {}}, ["     up", "vm1  true", "vm2  -"]),
        (["a", 1, None], ["a", "1", "-"]),
        ("two\nlines", ["two\\nlines"]),
        ([{"a": 1}, 5], ['{"a": 1}', "5"]),
    ],
    ids=str,
)
def test_tables_of_other_shapes(value: Any, lines: list[str]) -> None:
    assert list(output.table(value)) == lines


def test_output_that_nobody_reads(agent: fake_agent.Agent, address: str) -> None:
    agent.verbs["Host.big"] = lambda call: ["x" * 100] * 10_000
    reading, writing = os.pipe()
    os.close(reading)
    argv = [*COMMAND, "-a", address, "Host", "big"]
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, timeout=30, env=ENVIRONMENT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (exits.FAILED, b"")


def test_only_what_a_call_needs_is_imported(agent: fake_agent.Agent, address: str) -> None:
    script = "import sys; from vdsm.client import cli; cli.main(); print(*sorted(sys.modules))"
    argv = [sys.executable, "-S", "-c", script, "-a", address, "Host", "echo", "message=x"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=ENVIRONMENT, check=True)
    imported = set(done.stdout.splitlines()[1].split())
    assert "vdsm.client.transport" in imported
    heavy = {"asyncio", "typing", "argparse", "http", "http.client", "dataclasses", "pathlib", "ssl", "vdsm.errors"}
    assert heavy & imported == set()


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "params"),
    [
        (["size=10"], {"size": "10"}),
        (["a=", "b= x "], {"a": "", "b": " x "}),
        (["a=b=c"], {"a": "b=c"}),
        (["a=true", "b=null"], {"a": "true", "b": "null"}),
        (['a={"b": [1]}', "c=[1, null]"], {"a": {"b": [1]}, "c": [1, None]}),
        (['a="5"', 'b="{x}"', 'c="@home"'], {"a": "5", "b": "{x}", "c": "@home"}),
        (['a= {"b": 1}'], {"a": {"b": 1}}),
        (["a=häuser 🏠"], {"a": "häuser 🏠"}),
        (["options.imageId=x", "options.jobId=y"], {"options": {"imageId": "x", "jobId": "y"}}),
        (["a.b.c=1", "a.b.d=2", "a.e=3"], {"a": {"b": {"c": "1", "d": "2"}, "e": "3"}}),
        (['options={"a": 1}', "options.b=2"], {"options": {"a": 1, "b": "2"}}),
        (["options.b=2", 'options={"a": 1}'], {"options": {"a": 1, "b": "2"}}),
        (["a=<domain type='kvm'/>"], {"a": "<domain type='kvm'/>"}),
        (["--", "-a=1"], {"-a": "1"}),
    ],
    ids=str,
)
def test_values(words: list[str], params: dict[str, Any]) -> None:
    assert arguments.parse(["Host", "verb", *words]).params == params


def test_values_from_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("line\nändern\n")
    (tmp_path / "json").write_text('\n  {"vmId": 1}\n')
    given = arguments.parse(["VM", "create", f"a=@{tmp_path}/text", f"vmParams=@{tmp_path}/json"])
    assert given.params == {"a": "line\nändern\n", "vmParams": {"vmId": 1}}


def test_parameters_from_a_file_and_the_words_over_them(tmp_path: Path) -> None:
    (tmp_path / "params").write_text('{"a": 1, "options": {"x": 1, "y": 2}}')
    given = arguments.parse(["Host", "verb", "options.y=9", "b=2", "-f", str(tmp_path / "params")])
    assert given.params == {"a": 1, "b": "2", "options": {"x": 1, "y": "9"}}


def test_parameters_from_standard_input(run: Run) -> None:
    assert run("Host", "echo", "-f", "-", stdin='{"message": "a"}').stdout == '"a"\n'
    assert run("Host", "echo", "message=@-", stdin="[1]").stdout == "[\n    1\n]\n"


def test_options_stand_anywhere() -> None:
    given = arguments.parse(["Storage", "copyImage", "--wait", "a=1", "-o", "table", "--timeout=5", "-a", "/x", "b=2"])
    assert (given.words, given.params) == (["Storage", "copyImage"], {"a": "1", "b": "2"})
    assert (given.wait, given.format, given.timeout_s, given.address) == (True, "table", 5.0, "/x")
    assert not arguments.parse(["--wait", "--no-wait", "Host", "ping2"]).wait


def test_the_address_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment is the input here.
    monkeypatch.setenv("VDSM_ADDRESS", "/elsewhere")
    assert arguments.parse([]).address == "/elsewhere"
    monkeypatch.delenv("VDSM_ADDRESS")
    assert arguments.parse([]).address == "/run/vdsm/vdsmd.sock"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "needs a namespace and a verb"),
        (["Host"], "needs a namespace and a verb"),
        (["Host", "echo", "hello"], "'hello' is not name=value"),
        (["Host", "echo", "message=hello", "world"], "'world' is not name=value"),
        (["Host", "echo", "a={b}"], "a: not JSON"),
        (["Host", "echo", "a=[" * 5000], "a: not JSON"),
        (["Host", "echo", "a=@/no/such/file"], "/no/such/file: No such file"),
        (["Host", "echo", "a=1", "a=2"], "a is given twice"),
        (["Host", "echo", "a=1", "a.b=2"], "a is given as something else"),
        (["Host", "echo", "=1"], "'' is no parameter's name"),
        (["Host", "echo", "a..b=1"], "'a..b' is no parameter's name"),
        (["Host", "echo", "a=\udcff"], "a: the value is not UTF-8"),
        (["-f", "/dev/null", "Host", "echo"], "/dev/null: not JSON"),
        (["-o", "yaml", "Host", "echo"], "json, table or table:COLUMN,COLUMN..., not 'yaml'"),
        (["--timeout", "soon", "Host", "echo"], "--timeout takes a number"),
        (["--timeout", "-1", "Host", "echo"], "--timeout takes a number"),
        (["--timeout", "nan", "Host", "echo"], "--timeout takes a number"),
        (["--nonsense", "Host", "echo"], "--nonsense"),
        (["-a", "ftp://host", "Host", "echo"], "'ftp://host' is no address"),
        (["-p", "0", "Host", "echo"], "-p takes a port's number, not '0'"),
        (["-a", "host:1", "-p", "2", "Host", "echo"], "-p goes with a host's name, not with 'host:1'"),
        (["-a", "/run/sock", "-p", "2", "Host", "echo"], "-p goes with a host's name, not with '/run/sock'"),
        (["events", "job", "sinc=5"], "not sinc="),
        (["events", "since=x"], "since= takes a sequence number"),
    ],
    ids=str,
)
def test_usage_errors(run: Run, agent: fake_agent.Agent, argv: list[str], says: str) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert says in done.stderr and "Traceback" not in done.stderr
    assert agent.calls == []


def test_parameters_in_a_file_must_be_an_object(run: Run) -> None:
    done = run("-f", "-", "Host", "echo", stdin="[1]")
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert "must be a JSON object" in done.stderr


# -- failures --------------------------------------------------------------------------------------------------------


def test_an_error_for_people(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["VM.create"] = raising(errors.ImageInUse(image_id="7", holder="VM 3 on host 2", state="optimized"))
    done = run("VM", "create", "--flow-id", "flow")
    assert (done.returncode, done.stdout) == (exits.CONFLICT, "")
    assert done.stderr.splitlines() == [
        "vdsm-client: Image 7 is in use by VM 3 on host 2",
        "    state: optimized",
        "    hint: Wait for the holder to end, or end it.",
        "    imageId: 7",
        "    holder: VM 3 on host 2",
        "    code: 10041 (image_in_use)",
        "    request: flow:1",
    ]


def test_an_error_for_programs(agent: fake_agent.Agent, run: Run) -> None:
    error = errors.NoSuchImage(image_id="7", where="main")
    agent.verbs["Storage.getImage"] = raising(error)
    done = run("-o", "json", "Storage", "getImage")
    assert (done.returncode, done.stdout) == (exits.NOT_FOUND, "")
    assert json.loads(done.stderr) == error.to_wire()


BRANCHES = {
    errors.BadRequest: exits.USAGE,
    errors.Missing: exits.NOT_FOUND,
    errors.Conflict: exits.CONFLICT,
    errors.Unavailable: exits.CONFLICT,
    errors.Broken: exits.FAILED,
    errors.Failed: exits.FAILED,
}
EXCEPTIONS = {
    "forbidden": exits.DENIED,
    "deadline_passed": exits.TIMED_OUT,
    "repository_stuck": exits.TIMED_OUT,
    "aborted": exits.ABORTED,
}


@pytest.mark.parametrize("key", errors.VdsmError.by_key)
def test_every_error_of_the_agent_has_its_exit_code(key: str) -> None:
    kind = errors.VdsmError.by_key[key]
    branch = next(code for base, code in BRANCHES.items() if issubclass(kind, base))
    assert exits.of(failures.ClientError.from_wire(kind().to_wire())) == EXCEPTIONS.get(key, branch)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": -32602, "message": "m"}, exits.USAGE),
        ({"code": -32700, "message": "m"}, exits.USAGE),
        ({"code": -32603, "message": "m"}, exits.FAILED),
        ({"code": 12345, "message": "m", "data": {"key": "of_the_future"}}, exits.FAILED),
    ],
    ids=str,
)
def test_errors_of_other_agents(error: dict[str, Any], code: int) -> None:
    assert exits.of(failures.ClientError.from_wire(error)) == code


@pytest.mark.parametrize(
    ("local", "code"),
    [
        (failures.CannotConnect, exits.CANNOT_CONNECT),
        (failures.Denied, exits.DENIED),
        (failures.NoAnswer, exits.TIMED_OUT),
        (failures.ConnectionLost, exits.TIMED_OUT),
        (failures.BadAnswer, exits.FAILED),
    ],
)
def test_failures_of_the_connection(local: type[failures.ClientError], code: int) -> None:
    assert exits.of(local("x")) == code  # type: ignore[call-arg, arg-type]  # of these classes each takes one text


def test_no_agent(run: Run, tmp_path: Path) -> None:
    done = run("-a", str(tmp_path / "nobody"), "Host", "ping2")
    assert (done.returncode, done.stdout) == (exits.CANNOT_CONNECT, "")
    assert "Cannot connect" in done.stderr and "hint: Check that vdsmd runs" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not connect")
def test_a_user_who_may_not_connect(address: str) -> None:
    Path(address).chmod(0o600)
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *COMMAND, "-a", address, "Host", "ping2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=ENVIRONMENT)
    assert done.returncode == exits.DENIED
    assert "No permission" in done.stderr and "group" in done.stderr


def test_no_answer_in_time(agent: fake_agent.Agent, run: Run) -> None:
    release = threading.Event()
    agent.verbs["Host.slow"] = lambda call: release.wait(20) and None
    done = run("--timeout", "0.3", "Host", "slow")
    release.set()
    assert done.returncode == exits.TIMED_OUT
    assert "did not answer in time" in done.stderr and "may go on" in done.stderr


def test_the_agent_dies_during_a_call(agent: fake_agent.Agent, run: Run) -> None:
    agent.verbs["Host.die"] = lambda call: call.connection.shutdown(2)
    done = run("Host", "die")
    assert done.returncode == exits.TIMED_OUT
    assert "closed the connection" in done.stderr


# -- waiting for jobs ------------------------------------------------------------------------------------------------

JOB = "11111111-2222-3333-4444-555555555555"
RUNNING = {"id": JOB, "status": "running", "progress": 41, "stage": 2, "stages": 3, "stageName": "convert"}


class Work:
    """A job whose successive states `Job.wait` gives out; the last one stays."""

    def __init__(self, agent: fake_agent.Agent, *states: dict[str, Any]) -> None:
        self._states = list(states)
        self.asked = threading.Event()
        agent.verbs["Storage.copyImage"] = lambda call: {"imageId": "i", "jobId": JOB}
        agent.verbs["Job.wait"] = self._wait

    def _wait(self, call: fake_agent.Call) -> dict[str, Any]:
        assert call.params["jobId"] == JOB and call.params["timeout"] > 0
        self.asked.set()
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]


def test_a_job_that_is_done(agent: fake_agent.Agent, run: Run) -> None:
    final = RUNNING | {"status": "done", "progress": 100, "stage": 3, "stageName": "flush"}
    Work(agent, RUNNING | {"status": "pending", "stages": None, "progress": None}, RUNNING, RUNNING, final)
    done = run("--wait", "Storage", "copyImage", "imageId=i")
    assert done.returncode == 0
    assert json.loads(done.stdout) == final
    assert re.sub(r"\d:\d\d", "m:ss", done.stderr).splitlines() == [
        "m:ss  pending  convert",
        "m:ss  41 %  running  stage 2/3  convert",
        "m:ss  100 %  done  stage 3/3  flush",
    ]


def test_without_wait_the_answer_is_printed(agent: fake_agent.Agent, run: Run) -> None:
    Work(agent, RUNNING)
    done = run("Storage", "copyImage")
    assert json.loads(done.stdout) == {"imageId": "i", "jobId": JOB}
    assert [call.method for call in agent.calls] == ["Storage.copyImage"]


@pytest.mark.parametrize("answer", [{"imageId": "i", "jobId": None}, {"imageId": "i"}, "done", None], ids=str)
def test_nothing_to_wait_for(agent: fake_agent.Agent, run: Run, answer: Any) -> None:
    agent.verbs["Storage.copyImage"] = lambda call: answer
    done = run("--wait", "Storage", "copyImage")
    assert (done.returncode, done.stderr) == (0, "")
    assert (json.loads(done.stdout) if done.stdout else None) == answer


@pytest.mark.parametrize(
    ("status", "error", "code", "says"),
    [
        ("failed", errors.RepositoryFull(repo_id="main"), exits.FAILED, "main has no space left"),
        ("failed", errors.LeaseHeld(resource="r", holder="host 3"), exits.CONFLICT, "r is in use by host 3"),
        ("failed", None, exits.FAILED, f"Job {JOB} has failed"),
        ("aborted", errors.Aborted(), exits.ABORTED, "The job was aborted"),
        ("aborted", None, exits.ABORTED, f"Job {JOB} has aborted"),
    ],
    ids=["full", "lease held", "no reason", "aborted", "aborted without reason"],
)
def test_a_job_that_is_not_done(
    agent: fake_agent.Agent, run: Run, status: str, error: errors.VdsmError | None, code: int, says: str
) -> None:
    final = RUNNING | {"status": status, "error": error and error.to_wire()}
    Work(agent, final)
    done = run("--wait", "Storage", "copyImage")
    assert done.returncode == code
    assert json.loads(done.stdout) == final
    assert says in done.stderr


def test_waiting_is_bound_by_the_timeout(agent: fake_agent.Agent, run: Run) -> None:
    Work(agent, RUNNING)
    done = run("--wait", "--timeout", "0.5", "Storage", "copyImage")
    assert (done.returncode, done.stdout) == (exits.TIMED_OUT, "")
    assert f"Job {JOB} has not ended after 0.5 s; it goes on" in done.stderr


def test_the_job_is_gone(agent: fake_agent.Agent, run: Run) -> None:
    Work(agent, RUNNING)
    agent.verbs["Job.wait"] = raising(errors.NoSuchJob(job_id=JOB))
    done = run("--wait", "Storage", "copyImage")
    assert done.returncode == exits.NOT_FOUND


def start(address: str, *argv: str) -> "subprocess.Popen[bytes]":
    environment = {**ENVIRONMENT, "VDSM_ADDRESS": address}
    return subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Once it waits for the agent: a signal that comes just before a call of the kernel is noticed after it only."""
    state = Path(f"/proc/{process.pid}/stat")
    until(lambda: state.read_text().rpartition(")")[2].split()[0] == "S")
    process.send_signal(signal.SIGINT)


def test_ctrl_c_leaves_the_job_running_and_says_how_to_abort_it(agent: fake_agent.Agent, address: str) -> None:
    work = Work(agent, RUNNING)
    with start(address, "--wait", "Storage", "copyImage") as process:
        assert work.asked.wait(20)
        interrupt(process)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (exits.INTERRUPTED, b"")
    assert f"Job {JOB} goes on. To abort it: vdsm-client Job abort jobId={JOB}" in err.decode()
    assert "Traceback" not in err.decode()
    assert "Job.abort" not in [call.method for call in agent.calls]


def test_ctrl_c_during_a_call(agent: fake_agent.Agent, address: str) -> None:
    release = threading.Event()
    agent.verbs["Host.slow"] = lambda call: release.wait(20) and None
    with start(address, "Host", "slow") as process:
        assert agent.called.wait(20)
        interrupt(process)
        _, err = process.communicate(timeout=20)
    release.set()
    assert process.returncode == exits.INTERRUPTED
    assert "may go on" in err.decode() and "Traceback" not in err.decode()


def test_a_terminal_gets_a_bar(agent: fake_agent.Agent, address: str) -> None:
    final = RUNNING | {"status": "done", "progress": 100, "stage": 3}
    Work(agent, RUNNING, RUNNING | {"progress": -1, "stageName": "evil \x1b[2J " + "long " * 50}, final)
    shown, terminal = pty.openpty()
    argv = [*COMMAND, "-a", address, "--wait", "Storage", "copyImage"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=terminal, timeout=30, env=ENVIRONMENT)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal without its other side ends
        while select.select([shown], [], [], 5)[0]:
            text += os.read(shown, 4096)
    os.close(shown)
    assert (done.returncode, json.loads(done.stdout)) == (0, final)
    bars = re.sub(r"\d:\d\d", "m:ss", text.decode()).rstrip().split("\r")[1:]
    assert bars[0] == f"[{'#' * 12:<30}]  41 %  m:ss  running  stage 2/3  convert\x1b[K"
    assert re.fullmatch(r"\[ *# *\] +m:ss  running  stage 2/3  evil \\x1b\[2J l?o?n?g?\x1b\[K", bars[1])
    assert len(bars[1]) == 79 + len("\x1b[K")
    assert bars[2].startswith(f"[{'#' * 30}] 100 %")


@pytest.mark.parametrize(
    ("progress", "percent"), [(None, None), (-1, None), (0, 0), (41.9, 41), (100, 100), (250, 100), ("x", None)]
)
def test_percentages(progress: Any, percent: int | None) -> None:
    assert waiting._percent({"progress": progress}) == percent


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_are_printed_one_per_line_as_they_come(agent: fake_agent.Agent, address: str) -> None:
    def subscribe(call: fake_agent.Call) -> dict[str, Any]:
        call.event(sequence=8, topic="job", data={"häuser": 1})
        return {"instanceId": "i", "sequence": 7, "gap": False}

    agent.verbs["Host.subscribe"] = subscribe
    with start(address, "events", "job", "vm", "instanceId=i", "since=7") as process:
        assert process.stdout is not None
        assert process.stdout.readline().decode() == '{"data": {"häuser": 1}, "sequence": 8, "topic": "job"}\n'
        agent.calls[0].event(sequence=9)
        assert process.stdout.readline() == b'{"sequence": 9}\n'
        interrupt(process)
        process.communicate(timeout=20)
    assert process.returncode == exits.INTERRUPTED
    assert agent.calls[0].params == {"topics": ["job", "vm"], "instanceId": "i", "since": 7}


def test_events_end_with_the_connection(agent: fake_agent.Agent, run: Run) -> None:
    def subscribe(call: fake_agent.Call) -> None:
        call.connection.shutdown(2)

    agent.verbs["Host.subscribe"] = subscribe
    done = run("events")
    assert done.returncode == exits.TIMED_OUT
    assert agent.calls[0].params == {}


# -- help ------------------------------------------------------------------------------------------------------------

DOCUMENT = {
    "openrpc": "1.3.2",
    "methods": [
        {"name": "Host.ping2", "summary": "Answers, and does nothing else.", "params": [], "result": {"schema": {}}},
        {
            "name": "Storage.copyImage",
            "summary": "Copies an image.",
            "description": "To any connected repository.",
            "params": [
                {
                    "name": "targetRepoId",
                    "required": True,
                    "description": "where to",
                    "schema": {"type": "string", "description": "where to"},
                },
                {"name": "size", "required": False, "schema": {"type": "integer", "default": 5}},
                {
                    "name": "hints",
                    "schema": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
                },
                {"name": "options", "schema": {"$ref": "#/components/schemas/Options"}},
                {
                    "name": "disks",
                    "schema": {"type": "array", "items": {"$ref": "#/components/schemas/Disk"}, "default": []},
                },
                {"name": "any", "schema": {"$ref": "#/components/schemas/Any"}},
            ],
            "result": {"name": "result", "schema": {"$ref": "#/components/schemas/Created"}},
        },
    ],
    "components": {
        "schemas": {
            "Options": {
                "type": "object",
                "description": "choices",
                "properties": {
                    "strategy": {"enum": ["space", "performance"]},
                    "kind": {"const": "x"},
                    "again": {"$ref": "#/components/schemas/Options"},
                    "force": {"type": "boolean", "default": False},
                },
                "required": ["kind"],
            },
            "Disk": {"type": "object", "properties": {"imageId": {"type": "string"}}, "required": ["imageId"]},
            "Any": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/components/schemas/Any"}}]},
            "Created": {"type": "object"},
        }
    },
}


@pytest.fixture
def documented(agent: fake_agent.Agent) -> None:
    agent.verbs["rpc.discover"] = lambda call: DOCUMENT


def test_help_lists_what_the_agent_has(run: Run, documented: None) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert re.search(r"usage: vdsm-client .*VDSM_ADDRESS.*exit codes:\n *0  done", done.stdout, re.DOTALL)
    assert re.search(r"^ +Host ping2 +Answers, and does nothing else\.$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +Storage copyImage +Copies an image\.$", done.stdout, re.MULTILINE)


def test_help_without_an_agent_says_how_to_get_more(run: Run, tmp_path: Path) -> None:
    done = run("-h", "-a", str(tmp_path / "nobody"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout and re.search(r"^ +Host ping2 +Answers", done.stdout, re.MULTILINE)
    assert "This is what the client was made with; an agent tells more. Cannot connect" in done.stdout


def test_help_on_a_namespace(run: Run, documented: None) -> None:
    done = run("Storage", "-h")
    assert done.returncode == 0
    assert "Storage copyImage" in done.stdout and "Host ping2" not in done.stdout


def test_help_on_a_verb(run: Run, documented: None) -> None:
    done = run("Storage", "copyImage", "-h")
    assert (done.returncode, done.stderr) == (0, "")
    text, _, skeleton = done.stdout.partition("skeleton for -f FILE (leave out what is not required):\n")
    assert text.splitlines() == [
        "vdsm-client Storage copyImage [name=value ...]",
        "",
        "Copies an image.",
        "",
        "To any connected repository.",
        "",
        "parameters:",
        "    targetRepoId: string, required",
        "        where to",
        "    size: integer, default 5",
        "    hints: list of string or null, optional",
        "    options: object, optional",
        "        choices",
        '    options.strategy: "space" or "performance", optional',
        '    options.kind: "x", required',
        "    options.again: object, optional",
        "        choices",
        "    options.force: boolean, default false",
        "    disks: list of object, default []",
        "    disks[].imageId: string, required",
        "    any: string or list of string or list of value, optional",
        "",
        "result: object",
        "",
    ]
    assert json.loads(skeleton) == {
        "targetRepoId": "",
        "size": 5,
        "hints": [],
        "options": {"strategy": "space", "kind": "x", "again": {}, "force": False},
        "disks": [{"imageId": ""}],
        "any": "",
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["Nothing", "-h"], "no namespace Nothing; there are Host, Storage"),
        (["Storage", "copyimage", "-h"], "no verb Storage copyimage; did you mean Storage copyImage?"),
        (["Storage", "paint", "-h"], "no verb Storage paint; its namespace has:\n    Storage copyImage"),
        (["Nothing", "verb", "-h"], "no namespace Nothing"),
    ],
    ids=str,
)
def test_help_on_what_does_not_exist(run: Run, documented: None, argv: list[str], says: str) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert says in done.stderr


def test_help_on_a_verb_without_an_agent(run: Run, tmp_path: Path) -> None:
    """It is told from what the client was made with."""
    nobody = str(tmp_path / "nobody")
    done = run("Host", "echo", "-h", "-a", nobody)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters:\n    message: string, required\n        any text\n" in done.stdout
    assert "no parameters" in run("Host", "ping2", "-h", "-a", nobody).stdout
    wrong = run("Host", "ecko", "-h", "-a", nobody)
    assert (wrong.returncode, wrong.stdout) == (exits.USAGE, "")
    assert "did you mean Host echo?" in wrong.stderr


# -- spelt wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("Storage.copyimage", "Storage copyImage"),
        ("storage.CopyImages", "Storage copyImage"),
        ("Host.ping", "Host ping2"),
        ("Host.reboot", None),
    ],
)
def test_a_verb_that_is_nearly_right(run: Run, documented: None, asked: str, near: str | None) -> None:
    done = run(*asked.split("."))
    assert done.returncode == exits.USAGE
    assert re.findall(r"did you mean: (.*)", done.stderr) == ([near] if near else [])
    assert f"There is no method {asked}" in done.stderr


@pytest.mark.parametrize(
    ("parameter", "reason", "near"),
    [
        ("targetrepoid", "unknown parameter", ["targetRepoId"]),
        ("options.strateg", "unknown parameter", ["options.strategy"]),
        ("disks.0.imageID", "unknown parameter", ["disks[].imageId"]),
        ("colour", "unknown parameter", []),
        ("targetrepoid", "Input should be a valid string", []),
    ],
)
def test_a_parameter_that_is_nearly_right(
    agent: fake_agent.Agent, run: Run, documented: None, parameter: str, reason: str, near: list[str]
) -> None:
    agent.verbs["Storage.copyImage"] = raising(errors.InvalidParameters(parameter=parameter, reason=reason))
    done = run("Storage", "copyImage", "x=1")
    assert done.returncode == exits.USAGE
    assert re.findall(r"did you mean: (.*)", done.stderr) == near


def test_an_agent_that_describes_nothing_hides_no_failure(run: Run) -> None:
    done = run("Host", "ping")
    assert done.returncode == exits.USAGE
    assert "There is no method Host.ping" in done.stderr and "did you mean" not in done.stderr


def test_the_module_is_the_command(address: str) -> None:
    argv = [sys.executable, "-m", "vdsm.client", "-a", address, "Host", "echo", "message=hi"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, '"hi"\n', "")


def test_table_of_chosen_columns() -> None:
    rows = [{"id": "a", "size": 1, "long": "x"}, {"id": "b", "size": None}]
    assert list(output.table(rows, ["size", "id"])) == ["size  id", "1 B   a", "-     b"]


# -- tables for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("size", 3 << 30, "3.0 GiB"),
        ("storedSize", 196624, "192.0 KiB"),
        ("freeBytes", None, "-"),
        ("size", "7", "7"),
        ("resize", 2048, "2048"),
        ("created", 0, "1970-01-01 00:00:00"),
        ("ended", 86399.9, "1970-01-01 23:59:59"),
        ("generation", 0, "0"),
        ("foreign", True, "true"),
    ],
)
def test_sizes_and_times_are_spelt_for_people(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, shown: str
) -> None:
    # Times are local: of a zone that the test knows.
    monkeypatch.setattr(time, "localtime", time.gmtime)
    assert list(output.table({name: value})) == [f"{name}  {shown}"]
    assert output.compact({name: value}) == json.dumps({name: value})


def test_wide_characters_keep_the_columns_straight() -> None:
    rows = [{"name": "家", "id": "1"}, {"name": "u\u0308", "id": "2"}, {"name": "ascii", "id": "3"}]
    assert list(output.table(rows)) == ["name   id", "家     1", "u\u0308      2", "ascii  3"]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (31, ["name   place", "image  a long place of an image"]),
        (26, ["name   place", "image  a long place of an~"]),
        (5, ["name   place", "image  a long ~"]),
    ],
)
def test_what_does_not_fit_into_a_line_of_the_terminal_is_cut(
    monkeypatch: pytest.MonkeyPatch, width: int, lines: list[str]
) -> None:
    # A terminal that has no character for "cut".
    monkeypatch.setattr(output, "_speaks_unicode", lambda: False)
    rows = [{"name": "image", "place": "a long place of an image"}]
    assert list(output.table(rows, (), width)) == lines


def on_terminal(columns: int, *argv: str) -> str:
    """What the command shows on a terminal so wide."""
    shown, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.run([*COMMAND, *argv], stdout=terminal, stderr=subprocess.PIPE, timeout=30, env=ENVIRONMENT)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # EIO is how a terminal without its other side ends
        while select.select([shown], [], [], 5)[0]:
            text += os.read(shown, 4096)
    os.close(shown)
    assert (done.returncode, done.stderr) == (0, b"")
    return text.decode()


def test_a_table_is_as_wide_as_the_terminal_and_whole_in_a_pipe(
    agent: fake_agent.Agent, address: str, run: Run
) -> None:
    agent.verbs["Host.list"] = lambda call: [{"id": "1", "text": "x" * 200}]
    lines = on_terminal(60, "-a", address, "-o", "table", "Host", "list").splitlines()
    assert [len(line) for line in lines] == [len("id        text") - 6, 60]
    assert lines[1].endswith("x…")
    assert run("-o", "table", "Host", "list").stdout.splitlines()[1] == "1   " + "x" * 200
