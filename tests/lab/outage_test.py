"""A clvm repository whose group is taken from its host by an outage, and comes back by itself."""

from collections.abc import Iterator

import pytest

from supervdsm import calls
from tests import lab
from tests.lab import groups, peers
from tests.lab.waiting import until

REPO = "clvm"
PLACE = {"repoFormat": "clvm-1.2", "connectionParameters": {"vg": groups.NAME}}
IO_TIMEOUT_S = 2
# From the loss of the locks' disk to the end of the kill command; 16 s on an idle machine.
KILLED_S = 90.0
pytestmark = pytest.mark.timeout(420)


@pytest.fixture
def agent(one: lab.Host) -> Iterator[peers.Peer]:
    """Of a host that is connected to a repository, whose locks are on a disk of their own."""
    groups.make(one, groups.NAME, [one.luns[groups.LOCKS], one.luns[groups.DATA]])
    groups.remove_volumes(one, groups.NAME)
    one.start_agent()
    agent = peers.Peer(one)
    agent("formatStorageRepository", **PLACE, options={"ioTimeout": IO_TIMEOUT_S})
    agent("connectStorageRepository", repoId=REPO, **PLACE)
    agent.joined(REPO)
    yield agent
    agent("disconnectStorageRepository", repoId=REPO)
    groups.start(one, groups.NAME)
    groups.remove_volumes(one, groups.NAME)
    groups.call(one, calls.StopVolumeGroup(groups.NAME))


@pytest.mark.torture
def test_a_repository_comes_back_with_its_storage(agent: peers.Peer, one: lab.Host) -> None:
    """Also when a process outlives the outage for a while, which is told with what it has open."""
    disk = agent("createVirtualDisk", targetRepoId=REPO, size=1 << 20)["imageId"]
    one.sh(f"exec 3< /dev/{groups.NAME}/vdsm; sleep 4321 &")
    one.luns[groups.LOCKS].cut()
    until(lambda: not groups.call(one, calls.GetLockManager()).groups, KILLED_S)
    until(lambda: "vdsm has lost its lock, and a process still has it open" in reason(agent), KILLED_S)
    one.run(["pkill", "-x", "sleep"])
    until(lambda: "the disk with its locks is not there" in reason(agent), KILLED_S)
    one.luns[groups.LOCKS].heal()
    agent.joined(REPO)
    until(lambda: reason(agent) == "", KILLED_S)
    assert agent.image_ids(REPO) == {disk}
    agent("createVirtualDisk", targetRepoId=REPO, size=1 << 20)


def reason(agent: peers.Peer) -> str:
    """Why the repository cannot be reached; nothing when it can."""
    return str((agent.repository(REPO) or {}).get("reachabilityReason") or "")
