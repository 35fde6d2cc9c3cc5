"""nfs-3.4 on two hosts: what one does the other sees, and what becomes of both when the server goes.

The server squashes root: all that is done here is done by users who are somebody there.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import lab
from tests.lab import nfs, peers
from tests.until import until
from vdsm import ids
from vdsm.client import failures

FORMAT = "nfs-3.4"
# Of version 3 the kernel's connection outlives 180 s of silence, and so must the leases: see `formats/nfs.py`.
IO_TIMEOUT_S = {"4.2": 2, "3": 22}
MIB = 1 << 20
GONE = "no_such_image"


DISK = """\
mkfs.ext4 -q -F {disk}
mount {disk} /run/vdsm/import
for name in export storage; do
    mkdir /run/vdsm/import/$name
    chown --reference /run/vdsm/$name /run/vdsm/import/$name
    mount --bind /run/vdsm/import/$name /run/vdsm/$name
done
"""


class Site:
    """Both agents and the server, which is on the first one's host. Nothing is started twice."""

    def __init__(self, hosts: list[lab.Host]) -> None:
        self.hosts = hosts
        self.one, self.two = (peers.Peer(host) for host in hosts)
        self.server = nfs.Server(hosts[0].luns[2], squash=True)
        self.address = hosts[0].address("lan")

    def start(self) -> None:
        """Returns when the server serves, both agents answer, and each host has a disk of its own below their files:
        what is in memory has no direct I/O."""
        if self.hosts[0].run(["mountpoint", "-q", self.server.path], check=False).code != 0:
            self.server.start()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lab.Host.start_agent, self.hosts))
        for host in self.hosts:
            if host.run(["mountpoint", "-q", "/run/vdsm/import"], check=False).code != 0:
                host.sh(DISK.format(disk=host.luns[host.number - 1].path))

    def directory(self, name: str) -> str:
        """An empty exported directory as an admin prepares one; its name on the server."""
        path = f"{self.server.path}/{name}"
        self.hosts[0].run(["install", "-d", "-o", "vdsm", "-g", "kvm", "-m", "2770", path])
        return path

    def parameters(self, name: str, version: str) -> dict[str, Any]:
        connection = {"connection": f"{self.address}:{nfs.EXPORT}/{name}", "protocol_version": version}
        return {"repoFormat": FORMAT, "connectionParameters": connection}

    def connect(self, name: str, version: str) -> None:
        """The repository of that name, on both hosts; made when there is none."""
        given = self.parameters(name, version)
        if self.hosts[0].run(["test", "-d", f"{self.server.path}/{name}"], check=False).code != 0:
            self.directory(name)
            self.one("formatStorageRepository", **given, options={"ioTimeout": IO_TIMEOUT_S[version]})
        for peer in (self.one, self.two):
            peer("connectStorageRepository", repoId=name, **given)
        for peer in (self.one, self.two):
            peer.joined(name)


@pytest.fixture(scope="module")
def sites(the_lab: lab.Lab) -> Iterator[list[Site]]:
    kept: list[Site] = []
    yield kept
    for host in the_lab.hosts:
        host.renew()  # the quickest way out of a lockspace


@pytest.fixture
def site(hosts: list[lab.Host], sites: list[Site]) -> Site:
    if not sites:
        sites.append(Site(hosts))
    sites[0].start()
    return sites[0]


@pytest.fixture
def shared(site: Site) -> str:
    """The id of a repository that both hosts have, in version 4.2."""
    site.connect("shared", "4.2")
    return "shared"


# -- verbs -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["4.2", "3"])
def test_what_one_host_does_the_other_sees(site: Site, version: str) -> None:
    """At once: names are not cached (trap 21). Each verb of storage that changes something is called by one of them,
    and the other looks."""
    one, two = site.one, site.two
    repo = {"4.2": "shared", "3": "third"}[version]
    site.connect(repo, version)

    disk = one("createVirtualDisk", targetRepoId=repo, size=4 * MIB, userData={"by": "one"})["imageId"]
    assert two("getImage", repositoryId=repo, imageId=disk)["userData"] == {"by": "one"}
    two("setImageUserData", repositoryId=repo, imageId=disk, userData={"by": "two"})
    assert one("getImage", repositoryId=repo, imageId=disk)["userData"] == {"by": "two"}
    snapshot = two("createSnapshot", targetRepoId=repo, baseVirtualDiskId=disk)["imageId"]
    assert one.image_ids(repo) >= {disk, snapshot}
    child = one("createVirtualDisk", targetRepoId=repo, size=0, baseSnapshotId=snapshot)["imageId"]
    two("resizeVirtualDisk", repositoryId=repo, imageId=child, size=8 * MIB)
    assert one("getImage", repositoryId=repo, imageId=child)["size"] == 8 * MIB

    one.host.sh("head -c 3M /dev/urandom > /run/vdsm/import/noise")
    imported = one.done("importImage", targetRepoId=repo, path="/run/vdsm/import/noise", format="raw")["imageId"]
    copied = two.done("copyImage", targetRepoId=repo, imageId=imported)["imageId"]
    out = f"/run/vdsm/export/{copied}"
    one.done("exportImage", repositoryId=repo, imageId=copied, path=out, format="raw")
    one.host.run(["cmp", "-n", str(3 * MIB), "/run/vdsm/import/noise", out])

    vm = ids.new()
    one("Lease.create", lease={"repoId": repo, "leaseId": vm})
    assert two("Lease.status", lease={"repoId": repo, "leaseId": vm})["owners"] == []
    two("Lease.delete", lease={"repoId": repo, "leaseId": vm})
    assert one.refused("Lease.status", lease={"repoId": repo, "leaseId": vm}) == "no_such_lease"

    two("removeImage", repositoryId=repo, imageId=snapshot)
    assert one.refused("getImage", repositoryId=repo, imageId=snapshot) == GONE
    one("removeImage", repositoryId=repo, imageId=child)
    (merge,) = [fix for fix in one("checkStorageRepository", repositoryId=repo) if fix["imageId"] == snapshot]
    two.done("fixStorageRepository", repositoryId=repo, fix=merge)
    for peer, image in ((one, disk), (two, imported), (one, copied)):
        peer("removeImage", repositoryId=repo, imageId=image)
    assert two("checkStorageRepository", repositoryId=repo) == []
    assert two.image_ids(repo) == set()


