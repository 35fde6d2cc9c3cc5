"""Programs: output, deadlines, limits, and that none of them outlives what started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.until import running, until
from vdsm import errors, programs


def pid_in(path: Path) -> int:
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def test_run_returns_what_the_program_said() -> None:
    completed = programs.run(["sh", "-c", "cat; echo problem >&2; exit 3"], timeout_s=10, input_bytes=b"given")
    assert completed == programs.Completed(3, b"given", b"problem\n")


def test_output_is_in_the_language_of_the_parser() -> None:
    completed = programs.run(["env"], timeout_s=10, env={"COLOUR": "red"})
    assert {b"LC_ALL=C.UTF-8", b"COLOUR=red"} <= set(completed.stdout.splitlines())


def test_run_kills_the_whole_group_at_the_deadline(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! >{tmp_path}/pid; wait"
    with pytest.raises(errors.DeadlinePassed):
        programs.run(["sh", "-c", script], timeout_s=2)
    until(lambda: not running(pid_in(tmp_path / "pid")))


def escaping(pid_file: Path) -> str:
    """Shell: a program that no kill of the group reaches keeps the output open. Its pid is in the file."""
    return f"setsid sh -c 'echo $$ >{pid_file}; exec sleep 90' & until [ -s {pid_file} ]; do sleep 0.01; done"


def test_run_returns_at_the_deadline_though_an_escaped_child_holds_the_pipe(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(errors.DeadlinePassed):
        programs.run(["sh", "-c", f"{escaping(tmp_path / 'pid')}; wait"], timeout_s=2)
    assert time.monotonic() - began < 60
    os.kill(pid_in(tmp_path / "pid"), signal.SIGKILL)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(errors.ToolFailed, match="no-such-program"):
        programs.run(["no-such-program"], timeout_s=1)
    with pytest.raises(errors.ToolFailed, match="no-such-program"):
        programs.start(["no-such-program"])


def test_check_tells_the_last_line() -> None:
    failed = programs.run(["sh", "-c", "echo first >&2; echo last >&2; exit 2"], timeout_s=10)
    with pytest.raises(errors.ToolFailed) as caught:
        programs.check(failed, "example")
    assert caught.value.facts == {"program": "example", "exit_code": 2, "reason": "last", "output": ["first", "last"]}
    good = programs.Completed(0, b"fine", b"")
    assert programs.check(good, "example") is good


def test_lines_arrive_while_the_program_runs_and_progress_bars_count_as_lines() -> None:
    lines: list[str] = []
    script = r"printf '(1.00/100%%)\r(2.00/100%%)\r'; echo error >&2; printf unended"
    completed = programs.start(["sh", "-c", script], on_line=lines.append).wait(10)
    assert lines == ["(1.00/100%)", "(2.00/100%)", "error", "unended"]
    assert completed.exit_code == 0


def test_wait_passes_its_deadline_and_kills() -> None:
    program = programs.start(["sleep", "60"])
    with pytest.raises(errors.DeadlinePassed):
        program.wait(0.2)
    assert not running(program.pid)


def test_wait_returns_although_a_daemon_keeps_the_output_open(tmp_path: Path) -> None:
    program = programs.start(["sh", "-c", f"{escaping(tmp_path / 'pid')}; exit 4"])
    assert program.wait(60).exit_code == 4
    os.kill(pid_in(tmp_path / "pid"), signal.SIGKILL)


def test_the_rest_of_the_group_ends_with_the_program(tmp_path: Path) -> None:
    program = programs.start(["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid"])
    assert program.wait(10).exit_code == 0
    until(lambda: not running(pid_in(tmp_path / "pid")))


def test_a_failing_reader_leaves_no_program_behind() -> None:
    def refuse(line: str) -> None:
        raise errors.Aborted()

    program = programs.start(["sh", "-c", "echo one; sleep 60"], on_line=refuse)
    with pytest.raises(errors.Aborted):
        program.wait(10)
    assert not running(program.pid)


def test_kill_from_another_thread_ends_the_wait() -> None:
    program = programs.start(["sleep", "60"])
    threading.Timer(0.1, program.kill).start()
    assert program.wait(10).exit_code == -signal.SIGKILL
    program.kill()  # of an ended program: nothing happens


@pytest.mark.parametrize("die_with_parent", [True, False])
def test_a_program_dies_with_the_thread_that_started_it(die_with_parent: bool) -> None:
    started: list[programs.Running] = []

    def start() -> None:
        started.append(programs.start(["sleep", "60"], die_with_parent=die_with_parent))
        until(lambda: Path(f"/proc/{started[0].pid}/comm").read_text() == "sleep\n")

    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
    program = started[0]
    if die_with_parent:
        assert program.wait(10).exit_code == -signal.SIGKILL
    else:
        with pytest.raises(errors.DeadlinePassed):
            program.wait(0.3)


def test_limits_are_set_before_the_program_starts() -> None:
    limits = programs.Limits(address_space_bytes=1 << 30, cpu_s=7)
    completed = programs.run(["sh", "-c", "ulimit -v; ulimit -t"], timeout_s=10, limits=limits)
    assert completed.stdout.split() == [b"1048576", b"7"]


def test_cpu_limit_ends_a_spinning_program() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    completed = programs.run(spin, timeout_s=30, limits=programs.Limits(cpu_s=1))
    assert completed.exit_code in (-signal.SIGXCPU, -signal.SIGKILL)


def test_only_passed_descriptors_are_inherited() -> None:
    kept, dropped = os.pipe()
    try:
        os.set_inheritable(dropped, True)
        program = programs.run(["sh", "-c", "ls /proc/self/fd"], timeout_s=10, pass_fds=[kept])
        assert str(kept).encode() in program.stdout.split()
        assert str(dropped).encode() not in program.stdout.split()
    finally:
        os.close(kept)
        os.close(dropped)


def test_no_program_is_left_unreaped() -> None:
    before = list(subprocess._active)  # type: ignore[attr-defined]  # private: what Popen still has to reap
    for _ in range(3):
        programs.start(["true"]).wait(10)
        programs.run(["true"], timeout_s=10)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any("(true)" in Path(f"/proc/{pid}/stat").read_text() for pid in children)
    assert subprocess._active == before  # type: ignore[attr-defined]  # as above


def test_program_that_says_it_lost_its_writes_has_failed() -> None:
    """qemu-img ends with 0 when the last table of the image that it closes cannot be written (trap 27)."""
    lost = "qemu-img: Failed to flush the L2 table cache: Disk quota exceeded"
    ended = programs.run(["sh", "-c", f"echo '{lost}' >&2"], timeout_s=10)
    with pytest.raises(errors.ToolFailed) as refused:
        programs.check(ended, "qemu-img")
    assert refused.value.facts["reason"] == lost
