"""One lab for the session. A test gets its hosts, and leaves them as it found them: alive, connected, LUNs sound.

Daemons, mounts and disks it ends itself, by the context managers of `nfs` and `iscsi`. After a failed test the hosts
are booted anew, so that no other test fails for it.
"""

from collections.abc import Generator, Iterator

import pytest

from supervdsm import calls
from tests import lab
from tests.lab import groups, sites

# What takes minutes, in this order before all else.
LONGEST = (
    "clvm_test",
    "volumes_test",
    "groups_test",
    "devices_test",
    "nfs_test",
    "frozen_test",
    "crash_test",
    "latewrite_test",
)
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: the short ones fill what is left of the other processes' time."""
    order = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def the_lab() -> Iterator[lab.Lab]:
    reason = lab.missing()
    if reason:
        pytest.skip(reason)
    with lab.Lab(hosts=2) as running:
        yield running


@pytest.fixture
def hosts(the_lab: lab.Lab, request: pytest.FixtureRequest) -> Iterator[list[lab.Host]]:
    yield the_lab.hosts
    the_lab.mend()
    if request.node.stash.get(FAILED, False):
        for host in the_lab.hosts:
            host.renew()


@pytest.fixture
def one(hosts: list[lab.Host]) -> lab.Host:
    return hosts[0]


@pytest.fixture
def two(hosts: list[lab.Host]) -> lab.Host:
    return hosts[1]


@pytest.fixture(scope="module")
def own_site(the_lab: lab.Lab) -> Iterator[sites.Site]:
    yield sites.Site(the_lab.hosts)
    for host in the_lab.hosts:
        host.renew()  # the quickest way out of a lockspace


@pytest.fixture
def site(hosts: list[lab.Host], own_site: sites.Site) -> sites.Site:
    """Of the module, as long as its hosts are not booted."""
    own_site.start()
    return own_site


@pytest.fixture
def group_of_both(one: lab.Host, two: lab.Host) -> groups.Group:
    """Started in both hosts, empty; its locks are on a disk that holds nothing else. It stays started for the next."""
    group = groups.Group()
    if None in group.left(one, two):
        _start(group, one)
        groups.start(two, group.name)
    _empty(group, one, two)
    return group


@pytest.fixture
def group_of_one(one: lab.Host, two: lab.Host) -> groups.Group:
    """As `group_of_both`, for tests that need it in the first host alone: joining and leaving take half a minute."""
    group = groups.Group()
    if group.left(one) == [None]:
        _start(group, one)
        two.start_helper()
    _empty(group, one, two)
    return group


def _start(group: groups.Group, one: lab.Host) -> None:
    groups.make(one, group.name, [one.luns[groups.LOCKS], one.luns[groups.DATA]])


def _empty(group: groups.Group, one: lab.Host, two: lab.Host) -> None:
    mine, others = group.left(one, two)
    for name, volume in (others or {}).items():
        if volume.active:
            group.call(two, calls.DeactivateVolume, name)
    for name in mine or {}:
        assert group.remove(one, name) == ""
