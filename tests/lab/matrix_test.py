"""Every verb of storage on each kind of disk that a clvm-1.2 repository may lie on, by two hosts in turn."""

import concurrent.futures

import pytest

from tests import lab
from tests.lab import grounds, peers, verbs
from tests.lab.waiting import until

GROUP, REPO, LOCAL = "matrix", "clvm", "local"
FORMAT = "clvm-1.2"
IO_TIMEOUT = {"ioTimeout": 2}
FORMAT_S = 400.0
# The monitor asks for the space each half minute.
ROOM_S = 120.0


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", grounds.KINDS)
def test_every_verb(one: lab.Host, two: lab.Host, kind: str) -> None:
    with grounds.KINDS[kind](one, two) as device:
        peer, other = peers.Peer(one), peers.Peer(two)
        made = {"vg": GROUP, "devices": [device], "overwrite": [device]}
        peer("formatStorageRepository", FORMAT_S, repoFormat=FORMAT, connectionParameters=made, options=IO_TIMEOUT)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(connect, (peer, other)))
        sectors = one.run(["blockdev", "--getss", f"/dev/{GROUP}/vdsm"]).out.strip()
        assert sectors == str(grounds.SECTOR_BYTES[kind])
        verbs.prepare(peer, other)
        verbs.through(peer, other, REPO)
        connect_local(peer)
        verbs.beside(peer, other, REPO, LOCAL)
        if kind == "lun":
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
    spare = peer.host.luns[grounds.SPARE].path
    before = room(other)
    peer("extendStorageRepository", repoId=REPO, devices=[spare], overwrite=[spare])
    until(lambda: room(other) > before, ROOM_S)


def room(peer: peers.Peer) -> int:
    return (peer.repository(REPO) or {}).get("totalBytes") or 0
