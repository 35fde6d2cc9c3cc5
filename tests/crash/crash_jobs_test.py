"""What a job's worker does, with its tools: every fifth step of each verb stopped, killed or failed."""

from collections.abc import Iterator

import pytest

from tests.crash import matrix, selection, verbs


@pytest.fixture(scope="module")
def ground() -> Iterator[matrix.Ground]:
    with matrix.ground() as made:
        yield made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", verbs.JOBS)
def test_no_moment_of_death_loses_anything(ground: matrix.Ground, verb: str) -> None:
    selection.run_fifth(ground, verb)
