"""The one order in which all take leases."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from vdsm import leases

_LEASES = st.builds(
    leases.Lease,
    st.sampled_from(["a", "b"]),
    st.sampled_from(["x", "y", "z"]),
    st.just("/p"),
    st.just(0),
    st.booleans(),
)


@given(st.lists(_LEASES, max_size=8), st.randoms(use_true_random=False))
def test_mode_is_no_part_of_the_order(wanted: list[leases.Lease], chance: random.Random) -> None:
    """Two that want the same leases in other modes ask for them in the same order, so neither holds what the other
    waits for while it waits itself (trap 28)."""
    other = [lease._replace(shared=not lease.shared) for lease in wanted]
    chance.shuffle(other)
    first, second = ([(one.lockspace, one.name) for one in leases.ordered(given)] for given in (wanted, other))
    assert first == second == sorted(set(first))


@given(st.lists(_LEASES, max_size=8))
def test_name_is_taken_once_in_its_strongest_mode(wanted: list[leases.Lease]) -> None:
    taken = {(one.lockspace, one.name): one.shared for one in leases.ordered(wanted)}
    by_name = itertools.groupby(sorted(wanted), key=lambda one: (one.lockspace, one.name))
    assert taken == {name: all(one.shared for one in same) for name, same in by_name}
