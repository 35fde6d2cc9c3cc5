"""clvm-1.2 on two hosts: every storage verb through the wire, seen from the other host; hosts that come at once."""

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any

import pytest

from supervdsm import calls
from tests import lab
from tests.lab import groups, peers
from tests.until import until
from vdsm import ids

MIB = 1 << 20
LOCKS, DATA, SPARE = 3, 4, 5  # LUNs, as in volumes_test
FORMAT = "clvm-1.2"
CLVM, LOCAL = "clvm", "local"
# How long two hosts make and remove side by side.
BUSY_S = 60.0
IO_TIMEOUT_S = 2
pytestmark = pytest.mark.timeout(600)


class Agent(peers.Peer):
    """Short words for what the tests do with a repository."""

    def connect(self, repo_id: str = CLVM, repo_format: str = FORMAT, **parameters: Any) -> None:
        self("connectStorageRepository", repoId=repo_id, repoFormat=repo_format, connectionParameters=parameters)
        self.joined(repo_id)

    def room(self) -> int:
        """Bytes of the repository, 0 while they are not known."""
        return (self.repository(CLVM) or {}).get("totalBytes") or 0

    def disk(self, size: int = MIB, repo_id: str = CLVM) -> str:
        return str(self("createVirtualDisk", targetRepoId=repo_id, size=size)["imageId"])

    def snapshot(self, disk_id: str, repo_id: str = CLVM) -> str:
        return str(self("createSnapshot", targetRepoId=repo_id, baseVirtualDiskId=disk_id)["imageId"])

    def imported(self, text: str, repo_id: str = CLVM, **params: Any) -> str:
        """A disk of 1 MiB that begins with `text`."""
        path = f"/run/vdsm/import/{text}"
        self.host.sh(f"printf %s {text} > {path}; truncate -s 1M {path}")
        return str(self.done("importImage", targetRepoId=repo_id, path=path, format="raw", **params)["imageId"])

    def copied(self, image_id: str, repo_id: str = CLVM, **params: Any) -> str:
        return str(self.done("copyImage", targetRepoId=repo_id, imageId=image_id, **params)["imageId"])

    def shown(self, image_id: str, length: int, repo_id: str = CLVM) -> str:
        """What the image begins with."""
        path = f"/run/vdsm/export/{image_id}"
        self.done("exportImage", repositoryId=repo_id, imageId=image_id, path=path, format="raw")
        answer = self.host.run(["head", "-c", str(length), path]).out
        self.host.run(["rm", path])
        return answer.replace("\0", ".")

    def images(self, repo_id: str = CLVM) -> set[str]:
        return self.image_ids(repo_id)

    def remove(self, *image_ids: str, repo_id: str = CLVM) -> None:
        for image_id in image_ids:
            self("removeImage", repositoryId=repo_id, imageId=image_id)

    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("checkStorageRepository", repositoryId=CLVM)
        return found

    def fix(self, finding: dict[str, Any]) -> None:
        self.done("fixStorageRepository", repositoryId=CLVM, fix=finding)


@pytest.fixture
def agents(one: lab.Host, two: lab.Host) -> Iterator[tuple[Agent, Agent]]:
    """Of two hosts that share a repository, which is empty before and after."""
    groups.make(one, groups.NAME, [one.luns[LOCKS], one.luns[DATA]])
    groups.remove_volumes(one, groups.NAME)
    for host in (one, two):
        host.start_agent()
    agents = (Agent(one), Agent(two))
    parameters = {"vg": groups.NAME}
    agents[0](
        "formatStorageRepository",
        repoFormat=FORMAT,
        connectionParameters=parameters,
        options={"ioTimeout": IO_TIMEOUT_S},
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda agent: agent.connect(**parameters), agents))
    yield agents
    for agent in agents:
        agent("disconnectStorageRepository", repoId=CLVM)
    groups.start(one, groups.NAME)
    groups.remove_volumes(one, groups.NAME)
    groups.call(one, calls.StopVolumeGroup(groups.NAME))


@pytest.fixture
def local(agents: tuple[Agent, Agent]) -> Iterator[str]:
    """A repository in a directory of the first host."""
    place = {"path": "/run/vdsm/storage/local"}
    agents[0](
        "formatStorageRepository",
        repoFormat="localfs-1.0",
        connectionParameters=place,
        options={"ioTimeout": IO_TIMEOUT_S},
    )
    agents[0].connect(LOCAL, "localfs-1.0", **place)
    yield LOCAL
    agents[0]("disconnectStorageRepository", repoId=LOCAL)
    agents[0].host.run(["rm", "-rf", place["path"]])


