"""How a job is aborted or stopped, by its worker or by another one: every fifth step stopped, killed or failed."""

from collections.abc import Iterator

import pytest

from tests.crash import matrix, selection, verbs


@pytest.fixture(scope="module")
def ground() -> Iterator[matrix.Ground]:
    with matrix.ground() as made:
        yield made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", verbs.ABORTS)
def test_no_moment_of_death_loses_anything(ground: matrix.Ground, verb: str) -> None:
    selection.run_fifth(ground, verb)
