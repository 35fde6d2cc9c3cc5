"""The share of `make test`: small each time, and all of it in the end."""

from pathlib import Path
from typing import Any

from tests.crash import matrix, selection, shared, tracing

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


def test_between_hosts_what_is_alike_comes_once_before_anything_twice() -> None:
    blocks = [tracing.Step("pwrite64", number, "main/images/ID") for number in range(200)]
    others = [tracing.Step("fsync", number, f"main/{number}") for number in range(4)]
    cases = [matrix.Case("createVirtualDisk", "main-1", step, "kill") for step in (*blocks, *others)]
    first = shared.chosen(_order(each=5), cases)
    assert {case.step for case in others_of(first)} == set(others) and len(first) == 5
    done = tuple(str(case) for case in first)
    second = shared.chosen(_order(each=3, done=done), cases)
    assert len(second) == 3 and not {str(case) for case in second} & set(done)
    assert shared.chosen(_order(seed=8, each=200), cases) != shared.chosen(_order(seed=9, each=200), cases)


def others_of(cases: list[matrix.Case]) -> list[matrix.Case]:
    return [case for case in cases if case.step.call == "fsync"]


def _order(**given: Any) -> shared.Order:
    return shared.Order((), "4.2", "", "", "", ("", 0), 4, **given)
