"""The root helper as a process: who may call, what it survives, how calls end, what the audit trail says."""

import concurrent.futures
import contextlib
import datetime
import json
import os
import select
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import supervdsm_process as processes

from supervdsm import calls, client, contract, frames

pytestmark = processes.needs_root

# Connects with the system's Python as another user, sends one call and prints the answer, or why there is none.
OTHER_USER = """
import os, socket, struct, sys
link = socket.socket(socket.AF_UNIX)
try:
    link.connect(sys.argv[1])
    call = b'{"call": "GetHardwareInfo", "arguments": {}}'
    try:
        link.sendall(struct.pack("!I", len(call)) + call)
    except BrokenPipeError:
        pass
    print(os.getpid(), link.recv(65536)[4:].decode())
except OSError as error:
    print(os.getpid(), type(error).__name__)
"""


@pytest.fixture
def helper() -> Iterator[processes.Process]:
    with processes.running() as process:
        yield process


def call_as(user: int, path: str) -> tuple[int, str]:
    """(pid, what it got)"""
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    command = [*drop, "/usr/bin/python3", "-I", "-c", OTHER_USER, path]
    pid, _, said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition(" ")
    return int(pid), said


# -- who may call ----------------------------------------------------------------------------------------------------


def test_the_socket_belongs_to_the_agent_alone(helper: processes.Process) -> None:
    found = Path(helper.socket).stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, processes.AGENT_UID)
    left = {"audit", "data", "svdsm.sock"}
    processes.until(lambda: {path.name for path in helper.place.iterdir()} == left, "nothing else is left there")


def test_root_and_the_agent_are_served(helper: processes.Process) -> None:
    for uid in (0, processes.AGENT_UID):
        pid, said = call_as(uid, helper.socket)
        assert json.loads(said).keys() == {"result"}
        assert {"pid": pid, "uid": uid, "outcome": "done"}.items() <= helper.lines()[-1].items()


def test_a_stranger_cannot_even_connect(helper: processes.Process) -> None:
    assert call_as(processes.STRANGER_UID, helper.socket)[1] == "PermissionError"


def test_a_stranger_is_refused_when_the_socket_stands_open(helper: processes.Process) -> None:
    Path(helper.socket).chmod(0o666)
    pid, said = call_as(processes.STRANGER_UID, helper.socket)
    reason = f"user {processes.STRANGER_UID} may not call"
    assert json.loads(said) == processes.error("refused", reason)
    (line,) = helper.lines()
    del line["time"]
    assert line == {
        **{"pid": pid, "uid": processes.STRANGER_UID, "call": None, "arguments": None},
        **{"outcome": "refused", "reason": reason, "ms": 0.0},
    }


# -- the audit trail -------------------------------------------------------------------------------------------------


def test_audit_lines_are_exact(helper: processes.Process) -> None:
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(milliseconds=1)
    good, absent = f"{helper.data}/a", f"{helper.data}/no/a"
    processes.call(helper.socket, "PrepareDirectory", path=good)
    processes.call(helper.socket, "PrepareDirectory", path=absent)
    processes.call(helper.socket, "PrepareDirectory", path="/etc/a")
    processes.call(helper.socket, "PrepareDirectory", path="../a", mode=1)
    processes.call(helper.socket, "Run\n" * 100, argv=["sh"] * 100)
    processes.ask(helper.socket, processes.frame(b"GET / HTTP/1.1"))
    processes.ask(helper.socket, b"GET / HTTP/1.1\r\n\r\n")
    not_under = f"is not under a configured directory ({helper.data})"
    expected = [
        ("PrepareDirectory", {"path": good}, "done", None),
        ("PrepareDirectory", {"path": absent}, "failed", "no: No such file or directory"),
        ("PrepareDirectory", {"path": "/etc/a"}, "refused", f"/etc/a {not_under}"),
        ("'PrepareDirectory'", "{'mode': 1, 'path': '../a'}", "refused", "unknown field 'mode'"),
        (repr("Run\n" * 100)[:98] + "..." + repr("Run\n" * 100)[-99:], None, "refused", "unknown call"),
        (None, None, "refused", "not strict JSON"),
        (None, None, "refused", f"a frame of {int.from_bytes(b'GET ', 'big')} bytes; the limit is 65536"),
    ]
    lines = helper.lines()
    assert len(lines) == len(expected)
    for line, (name, arguments, outcome, reason) in zip(lines, expected, strict=True):
        assert list(line) == ["time", "pid", "uid", "call", "arguments", "outcome", "reason", "ms"]
        assert before <= datetime.datetime.fromisoformat(line["time"]) <= datetime.datetime.now(datetime.UTC)
        assert (line["pid"], line["uid"]) == (os.getpid(), 0)
        assert (line["call"], line["outcome"], line["reason"]) == (name, outcome, reason)
        assert 0 <= line["ms"] < 10_000
        if arguments is not None:
            assert line["arguments"] == arguments
    assert lines[4]["arguments"] == "{'argv': ['sh', 'sh', 'sh', 'sh', 'sh', 'sh', ...]}"


