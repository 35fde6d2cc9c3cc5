"""Verbs on a file system that gets full while they work, after more of it each time: the records tell the truth, what
is there can be removed, and with space again everything is settled by fixes."""

from collections.abc import Iterable, Iterator

import pytest

from tests.crash import matrix, selection

VERBS = (
    *("createVirtualDisk-raw", "createSnapshot", "resizeVirtualDisk-raw", "copyImage", "copyImage-here", "importImage"),
    *("copyImage-base-disk", "sysprep", "merge-push", "merge-pull", "optimize"),
)
STEP_BYTES = 192 << 10  # less than any of the verbs needs
MOST_BYTES = 6 << 20  # more than any of them needs


@pytest.fixture(scope="module")
def ground() -> Iterator[matrix.Ground]:
    with matrix.ground(96 << 20) as made:
        yield made


def run(ground: matrix.Ground, verb: str, levels: Iterable[int]) -> None:
    found = {free_bytes: ground.run_full(verb, free_bytes) for free_bytes in levels}
    told = [f"with {free_bytes} bytes free: {wrong}" for free_bytes, (wrong, _) in found.items() if wrong]
    assert not told, "\n".join(told)
    assert any(full for _, full in found.values()), "there was space for all of it at each level"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", VERBS)
def test_space_that_ends_anywhere_loses_nothing(ground: matrix.Ground, verb: str) -> None:
    start = selection.offset() % selection.PARTS * STEP_BYTES
    run(ground, verb, {start // selection.PARTS, *range(start, MOST_BYTES, selection.PARTS * STEP_BYTES)})


@pytest.mark.torture
@pytest.mark.timeout(0)
@pytest.mark.parametrize("verb", VERBS)
def test_space_that_ends_at_each_place_loses_nothing(ground: matrix.Ground, verb: str) -> None:
    run(ground, verb, range(0, MOST_BYTES, STEP_BYTES // 4))
