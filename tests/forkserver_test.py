"""The fork server: real children, their messages, and what happens to those that die."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forkserver_targets
from tests.until import exists, running, until, zombie
from vdsm import channels, errors, forkserver

TARGETS = forkserver_targets.__name__


@pytest.fixture(scope="module")
def server() -> Iterator[forkserver.ForkServer]:
    server = forkserver.ForkServer([TARGETS])
    yield server
    server.stop()


# -- channels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[channels.Channel, channels.Channel]]:
    left, right = (channels.Channel(line) for line in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_keep_their_borders(ends: tuple[channels.Channel, channels.Channel]) -> None:
    left, right = ends
    for number in range(3):
        left.send({"n": number, "text": "ä" * number})
    assert [right.receive(1) for _ in range(3)] == [{"n": n, "text": "ä" * n} for n in range(3)]


def test_a_timeout_loses_nothing(ends: tuple[channels.Channel, channels.Channel]) -> None:
    left, right = ends
    frame = b'\0\0\0\x07{"a":1}'
    os.write(left.fileno(), frame[:6])
    with pytest.raises(TimeoutError):
        right.receive(0.01)
    os.write(left.fileno(), frame[6:])
    assert right.receive(1) == {"a": 1}


def test_the_end_is_none_and_sending_into_it_fails(ends: tuple[channels.Channel, channels.Channel]) -> None:
    left, right = ends
    left.close()
    assert right.receive(1) is None
    with pytest.raises(ConnectionError):
        right.send({})


def test_a_frame_that_claims_too_much_is_refused(ends: tuple[channels.Channel, channels.Channel]) -> None:
    left, right = ends
    os.write(left.fileno(), b"\xff\xff\xff\xff")
    with pytest.raises(ConnectionError):
        right.receive(1)
    with pytest.raises(ValueError, match="bytes"):
        left.send({"big": "x" * channels.MAX_FRAME_BYTES})


# -- children --------------------------------------------------------------------------------------------------------


def test_a_child_has_the_code_loaded_and_talks(server: forkserver.ForkServer) -> None:
    with server.spawn(f"{TARGETS}:echo", {"a": [1, "ü"]}) as child:
        said = child.channel.receive(10)
        assert said is not None
        assert (said["argument"], said["pid"]) == ({"a": [1, "ü"]}, child.pid)
        assert said["preloaded_in"] == said["parent"] == server.pid
        assert said["session"] == child.pid
        child.channel.send({"hello": 1})
        assert child.channel.receive(10) == {"hello": 1}
        child.channel.close()
        assert child.wait_exit(10) == 0
        assert child.wait_gone(10)


def test_a_child_has_no_descriptor_of_another(server: forkserver.ForkServer) -> None:
    """A second child must not keep the first one's lines open, or nobody would see the first one end."""
    counts = []
    with contextlib.ExitStack() as children:
        for _ in range(3):
            child = children.enter_context(server.spawn(f"{TARGETS}:echo", {}))
            said = child.channel.receive(10)
            assert said is not None
            counts.append(said["fd_count"])
    assert len(set(counts)) == 1


@pytest.mark.parametrize("code", [0, 1, 77])
def test_exit_codes_arrive(server: forkserver.ForkServer, code: int) -> None:
    with server.spawn(f"{TARGETS}:leave", {"code": code}) as child:
        assert [child.wait_exit(10), child.wait_exit(0)] == [code, code]


def test_a_failing_child_exits_with_1(server: forkserver.ForkServer) -> None:
    with server.spawn(f"{TARGETS}:fail", {}) as child:
        assert child.channel.receive(10) is None
        assert child.wait_exit(10) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_reach_the_child_and_no_stranger_after_it(server: forkserver.ForkServer, number: int) -> None:
    with server.spawn(f"{TARGETS}:sleep", {}) as child:
        child.channel.receive(10)
        with pytest.raises(TimeoutError):
            child.wait_exit(0.01)
        child.kill(number)
        assert child.wait_exit(10) == -number
        until(lambda: not exists(child.pid))
        child.kill(number)


def test_descriptors_are_handed_over(server: forkserver.ForkServer) -> None:
    reader, writer = os.pipe()
    try:
        with server.spawn(f"{TARGETS}:write", {}, fds=[writer]) as child:
            assert child.wait_exit(10) == 0
            assert os.read(reader, 100) == b"from the child"
    finally:
        os.close(reader)
        os.close(writer)


def test_only_preloaded_modules_can_be_spawned(server: forkserver.ForkServer) -> None:
    with pytest.raises(ValueError, match="os:_exit"):
        server.spawn("os:_exit", {})


