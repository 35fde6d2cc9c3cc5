"""clvm-1.2 on two hosts: what one makes the other goes on with, hosts that come at once, hosts that die."""

import concurrent.futures
import time
from collections.abc import Iterator
from typing import Any

import pytest

from supervdsm import calls
from tests import lab, proof
from tests.lab import blocks, grounds, groups, peers, verbs
from tests.lab.waiting import until
from vdsm.client import failures

MIB = 1 << 20
FORMAT = "clvm-1.2"
CLVM, LOCAL = "clvm", "local"
EXPORT = "/run/vdsm/export"
# What each of two busy hosts keeps at most: disks with their snapshots, and copies.
KEPT = 6
# And how often it goes round at least, however slow the machine is.
ROUNDS = 2
IO_TIMEOUT_S = 2
# Another host may have a dead one's leases after 8 x io_timeout + 60 s.
TAKEOVER_S = 200.0
HELD = ("image_in_use", "image_busy")
# The monitor asks for the space each half minute.
ROOM_S = 120.0
pytestmark = pytest.mark.timeout(600)


class Agent(peers.Peer):
    """Short words for what the tests do with a repository."""

    def connect(self, repo_id: str = CLVM, repo_format: str = FORMAT, **parameters: Any) -> None:
        self("connectStorageRepository", repoId=repo_id, repoFormat=repo_format, connectionParameters=parameters)
        self.joined(repo_id)

    def is_joined(self) -> bool:
        try:
            return (self.repository(CLVM) or {}).get("state") == "joined"
        except (OSError, failures.ClientError):
            return False

    def room(self) -> int:
        """Bytes of the repository, 0 while they are not known."""
        return (self.repository(CLVM) or {}).get("totalBytes") or 0

    def disk(self, size: int = MIB, repo_id: str = CLVM, **params: Any) -> str:
        return str(self("createVirtualDisk", targetRepoId=repo_id, size=size, **params)["imageId"])

    def snapshot(self, disk_id: str, repo_id: str = CLVM) -> str:
        return str(self("createSnapshot", targetRepoId=repo_id, baseVirtualDiskId=disk_id)["imageId"])

    def imported(self, text: str, repo_id: str = CLVM, **params: Any) -> str:
        """A disk of 1 MiB that begins with `text`."""
        path = f"/run/vdsm/import/{text}"
        self.host.sh(f"printf %s {text} > {path}; truncate -s 1M {path}; chmod 644 {path}")
        made = self.done("importImage", targetRepoId=repo_id, path=path, format="raw", **params)["imageId"]
        self.host.run(["rm", path])
        return str(made)

    def copied(self, image_id: str, repo_id: str = CLVM, **params: Any) -> str:
        return str(self.done("copyImage", targetRepoId=repo_id, imageId=image_id, **params)["imageId"])

    def shown(self, image_id: str, length: int, repo_id: str = CLVM) -> str:
        """What the image begins with."""
        path = f"{EXPORT}/{image_id}"
        self.done("exportImage", repositoryId=repo_id, imageId=image_id, path=path, format="raw")
        answer = self.host.run(["head", "-c", str(length), path]).out
        self.host.run(["rm", path])
        return answer.replace("\0", ".")

    def images(self, repo_id: str = CLVM) -> set[str]:
        return self.image_ids(repo_id)

    def remove(self, *image_ids: str, repo_id: str = CLVM) -> None:
        for image_id in image_ids:
            self("removeImage", repositoryId=repo_id, imageId=image_id)

    def can_read(self, image_id: str) -> bool:
        """False while somebody has the image's lease."""
        try:
            self.shown(image_id, 1)
        except failures.ClientError as error:
            assert error.key in HELD, error
            return False
        return True

    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self("checkStorageRepository", repositoryId=CLVM)
        return found

    def fix(self, finding: dict[str, Any]) -> None:
        self.done("fixStorageRepository", repositoryId=CLVM, fix=finding)


