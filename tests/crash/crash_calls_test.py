"""What a repository's child does within a call: every fifth step of each verb stopped, killed or failed.

`make torture` has all of them. See `matrix.py` for what must be true afterwards.
"""

from collections.abc import Iterator

import pytest

from tests.crash import matrix, selection, verbs


@pytest.fixture(scope="module")
def ground() -> Iterator[matrix.Ground]:
    with matrix.ground() as made:
        yield made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("verb", verbs.CALLS)
def test_no_moment_of_death_loses_anything(ground: matrix.Ground, verb: str) -> None:
    selection.run_fifth(ground, verb)
