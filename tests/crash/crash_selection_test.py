"""The share of `make test`: small each time, and all of it in the end."""

from pathlib import Path

from tests.crash import matrix, selection, tracing

WAYS = ("kill", "EIO", "ENOSPC")


def test_fifths_in_a_row_meet_each_step_and_in_the_end_each_way_of_it() -> None:
    steps = [tracing.Step("pwritev2", number, "main/images/ID") for number in range(13)]
    cases = [
        matrix.Case("removeImage", "main-1", step, kind)
        for step in steps
        for kind in WAYS[: 1 + step.number % len(WAYS)]
    ]
    once = [selection.fifth(cases, start) for start in range(7, 7 + selection.PARTS)]
    assert sorted(case.step for chosen in once for case in chosen) == steps
    rounds = selection.PARTS * len(WAYS)
    assert {case for start in range(7, 7 + rounds) for case in selection.fifth(cases, start)} == set(cases)


def test_a_call_that_the_kernel_makes_again_by_itself_counts_once(tmp_path: Path) -> None:
    log = tmp_path / "main-1.log"
    again = "vfork() = ? ERESTARTNOINTR (To be restarted)\n"
    log.write_text(f"{again}{again}vfork() = 4711\n--- SIGCHLD {{si_signo=SIGCHLD}} ---\nvfork() = 4712\n")
    assert [step.name for step in tracing.steps(log, {})] == ["vfork#1", "vfork#2"]
