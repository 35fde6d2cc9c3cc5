"""Which cases a run takes, how it goes through them, and how one is repeated.

`make test` runs a fifth: every fifth step, from an offset that moves with each commit, so that five commits in a row
have met all of them. CRASH_OFFSET chooses one. CRASH_CASE=VERB/PROCESS/STEP/KIND repeats just that case.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterable

from tests import proof
from tests.crash import matrix, tracing

PARTS = 5


def offset() -> int:
    """Where the fifth begins: the number of commits, so that it moves on by one with each."""
    asked = os.environ.get("CRASH_OFFSET")
    if asked is not None:
        return int(asked)
    counted = subprocess.run(
        ["git", "-C", str(proof.ROOT), "rev-list", "--count", "HEAD"], capture_output=True, text=True, check=False
    )
    return int(counted.stdout or time.strftime("%j"))


def fifth(cases: list[matrix.Case], start: int) -> list[matrix.Case]:
    """Every fifth step, each going wrong in one way. `PARTS` starts in a row give all steps; after as many rounds as
    there are ways for a step, it has gone wrong in all of them."""
    steps: dict[tuple[str, tracing.Step], list[matrix.Case]] = {}
    for case in cases:
        steps.setdefault((case.process, case.step), []).append(case)
    chosen = list(enumerate(steps.values()))[start % PARTS :: PARTS]
    return [ways[(index + start // PARTS) % len(ways)] for index, ways in chosen]


def _quiet(case: matrix.Case, wrong: str | None) -> None:
    """Tells nobody."""


def run(
    ground: matrix.Ground,
    cases: Iterable[matrix.Case],
    each: Callable[[matrix.Case, str | None], None] = _quiet,
    repeats: str = "tests/crash/crash_repeat_test.py",
) -> list[str]:
    """Runs the cases; what is wrong after each, with the command that repeats it, which is `repeats`. `each` is told of
    every case when it has ended, None: all went well."""
    wrong = []
    for case in cases:
        found = ground.run(case)
        if found:
            repeat = f"CRASH_CASE={case} .venv/bin/python -m pytest {repeats}"
            told = [f"{case} ({case.step.what}):", *found, repeat]
            wrong.append("\n    ".join(told))
        each(case, wrong[-1] if found else None)
    return wrong


def run_fifth(ground: matrix.Ground, verb: str) -> None:
    """The share of `make test`; fails with all that went wrong."""
    start, cases = offset(), ground.cases(verb)
    chosen = fifth(cases, start)
    print(f"{verb}: {len(chosen)} of {len(cases)} cases, CRASH_OFFSET={start}")
    wrong = run(ground, chosen)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(chosen)} cases failed, CRASH_OFFSET={start}", *wrong])


def named(text: str) -> matrix.Case:
    """The case of that name, VERB/PROCESS/CALL#NUMBER/KIND."""
    verb, process, step, kind = text.split("/")
    call, _, number = step.partition("#")
    return matrix.Case(verb, process, tracing.Step(call, int(number), "as recorded"), kind)
