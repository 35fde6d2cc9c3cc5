"""Taking leases: the one order for all, and many at once."""

import concurrent.futures
import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from tests import sanlock_fixture
from vdsm import leases

storage = sanlock_fixture.storage

READERS, TIMES = 8, 10

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


def test_readers_that_come_at_once_all_get_their_share(storage: sanlock_fixture.Storage) -> None:
    """sanlock refuses some of them as if somebody wrote, though nobody does (trap 11)."""
    lease = storage.slot("template").data_lease(shared=True)

    def read(_: int) -> None:
        with leases.Session() as session:
            for _ in range(TIMES):
                with session.holding([lease], 20):
                    assert session.held() == {(lease.lockspace, lease.name, True)}

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
