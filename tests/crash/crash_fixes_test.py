"""What the jobs of fixes do, with their tools: every fifth step stopped, killed or failed. A fix that was cut off is
listed again, as it was or as another one, and ends in the same state."""

from collections.abc import Iterator

import pytest

from tests.crash import matrix, selection, verbs


@pytest.fixture(scope="module")
def ground() -> Iterator[matrix.Ground]:
    with matrix.ground() as made:
        yield made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", verbs.FIXES)
def test_no_moment_of_death_loses_anything(ground: matrix.Ground, verb: str) -> None:
    selection.run_fifth(ground, verb)