@pytest.mark.timeout(300)
def test_an_image_is_copied_from_a_directory_of_one_host(site: Site, shared: str) -> None:
    two = site.two
    given = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": "/run/vdsm/storage/local"}}
    two("formatStorageRepository", **given, options={"ioTimeout": 1})
    two("connectStorageRepository", repoId="local", **given)
    two.joined("local")
    disk = two("createVirtualDisk", targetRepoId="local", size=2 * MIB)["imageId"]
    snapshot = two("createSnapshot", targetRepoId="local", baseVirtualDiskId=disk)["imageId"]
    two.done("copyImage", targetRepoId=shared, imageId=snapshot)
    assert site.one("getImage", repositoryId=shared, imageId=snapshot)["status"] == "optimized"
    two("disconnectStorageRepository", repoId="local")
    site.one("removeImage", repositoryId=shared, imageId=snapshot)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_what_keeps_a_repository_away_is_told(site: Site) -> None:
    two, server = site.two, site.hosts[0]
    site.directory("told")
    server.sh(f"mkdir -p {site.server.path}/roots; chmod 700 {site.server.path}/roots")
    server.sh(f"install -d -o vdsm -g vdsm -m 770 {site.server.path}/unshared")

    def connecting(address: str, name: str, version: str = "4.2") -> str:
        connection = {"connection": f"{address}:{nfs.EXPORT}/{name}", "protocol_version": version}
        return two.refused("connectStorageRepository", repoId="x", repoFormat=FORMAT, connectionParameters=connection)

    assert connecting(site.address, "told") == "not_a_repository"
    assert connecting(site.address, "nothing") == "no_such_export"
    assert connecting(site.address, "nothing", "3") == "no_such_export"
    assert connecting(site.address, "roots") == "storage_denied"
    assert connecting("10.66.1.77", "told") == "server_unreachable"
    assert connecting("no-such-host", "told") == "server_unreachable"
    given = site.parameters("unshared", "4.2")
    assert two.refused("formatStorageRepository", **given) == "storage_denied"  # sanlock is in another group
    site.hosts[0].cut("lan")
    for version in ("3", "4.2"):
        assert connecting(site.address, "told", version) == "server_unreachable"
    site.hosts[0].restore("lan")
    assert "_told-" not in two.host.run(["cat", "/proc/mounts"]).out


def test_a_mount_that_gives_up_too_late_is_refused(site: Site) -> None:
    """What version 3 has in its connection may arrive 188 s later; takeovers begin 6 x io_timeout + 60 s after."""
    site.directory("late")
    given = site.parameters("late", "3")
    assert site.two.refused("formatStorageRepository", **given, options={"ioTimeout": 21}) == "unsafe_mount"
    site.two("formatStorageRepository", **site.parameters("late", "4.2"), options={"ioTimeout": 1})
    assert site.two.refused("connectStorageRepository", repoId="late", **given) == "unsafe_mount"


def test_an_export_that_is_mounted_hard_is_refused(site: Site) -> None:
    site.directory("hard")
    given = site.parameters("hard", "4.2")
    site.two("formatStorageRepository", **given, options={"ioTimeout": 1})
    source = f"{site.address}:{nfs.EXPORT}/hard"
    site.two.host.sh(f"mkdir -p /run/hard; mount -t nfs -o vers=4.2,hard {source} /run/hard")
    try:
        assert site.two.refused("connectStorageRepository", repoId="hard", **given) == "unsafe_mount"
    finally:
        site.two.host.run(["umount", "/run/hard"])


# -- a server that goes and comes --------------------------------------------------------------------------------------

HEALTHY_S = 10.0


def answers(peer: peers.Peer, repo_id: str) -> bool:
    try:
        peer("listImages", repositoryId=repo_id)
    except failures.ClientError:
        return False
    return True


@pytest.mark.timeout(300)
def test_verbs_work_again_soon_after_the_server_is_back(site: Site, shared: str) -> None:
    """A cable out and in, a server stopped and started: neither long enough for the leases."""
    two = site.two
    two.host.cut("lan")
    assert two.refused("listImages", repositoryId=shared) in ("storage_failed", "repository_stuck")
    two.host.restore("lan")
    began = time.monotonic()
    until(lambda: answers(two, shared), 60)
    assert time.monotonic() - began < HEALTHY_S
    two.joined(shared)

    site.hosts[0].sh("rpc.nfsd 0")
    site.hosts[0].sh("rpc.nfsd 4")
    until(lambda: grows(two, shared), 180)


def grows(peer: peers.Peer, repo_id: str) -> bool:
    with contextlib.suppress(failures.ClientError):
        return bool(peer("createVirtualDisk", targetRepoId=repo_id, size=MIB))
    return False