class Ground:
    """The repository that both hosts have joined; nothing is started twice."""

    def bring_up(self, one: lab.Host, two: lab.Host) -> tuple[Agent, Agent]:
        """Made anew when a host has been booted since."""
        agents = (Agent(one), Agent(two))
        if not all(agent.is_joined() for agent in agents):
            self.clear(one, two)
            self._make(agents)
        return agents

    def _make(self, agents: tuple[Agent, Agent]) -> None:
        disks = [agents[0].host.luns[number].path for number in (groups.LOCKS, groups.DATA)]
        made = {"vg": groups.NAME, "devices": disks, "overwrite": disks}
        timing = {"ioTimeout": IO_TIMEOUT_S}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda agent: agent.host.start_agent(), agents))
            agents[0]("formatStorageRepository", repoFormat=FORMAT, connectionParameters=made, options=timing)
            list(pool.map(lambda agent: agent.connect(vg=groups.NAME), agents))

    def clear(self, *hosts: lab.Host) -> None:
        """The LUNs hold nothing, and no host uses them."""
        grounds.renew(*hosts)
        for number in (groups.LOCKS, groups.DATA, groups.SPARE):
            groups.wipe(hosts[0].luns[number])


@pytest.fixture(scope="module")
def ground(the_lab: lab.Lab) -> Iterator[Ground]:
    ground = Ground()
    yield ground
    ground.clear(*the_lab.hosts)


@pytest.fixture
def agents(ground: Ground, one: lab.Host, two: lab.Host) -> tuple[Agent, Agent]:
    """Of two hosts that share a repository, which is empty before and after."""
    return ground.bring_up(one, two)


@pytest.fixture
def local(agents: tuple[Agent, Agent]) -> Iterator[str]:
    """A repository in a directory of the first host."""
    grounds.mount(agents[0].host, "/run/vdsm/storage")
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
    agents[0].host.run(["umount", "/run/vdsm/storage"])


@pytest.mark.parametrize("strategy", ["space", pytest.param("performance", marks=pytest.mark.torture)])
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


def test_all_other_verbs_on_a_volume_group(agents: tuple[Agent, Agent]) -> None:
    """Those that no other test here needs; `matrix_test.py` has all of them, on each kind of disk."""
    verbs.prepare(*agents)
    verbs.rest(*agents, CLVM)


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
    found = groups.call(host, calls.ListVolumes(groups.NAME, "")).volumes
    return [volume for volume in found if volume.name != "vdsm"]


def test_group_is_extended_under_a_connected_repository(agents: tuple[Agent, Agent]) -> None:
    one, two = agents
    before = one.room()
    spare = one.host.luns[groups.SPARE].path
    one("extendStorageRepository", repoId=CLVM, devices=[spare], overwrite=[spare])
    one("extendStorageRepository", repoId=CLVM, devices=[spare])
    until(lambda: two.room() > before + 400 * MIB, ROOM_S)
    whole = {"options": {"strategy": "performance"}}
    assert one.refused("createVirtualDisk", targetRepoId=CLVM, size=1 << 40, **whole) == "repository_full"


# -- at once -----------------------------------------------------------------------------------------------------------


class Busy:
    """One host that makes, snapshots, copies and removes images until `end`, and what it leaves: ids, and what each
    shows."""

    def __init__(self, agent: Agent, end: float) -> None:
        self.agent = agent
        self.rounds = 0
        self.kept: dict[str, str] = {}
        self._end = end
        self._order: list[list[str]] = []

    def run(self) -> None:
        while time.monotonic() < self._end or self.rounds < ROUNDS:
            self._round(f"{self.agent.host.name}.{self.rounds}")
            self.rounds += 1

    def _round(self, text: str) -> None:
        disk = self.agent.imported(text)
        snapshot = self.agent.snapshot(disk)
        self._keep([disk, snapshot], text)
        above = self.agent.disk(size=0, baseSnapshotId=snapshot)
        copy = self.agent.copied(above, options={"strategy": ("space", "performance")[self.rounds % 2]})
        self._keep([copy], text)
        self.agent.remove(above)
        if len(self._order) > KEPT:
            self._drop()

    def _keep(self, images: list[str], text: str) -> None:
        self._order.append(images)
        self.kept |= dict.fromkeys(images, text)

    def _drop(self) -> None:
        """The disk before its snapshot: the other way round there is something to merge."""
        for image_id in self._order.pop(0):
            self.agent.remove(image_id)
            del self.kept[image_id]

    def check(self, made: dict[str, str]) -> None:
        """What the other one made, too."""
        for image_id, text in made.items():
            assert self.agent("getImageStatus", repositoryId=CLVM, imageId=image_id)["status"] == "optimized"
            assert self.agent.shown(image_id, len(text) + 1) == f"{text}."


