"""One case again: the one that CRASH_CASE names, as a failing run of the others has printed it."""

import os

import pytest

from tests.crash import matrix, selection


@pytest.mark.skipif("CRASH_CASE" not in os.environ, reason="CRASH_CASE=VERB/PROCESS/STEP/KIND names a case to repeat")
@pytest.mark.timeout(120)
def test_case_again() -> None:
    with matrix.ground() as ground:
        assert not selection.run(ground, [selection.named(os.environ["CRASH_CASE"])])