@pytest.mark.parametrize("port", [0, "3260"], ids=["refused by a rule", "refused by its type"])
def test_a_secret_is_not_audited(helper: processes.Process, port: int | str) -> None:
    """Of a call that is refused neither; where it is not, the lab's tests look."""
    answer = processes.call(helper.socket, "DiscoverTargets", host="a", port=port, user="joe", password="s3cret")
    assert answer["error"]["kind"] == "refused"
    assert "joe" in helper.trail.read_text()
    assert "s3cret" not in helper.trail.read_text()


def test_only_root_reads_the_audit_trail_and_it_is_appended() -> None:
    with processes.place() as place:
        trail = place / "audit"
        trail.write_text('{"old": 1}\n')
        trail.chmod(0o666)
        helper = processes.Process(place).ready()
        processes.call(helper.socket, "GetHardwareInfo")
        assert helper.stop() == 0
        found = trail.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 0, 0)
        assert [next(iter(line)) for line in helper.lines()] == ["old", "time"]


def test_the_audit_trail_can_be_rotated(helper: processes.Process) -> None:
    processes.call(helper.socket, "GetHardwareInfo")
    helper.trail.rename(helper.place / "audit.1")
    processes.call(helper.socket, "GetHardwareInfo")
    assert len(helper.lines()) == 1
    assert stat.S_IMODE(helper.trail.stat().st_mode) == 0o600


def test_lines_of_calls_at_once_do_not_mix(helper: processes.Process) -> None:
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        paths = [f"{helper.data}/{number}-{'x' * 200}" for number in range(40)]
        made = list(pool.map(lambda path: client.Helper(helper.socket).call(calls.PrepareDirectory(path)), paths))
    assert all(directory.created for directory in made)
    assert {line["arguments"]["path"] for line in helper.lines()} == set(paths)
    assert len(helper.lines()) == len(paths)


# -- what it survives ------------------------------------------------------------------------------------------------