def both_busy(agents: tuple[Agent, Agent], seconds: int) -> dict[str, object]:
    """No image is lost, none comes back, no volume is left over, both see the same, and everything is as written.
    Answers what was done."""
    end = time.monotonic() + seconds
    one, two = (Busy(agent, end) for agent in agents)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(Busy.run, (one, two)))
    made = one.kept | two.kept
    assert agents[0].images() == agents[1].images() == made.keys()
    assert agents[0].findings() == agents[1].findings() == []
    assert len(volumes(agents[0].host)) == len(made)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: pair[0].check(pair[1].kept), ((one, two), (two, one))))
    agents[0].remove(*made)
    assert volumes(agents[0].host) == []
    return {
        "seconds in which both began rounds": seconds,
        **{f"rounds of {busy.agent.host.name}": busy.rounds for busy in (one, two)},
        "images that a round makes": "a disk, its snapshot, a disk above that, a copy of that one",
        "images at the end, each read by the host that did not make it": len(made),
        "images lost, come back or changed, volumes left over": 0,
    }


def test_two_hosts_are_busy_in_one_repository_at_once(agents: tuple[Agent, Agent]) -> None:
    both_busy(agents, 20)


@pytest.mark.torture
@pytest.mark.timeout(2400)
def test_two_hosts_are_busy_for_long(agents: tuple[Agent, Agent]) -> None:
    with proof.writing("busy-volume-group", None) as told:
        told.update(both_busy(agents, 600))


# -- what a volume holds, and what a dead host leaves ------------------------------------------------------------------


def test_new_disks_show_nothing_of_what_lay_on_their_volumes(agents: tuple[Agent, Agent]) -> None:
    """Trap 40."""
    one, two = agents
    host = one.host
    host.sh("head -c 8M /dev/zero | tr '\\0' S > /run/vdsm/import/secret")
    given = {"path": "/run/vdsm/import/secret", "format": "raw", "options": {"strategy": "performance"}}
    one.remove(one.done("importImage", targetRepoId=CLVM, **given)["imageId"])
    groups.call(host, calls.CreateVolume(groups.NAME, "fresh", 8 * MIB))
    fresh = groups.call(host, calls.ActivateVolume(groups.NAME, "fresh")).path
    assert [blocks.read(host, fresh, block) for block in (0, 2047)] == ["S", "S"]
    groups.call(host, calls.RemoveVolume(groups.NAME, "fresh"))
    fast = {"options": {"strategy": "performance"}}
    made = two.disk(8 * MIB, **fast)
    enlarged = two.disk(**fast)
    two("resizeVirtualDisk", repositoryId=CLVM, imageId=enlarged, size=8 * MIB)
    copy = one.copied(two.disk(8 * MIB), **fast)
    for image_id in (made, enlarged, copy):
        assert verbs.shown(one, CLVM, image_id) == verbs.sha256(bytes(8 * MIB))
    one.remove(*one.images())


def test_snapshot_of_a_host_that_died_is_finished_by_whoever_uses_the_disk(agents: tuple[Agent, Agent]) -> None:
    """Trap 41, and what is active in the dead host is made anew where it is. The disk is read here, for which the same
    has to be done first as for a start."""
    one, two = agents
    disk = one.imported("whole")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        cut = pool.submit(one.snapshot, disk)
        until(lambda: two("getImageStatus", repositoryId=CLVM, imageId=disk)["status"] == "broken")
        one.host.kill()
        assert not two.can_read(disk)
        assert cut.exception(150) is not None
    until(lambda: two.can_read(disk), TAKEOVER_S)
    assert two.shown(disk, 6) == "whole."
    assert {image["status"] for image in two("listImages", repositoryId=CLVM)} == {"optimized"}
    one.host.boot()
    one.host.start_agent()
    one.connect(vg=groups.NAME)
    assert one.images() == two.images() and len(one.images()) == 2
    assert one.shown(disk, 6) == "whole."
    one.remove(disk, *(one.images() - {disk}))
    assert one.findings() == [] and volumes(one.host) == []