@pytest.mark.parametrize("strategy", ["space", "performance"])
def test_what_one_host_makes_the_other_goes_on_with(agents: tuple[Agent, Agent], strategy: str) -> None:
    one, two = agents
    disk = one.imported("first", options={"strategy": strategy})
    assert two.images() == {disk} and two.shown(disk, 8) == "first..."
    snapshot = two.snapshot(disk)
    one("resizeVirtualDisk", repositoryId=CLVM, imageId=disk, size=9 * MIB)
    two("setImageUserData", repositoryId=CLVM, imageId=disk, userData={"by": "two"})
    found = one("getImage", repositoryId=CLVM, imageId=disk)
    assert (found["size"], found["userData"]) == (9 * MIB, {"by": "two"})
    copy = two.copied(snapshot, options={"strategy": strategy}) if strategy == "space" else two.copied(disk)
    assert one.shown(copy, 8) == "first..."
    two.remove(snapshot)
    (merge,) = [found for found in one.findings() if found["type"] == "merge"]
    two.fix(merge)
    assert one.shown(disk, 8) == "first..."
    one.remove(*one.images())
    assert one.images() == two.images() == set()
    assert [found["type"] for found in two.findings()] == []


def test_leases_of_vms_are_seen_by_both(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    lease = {"repoId": CLVM, "leaseId": ids.new()}
    made = one("Lease.create", lease=lease)
    assert two("Lease.info", lease=lease) == made
    two("Lease.delete", lease=lease)
    assert one.refused("Lease.info", lease=lease) == "no_such_lease"


def test_copies_and_differences_between_formats(agents: tuple[Agent, Agent], local: str) -> None:
    """The flow of an incremental backup: a copy, then what has changed since."""
    one, two = agents
    disk = one.imported("monday", repo_id=local)
    first = one.copied(disk, repo_id=CLVM)
    snapshot = one.snapshot(disk, repo_id=local)
    second = one.copied(disk, repo_id=CLVM, baseImageId=first)
    assert two.shown(first, 7) == two.shown(second, 7) == "monday."
    kept = one.copied(snapshot, repo_id=CLVM)
    assert kept == snapshot and two.shown(kept, 7) == "monday."
    back = one.copied(second, repo_id=local, options={"strategy": "performance"})
    assert one.shown(back, 7, repo_id=local) == "monday."
    one.remove(*one.images(local), repo_id=local)
    two.remove(*two.images())


def test_volume_that_another_host_uses_stays_listed_until_it_lets_go(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    disk = one.disk()
    (name,) = [volume.name for volume in volumes(one.host) if volume.name.startswith(disk)]
    groups.call(two.host, calls.ActivateVolume(groups.NAME, name))
    two.host.sh(f"sleep 4321 < /dev/{groups.NAME}/{name} &")
    one.remove(disk)
    (clean,) = one.findings()
    assert (clean["type"], clean["imageId"]) == ("clean", disk)
    assert name in {volume.name for volume in volumes(one.host)}
    two.host.run(["pkill", "-x", "sleep"])
    two.fix(clean)
    assert one.findings() == [] and volumes(one.host) == []


def volumes(host: lab.Host) -> list[calls.Volume]:
    """Of data."""
    found = groups.call(host, calls.ListVolumes(groups.NAME)).volumes
    return [volume for volume in found if volume.name != "vdsm"]


def test_group_is_extended_under_a_connected_repository(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    before = one.room()
    spare = one.host.luns[SPARE].path
    one("extendStorageRepository", repoId=CLVM, devices=[spare], overwrite=[spare])
    one("extendStorageRepository", repoId=CLVM, devices=[spare])
    until(lambda: two.room() > before + 500 * MIB)
    assert one.refused("createVirtualDisk", targetRepoId=CLVM, size=1 << 40) == "repository_full"


def test_two_hosts_make_snapshot_and_remove_at_once(agents: tuple[Agent, Agent]) -> None:
    """No image is lost, none comes back, and both see the same."""
    end = time.monotonic() + BUSY_S

    def busy(agent: Agent) -> tuple[set[str], int]:
        kept: set[str] = set()
        rounds = 0
        while time.monotonic() < end:
            disk = agent.disk()
            snapshot = agent.snapshot(disk)
            kept |= {disk, snapshot}
            if rounds % 4 != 0:
                agent.remove(disk, snapshot)
                kept -= {disk, snapshot}
            rounds += 1
        return kept, rounds

    with concurrent.futures.ThreadPoolExecutor() as pool:
        (kept_one, rounds_one), (kept_two, rounds_two) = pool.map(busy, agents)
    assert min(rounds_one, rounds_two) > 1
    one, two = agents
    assert one.images() == two.images() == kept_one | kept_two
    assert one.findings() == two.findings() == []
    for image_id in sorted(kept_one | kept_two):
        status = two("getImageStatus", repositoryId=CLVM, imageId=image_id)
        assert status["status"] == "optimized", status
    one.remove(*sorted(one.images()))
    assert volumes(one.host) == []