TOO_LARGE = frames.MAX_CALL_BYTES + 1
GARBAGE = {
    "random bytes": (bytes(range(256)) * 4, "a frame of 66051 bytes; the limit is 65536"),
    "an empty frame": (processes.frame(b""), "not strict JSON"),
    "just too large": (processes.LENGTH.pack(TOO_LARGE), f"a frame of {TOO_LARGE} bytes; the limit is 65536"),
    "as large as may be": (processes.frame(b"[" * frames.MAX_CALL_BYTES), "not strict JSON"),
    "4 GiB": (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes; the limit is 65536"),
    "a pickle": (processes.frame(b"\x80\x04cos\nsystem\n"), "not strict JSON"),
}


@pytest.mark.parametrize(("sent", "reason"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_and_the_helper_lives(helper: processes.Process, sent: bytes, reason: str) -> None:
    assert processes.ask(helper.socket, sent) == processes.error("refused", reason)
    assert "result" in processes.call(helper.socket, "GetHardwareInfo")
    assert [line["reason"] for line in helper.lines()] == [reason, None]


@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0\x10", b"\0\0\0\x02{"], ids=["head", "no body", "body"])
def test_a_connection_that_ends_inside_a_frame_is_refused(helper: processes.Process, sent: bytes) -> None:
    with processes.connect(helper.socket) as link:
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        assert processes.reply(link) == processes.error("refused", "the connection ended inside a frame")


def test_a_connection_without_a_byte_asks_nothing(helper: processes.Process) -> None:
    processes.connect(helper.socket).close()
    processes.call(helper.socket, "GetHardwareInfo")
    assert [line["call"] for line in helper.lines()] == ["GetHardwareInfo"]


def test_a_caller_that_goes_away_still_has_its_line(helper: processes.Process) -> None:
    with processes.connect(helper.socket) as link:
        link.sendall(processes.frame({"call": "PrepareDirectory", "arguments": {"path": f"{helper.data}/a"}}))
    processes.until(helper.lines, "the audit line")
    assert helper.lines()[0]["outcome"] == "done"
    assert "result" in processes.call(helper.socket, "GetHardwareInfo")


def test_slow_senders_hold_up_nobody() -> None:
    with processes.running(processes.extended(session={"READ_S": 5.0})) as helper, contextlib.ExitStack() as opened:
        slow = [opened.enter_context(processes.connect(helper.socket)) for _ in range(20)]
        for link in slow:
            link.sendall(b"\0\0")
        assert "result" in processes.call(helper.socket, "GetHardwareInfo")
        assert select.select(slow, [], [], 0)[0] == [], "answered before any of them was given up"
        # A byte now and then does not buy more time.
        slow[0].send(b"\1\0")  # a call of 256 bytes
        trickled = 0
        with contextlib.suppress(ConnectionError):
            while trickled < 250:
                slow[0].send(b" ")
                trickled += 1
                threading.Event().wait(0.1)
        assert trickled < 250
        for link in slow[1:]:
            assert processes.reply(link) == processes.error("refused", "no whole call within 5 s")


# -- how calls end ---------------------------------------------------------------------------------------------------


def hang(helper: processes.Process, name: str = "hang") -> tuple[socket.socket, list[int]]:
    """A connection with a call that never ends, and its processes: the worker and a program it started."""
    pid_file = helper.place / name
    link = processes.connect(helper.socket)
    link.sendall(processes.frame({"call": "Hang", "arguments": {"pid_file": str(pid_file)}}))
    processes.until(pid_file.exists, "the call hangs")
    return link, [int(pid) for pid in pid_file.read_text().split()]


def none_alive(pids: list[int]) -> bool:
    return not any(processes.alive(pid) for pid in pids)


def test_a_hanging_call_is_killed_at_its_deadline_and_stops_nobody() -> None:
    with processes.running(processes.extended(hang_s=2)) as helper:
        link, pids = hang(helper)
        with link:
            assert "result" in processes.call(helper.socket, "GetHardwareInfo")
            assert processes.reply(link) == processes.error("deadline", "no end after 2 s")
        processes.until(lambda: none_alive(pids), "the worker and its program are gone")
        processes.until(lambda: not helper.children(), "the session is gone")
        quick, hung = helper.lines()
        assert (quick["call"], hung["call"], hung["outcome"]) == ("GetHardwareInfo", "Hang", "deadline")
        assert hung["arguments"] == {"pid_file": str(helper.place / "hang")}
        assert hung["ms"] >= 2000


def test_a_program_may_finish_what_it_is_in_the_middle_of() -> None:
    """As LVM, which has suspended a device."""
    with processes.running(processes.extended()) as helper:
        path = helper.place / "finished"
        assert processes.call(helper.socket, "Finish", path=str(path)) == processes.error(
            "deadline", "no end after 0.5 s"
        )
        assert path.exists()


def test_calls_over_the_limit_are_refused_and_audited() -> None:
    limits = processes.extended(hang_s=30, server={"MAX_CALLS": 2, "PATIENCE_S": 0.3})
    with processes.running(limits) as helper, contextlib.ExitStack() as opened:
        for name in ("a", "b"):
            opened.enter_context(hang(helper, name)[0])
        refused = processes.error("unavailable", "2 calls are running")
        assert processes.call(helper.socket, "GetHardwareInfo") == refused
        assert {"call": None, "outcome": "unavailable"}.items() <= helper.lines()[-1].items()


def test_a_call_waits_a_moment_for_room() -> None:
    limits = processes.extended(hang_s=1, server={"MAX_CALLS": 1, "PATIENCE_S": 8})
    with processes.running(limits) as helper:
        link, _ = hang(helper)
        with link:
            assert "result" in processes.call(helper.socket, "GetHardwareInfo")


FAILURES = {
    "fault": ("failed", "unexpected RuntimeError, see the helper's log"),
    "os": ("failed", "Permission denied"),
    "die": ("failed", "the call's process died"),
    "shape": ("failed", "unexpected TypeError, see the helper's log"),
    "member": ("failed", "the reply is not of this contract: done: bool expected, not str"),
}


@pytest.mark.parametrize(("how", "answer"), FAILURES.items(), ids=FAILURES.keys())
def test_a_failing_call_says_so_without_its_insides(how: str, answer: tuple[str, str]) -> None:
    with processes.running(processes.extended()) as helper:
        assert processes.call(helper.socket, "Fail", how=how) == processes.error(*answer)
        assert (helper.lines()[0]["outcome"], helper.lines()[0]["reason"]) == answer


@contextlib.contextmanager
def frozen(directory: Path) -> Iterator[Callable[[], None]]:
    """A file system of its own is mounted on `directory` and frozen: who writes to it sleeps uninterruptibly, and no
    signal ends that. Yields what thaws and unmounts it, which the end does anyway."""
    with processes.place() as place, contextlib.ExitStack() as undo:
        image = place / "image"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
        mounting = subprocess.run(["mount", "-o", "loop", str(image), str(directory)], capture_output=True, text=True)
        if mounting.returncode:
            pytest.skip(f"needs loop devices: {mounting.stderr}")
        undo.callback(lambda: processes.until(lambda: run("umount", str(directory)), "unmounted"))
        # Should this process itself get stuck on the frozen file system, nobody else would thaw it.
        guard = subprocess.Popen(["sh", "-c", 'sleep 20; fsfreeze -u "$0"', str(directory)], start_new_session=True)
        undo.callback(guard.wait)
        undo.callback(lambda: os.killpg(guard.pid, signal.SIGKILL))
        assert run("fsfreeze", "-f", str(directory))
        undo.callback(lambda: run("fsfreeze", "-u", str(directory)))
        yield undo.close


def run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def test_storage_that_cannot_be_interrupted_holds_up_one_place_only() -> None:
    limits = processes.extended(prepare_s=0.5, server={"MAX_CALLS": 2, "PATIENCE_S": 0.2})
    with processes.running(limits) as helper, frozen(helper.data) as thaw:
        stuck = processes.call(helper.socket, "PrepareDirectory", path=f"{helper.data}/a")
        assert stuck == processes.error("deadline", "no end after 0.5 s")
        # SIGKILL was sent, and the worker is still there: it counts until the storage lets it go.
        assert len([pid for pid in helper.children() if processes.alive(pid)]) == 2
        assert "result" in processes.call(helper.socket, "GetHardwareInfo")
        processes.call(helper.socket, "PrepareDirectory", path=f"{helper.data}/b")
        assert processes.call(helper.socket, "GetHardwareInfo") == processes.error("unavailable", "2 calls are running")
        thaw()
        processes.until(lambda: not helper.children(), "the stuck workers are gone")
        assert "result" in processes.call(helper.socket, "GetHardwareInfo")


# -- start and end ---------------------------------------------------------------------------------------------------


def test_sigterm_ends_it_and_the_calls_under_way_are_told() -> None:
    with processes.place() as place:
        helper = processes.Process(place, processes.extended(hang_s=60)).ready()
        link, pids = hang(helper)
        with link:
            assert helper.stop(signal.SIGTERM) == 0
            assert processes.reply(link) == processes.error("stopped", "the helper is ending")
        assert none_alive(pids)
        assert helper.lines()[-1]["outcome"] == "stopped"
        assert not Path(helper.socket).exists()


def test_a_killed_helper_takes_its_calls_along_and_a_new_one_takes_the_socket() -> None:
    with processes.place() as place:
        helper = processes.Process(place, processes.extended(hang_s=60)).ready()
        link, pids = hang(helper)
        with link:
            assert helper.stop(signal.SIGKILL) == -signal.SIGKILL
            processes.until(lambda: none_alive(pids), "the worker and its program are gone")
        (hung,) = processes.until(helper.lines, "the session, which outlives its worker, writes its line")
        assert hung["outcome"] == "stopped"
        assert Path(helper.socket).exists()
        again = processes.Process(place).ready()
        assert "result" in processes.call(again.socket, "GetHardwareInfo")
        assert again.stop() == 0


def start(place: Path, *more: str) -> str:
    """What a helper that must not start says."""
    process = processes.Process(place, more=more)
    assert process.process.wait(10) == 1
    stderr = process.process.stderr
    assert stderr is not None
    with stderr:
        return stderr.read().decode()


def test_two_helpers_do_not_share_a_socket(helper: processes.Process) -> None:
    assert start(helper.place) == f"supervdsm: --socket {helper.socket}: another helper answers there\n"
    assert "result" in processes.call(helper.socket, "GetHardwareInfo")


def test_it_does_not_start_with_places_that_others_can_change() -> None:
    with processes.place() as place:
        (place / "open").mkdir()
        (place / "open").chmod(0o777)
        (place / "foreign").mkdir()
        os.chown(place / "foreign", processes.AGENT_UID, 0)
        for directory in ("open", "foreign"):
            file = f"{place}/{directory}/log"
            said = start(place, "--log", file)
            assert said.startswith(f"supervdsm: --log {file}: {place}/{directory} must belong to root")
        (place / "open").chmod(0o1777)
        assert processes.Process(place, more=["--log", f"{place}/open/log"]).ready().stop() == 0


@pytest.mark.parametrize("root", ["/", "data", "/srv/", "/srv/../srv", "//srv"])
def test_it_does_not_start_with_a_directory_that_is_not_plain(root: str) -> None:
    with processes.place() as place:
        assert start(place, "--localfs-dir", root).startswith(f"supervdsm: --localfs-dir {root}: give an absolute path")


def test_it_does_not_start_with_a_directory_behind_a_link() -> None:
    with processes.place() as place:
        (place / "link").symlink_to(place / "data")
        said = start(place, "--localfs-dir", f"{place}/link/a")
        assert said.endswith(f"leads through a symbolic link; give {place}/data/a\n")


def test_it_does_not_start_for_an_unknown_user() -> None:
    with processes.place() as place:
        assert "no-such-user" in start(place, "--user", "no-such-user")


# -- the client ------------------------------------------------------------------------------------------------------


def test_the_client_gives_typed_results_and_errors(helper: processes.Process) -> None:
    helper_client = client.Helper(helper.socket)
    made = helper_client.call(calls.PrepareDirectory(f"{helper.data}/a"))
    assert made == calls.PreparedDirectory(path=f"{helper.data}/a", created=True)
    with pytest.raises(contract.Refused, match="/etc is not under a configured directory"):
        helper_client.call(calls.PrepareDirectory("/etc"))
    with pytest.raises(contract.Failed, match="no: No such file or directory"):
        helper_client.call(calls.PrepareDirectory(f"{helper.data}/no/a"))


def test_hardware_is_told_or_a_reason_is(helper: processes.Process) -> None:
    info = client.Helper(helper.socket).call(calls.GetHardwareInfo())
    fields = {name: value for name, value in vars(info).items() if name != "reasons"}
    assert info.reasons.keys() == {name for name, value in fields.items() if value is None}
    if not Path("/sys/class/dmi/id").exists():
        assert set(info.reasons.values()) == {"this machine has no DMI"}


def test_without_a_helper_the_client_says_so() -> None:
    with pytest.raises(contract.Unavailable, match=r"/nowhere/svdsm\.sock: No such file or directory"):
        client.Helper("/nowhere/svdsm.sock").call(calls.GetHardwareInfo())


@contextlib.contextmanager
def odd_server(answer: bytes | None) -> Iterator[str]:
    """A socket whose server answers one call with these bytes and closes, or never answers."""
    with processes.place() as place, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "socket"))
        listener.listen()

        def serve() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(65536)
                if answer is None:
                    link.recv(1)  # until the client gives up
                else:
                    link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(place / "socket")
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (b"", contract.Unavailable, "closed without an answer"),
        (b"\0\0", contract.Unavailable, "the connection ended inside a frame"),
        (b"\xff\xff\xff\xff", contract.Unavailable, "a frame of 4294967295 bytes"),
        (processes.frame([]), contract.Failed, "the reply is not of this contract"),
    ],
    ids=["closed", "cut off", "too large", "odd"],
)
def test_the_client_survives_an_odd_server(answer: bytes, kind: type[Exception], reason: str) -> None:
    with odd_server(answer) as path, pytest.raises(kind, match=reason):
        client.Helper(path).call(calls.GetHardwareInfo())


def test_an_answer_that_is_late_by_the_clock_still_goes_out() -> None:
    here, there = socket.socketpair()
    with here, there:
        frames.send(here, b"answer", time.monotonic() - 1)
        assert frames.receive(there, 100, time.monotonic() + 10) == b"answer"
        with pytest.raises(TimeoutError):  # nobody reads that much
            frames.send(here, bytes(10 << 20), time.monotonic() - 1)


def test_the_client_gives_up_on_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real limits are sized for a busy host: 13 s of waiting in a test.
    monkeypatch.setattr(client, "MARGIN_S", 0.1)
    monkeypatch.setattr(calls.GetHardwareInfo, "deadline_s", 0.1)
    with odd_server(None) as path, pytest.raises(contract.DeadlinePassed, match="no answer from"):
        client.Helper(path).call(calls.GetHardwareInfo())