def test_a_large_argument_arrives(server: forkserver.ForkServer) -> None:
    with server.spawn(f"{TARGETS}:echo", {"text": "x" * 3_000_000}) as child:
        said = child.channel.receive(10)
        assert said is not None
        assert len(said["argument"]["text"]) == 3_000_000


# -- the dead --------------------------------------------------------------------------------------------------------


def test_a_dead_child_stays_unreaped_while_somebody_holds_its_liveness_pipe(
    server: forkserver.ForkServer, tmp_path: Path
) -> None:
    """The holder is this process: one that the server cannot kill, as a tool stuck in frozen storage would be."""
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        with server.spawn(f"{TARGETS}:adopt_out", {"address": address}) as child:
            line, _ = listener.accept()
            with line:
                _, (held,), _, _ = socket.recv_fds(line, 1, 1)
            assert child.channel.receive(10) == {"handed": True}
            child.kill()
            assert child.wait_exit(10) == -signal.SIGKILL
            assert not child.wait_gone(0.2)
            assert zombie(child.pid)
            os.write(held, b"noise in the pipe is not its end")
            assert not child.wait_gone(0.1)
            os.close(held)
            assert child.wait_gone(10)
            until(lambda: not exists(child.pid))


@pytest.mark.parametrize("inherit", [True, False], ids=["holds the pipe", "closed everything"])
@pytest.mark.parametrize("daemon", [True, False], ids=["daemon", "child"])
def test_what_outlives_its_child_is_killed(
    server: forkserver.ForkServer, tmp_path: Path, inherit: bool, daemon: bool
) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec sleep 60"
    argv = ["setsid", "--fork", "sh", "-c", script] if daemon else ["sh", "-c", script]
    with server.spawn(f"{TARGETS}:start_tool", {"argv": argv, "inherit": inherit}) as child:
        assert child.channel.receive(10)
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        tool = int((tmp_path / "pid").read_text())
        assert running(tool)
        child.kill()
        assert child.wait_gone(10)
        until(lambda: not exists(tool))
        until(lambda: not exists(child.pid))


def test_a_living_child_keeps_its_tools_when_another_dies(server: forkserver.ForkServer) -> None:
    with (
        server.spawn(f"{TARGETS}:start_tool", {"argv": ["sleep", "60"], "inherit": True}) as living,
        server.spawn(f"{TARGETS}:start_tool", {"argv": ["sleep", "60"], "inherit": True}) as dying,
    ):
        kept, lost = living.channel.receive(10), dying.channel.receive(10)
        assert kept is not None
        assert lost is not None
        dying.kill()
        until(lambda: not exists(lost["tool"]))
        assert running(kept["tool"])


# -- the server ------------------------------------------------------------------------------------------------------


def test_children_die_with_the_server_and_the_next_spawn_starts_another() -> None:
    server = forkserver.ForkServer([TARGETS])
    try:
        with server.spawn(f"{TARGETS}:sleep", {}) as child:
            child.channel.receive(10)
            first = server.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            assert child.wait_exit(10) == -signal.SIGKILL
            assert child.wait_gone(10)
            with server.spawn(f"{TARGETS}:leave", {"code": 5}) as successor:
                assert successor.wait_exit(10) == 5
            assert server.pid != first
    finally:
        server.stop()


def test_stop_waits_for_children_and_then_kills_them() -> None:
    server = forkserver.ForkServer([TARGETS])
    with server.spawn(f"{TARGETS}:sleep", {}) as child:
        child.channel.receive(10)
        server.stop(timeout_s=0.2)
        until(lambda: not running(child.pid))
    assert server.pid is None


def test_a_module_that_cannot_be_imported_is_an_error_not_a_hang(capfd: pytest.CaptureFixture[str]) -> None:
    server = forkserver.ForkServer(["no_such_module"])
    with pytest.raises(errors.Unexpected, match="fork server died"):
        server.spawn("no_such_module:run", {})
    server.stop()
    assert "no_such_module" in capfd.readouterr().err


def test_the_server_ends_after_its_last_child_when_the_agent_is_killed(tmp_path: Path) -> None:
    agent_code = (
        "import sys, json, time; sys.path[:] = json.loads(sys.argv[1])\n"
        "from vdsm import forkserver\n"
        f"server = forkserver.ForkServer(['{TARGETS}'])\n"
        f"child = server.spawn('{TARGETS}:echo', {{}})\n"
        "print(server.pid, child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", agent_code, json.dumps(sys.path)], stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        server_pid, child_pid = map(int, agent.stdout.readline().split())
        agent.kill()
    until(lambda: not running(child_pid))
    until(lambda: not running(server_pid))
