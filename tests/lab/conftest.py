"""One lab for the session. A test gets its hosts, and leaves them as it found them: alive, connected, LUNs sound.

Daemons, mounts and disks it ends itself, by the context managers of `nfs` and `iscsi`. After a failed test the hosts
are booted anew, so that no other test fails for it.
"""

from collections.abc import Generator, Iterator

import pytest

from supervdsm import calls
from tests import lab
from tests.lab import groups, sites

LONGEST = ("clvm_test", "volumes_test", "groups_test")
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
    items.sort(key=lambda item: item.path.stem not in LONGEST)


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
def group(one: lab.Host, two: lab.Host) -> groups.Group:
    """Started in both hosts, empty; its locks are on a disk that holds nothing else. It stays started for the next."""
    group = groups.Group()
    mine, others = left = group.left(one, two)
    if None in left:
        groups.make(one, group.name, [one.luns[groups.LOCKS], one.luns[groups.DATA]])
        groups.start(two, group.name)
        mine, others = group.left(one, two)
    for name, volume in (others or {}).items():
        if volume.active:
            group.call(two, calls.DeactivateVolume, name)
    for name in mine or {}:
        assert group.remove(one, name) == ""
    return group
