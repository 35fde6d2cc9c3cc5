"""Every verb of storage on a clvm-1.2 repository over a shared LUN, by two hosts in turn. Takes ten minutes."""

import concurrent.futures
from collections.abc import Iterator

import pytest

from tests import lab
from tests.lab import grounds, groups, peers, verbs
from tests.until import until

GROUP, REPO, LOCAL = "matrix", "clvm", "local"
FORMAT = "clvm-1.2"
IO_TIMEOUT = {"ioTimeout": 2}
# The only LUN with room for a group's locks and for images, and one to extend the group with.
NUMBER, SPARE = 4, 5


@pytest.fixture
def device(one: lab.Host, two: lab.Host) -> Iterator[str]:
    """A disk that both agents see, with nothing on it. Both hosts are booted anew at the end."""
    wipe(one)
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lab.Host.start_agent, (one, two)))
        yield one.luns[NUMBER].path
    finally:
        grounds.renew(one, two)
        wipe(one)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_every_verb(one: lab.Host, two: lab.Host, device: str) -> None:
    peer, other = peers.Peer(one), peers.Peer(two)
    made = {"vg": GROUP, "devices": [device], "overwrite": [device]}
    peer("formatStorageRepository", repoFormat=FORMAT, connectionParameters=made, options=IO_TIMEOUT)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(connect, (peer, other)))
    verbs.prepare(peer, other)
    verbs.through(peer, other, REPO)
    connect_local(peer)
    verbs.beside(peer, other, REPO, LOCAL)
    extend(peer, other)
    for end in (peer, other):
        end("disconnectStorageRepository", repoId=REPO)
        assert end.host.run(["ls", "/dev/mapper"]).out.count(f"{GROUP}-") == 0


def connect(peer: peers.Peer) -> None:
    peer("connectStorageRepository", repoId=REPO, repoFormat=FORMAT, connectionParameters={"vg": GROUP})
    peer.joined(REPO)


def connect_local(peer: peers.Peer) -> None:
    grounds.mount(peer.host, "/run/vdsm/storage")
    place = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": "/run/vdsm/storage/local"}}
    peer("formatStorageRepository", **place, options=IO_TIMEOUT)
    peer("connectStorageRepository", repoId=LOCAL, **place)
    peer.joined(LOCAL)


def extend(peer: peers.Peer, other: peers.Peer) -> None:
    spare = peer.host.luns[SPARE].path
    before = room(other)
    peer("extendStorageRepository", repoId=REPO, devices=[spare], overwrite=[spare])
    until(lambda: room(other) > before)


def room(peer: peers.Peer) -> int:
    return (peer.repository(REPO) or {}).get("totalBytes") or 0


def wipe(host: lab.Host) -> None:
    for number in (NUMBER, SPARE):
        groups.wipe(host.luns[number])
