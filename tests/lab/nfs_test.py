"""nfs-3.4 on two hosts: what is refused, and what becomes of both when a writer or the server goes. What all verbs
do there is in `formats_test`, a long one.

The server squashes root: all that is done here is done by users who are somebody there.
"""

import contextlib
import functools
import time

import pytest

from tests.lab import nfs, peers, sites
from tests.lab.waiting import until
from vdsm import ids
from vdsm.client import failures

FORMAT = sites.NFS
MIB = 1 << 20


@pytest.fixture
def shared(site: sites.Site) -> str:
    """The id of a repository that both hosts have, in version 4.2."""
    site.connect("shared", "4.2")
    return "shared"


def test_what_one_host_makes_and_removes_the_other_knows_at_once(site: sites.Site, shared: str) -> None:
    """Trap 21: it has looked for the name before, and did not find it."""
    one, two = site.one, site.two
    image_id = ids.new()
    where = {"repositoryId": shared, "imageId": image_id}
    assert two.refused("getImage", **where) == "no_such_image"
    one("createVirtualDisk", targetRepoId=shared, size=MIB, options={"imageId": image_id})
    assert two("getImage", **where)["status"] == "optimized"
    one("removeImage", **where)
    assert two.refused("getImage", **where) == "no_such_image"


# -- a copy that dies -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
@pytest.mark.parametrize("dies", ["worker", pytest.param("agent", marks=pytest.mark.torture)])
def test_a_killed_copy_is_finished_by_the_other_host(site: sites.Site, shared: str, dies: str) -> None:
    """A worker that dies alone is buried by its agent, which writes down how it ended. When both die nobody does, and
    the lease tells."""
    one, two = site.one, site.two
    one.host.sh("head -c 16M /dev/urandom > /run/vdsm/import/much")
    disk = one.done("importImage", targetRepoId=shared, path="/run/vdsm/import/much", format="raw")["imageId"]
    copy = two("copyImage", targetRepoId=shared, imageId=disk)["imageId"]
    where = {"repositoryId": shared, "imageId": copy}
    two.host.sh("until pkill -STOP -x qemu-img; do true; done", 60)  # else it would be done before it is killed
    assert one("getImageStatus", **where)["verdict"]["state"] == "running"
    dying = [str(two.holder(copy)), *([two.agent_pid()] if dies == "agent" else [])]
    two.host.run(["kill", "-KILL", *dying])
    ended = {"worker": "failed", "agent": "interrupted"}[dies]
    until(lambda: one("getImageStatus", **where)["verdict"]["state"] == ended, 180)
    (mend,) = [fix for fix in one("checkStorageRepository", repositoryId=shared) if fix["imageId"] == copy]
    assert (mend["type"], mend["obstacle"]) == ("mend", None)
    one.done("fixStorageRepository", repositoryId=shared, fix=mend)
    site.start()  # the agent that died
    site.connect(shared, "4.2")
    assert two("getImage", **where)["status"] == "optimized"
    two.done("exportImage", **where, path=f"/run/vdsm/export/{copy}", format="raw")
    assert one.checksum("/run/vdsm/import/much") == two.checksum(f"/run/vdsm/export/{copy}")
    for image in (copy, disk):
        two("removeImage", repositoryId=shared, imageId=image)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_what_keeps_a_repository_away_is_told(site: sites.Site) -> None:
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


def test_a_mount_that_gives_up_too_late_is_refused(site: sites.Site) -> None:
    """What version 3 has in its connection may arrive 188 s later; takeovers begin 6 x io_timeout + 60 s after."""
    site.directory("late")
    given = site.parameters("late", "3")
    assert site.two.refused("formatStorageRepository", **given, options={"ioTimeout": 21}) == "unsafe_mount"
    site.two("formatStorageRepository", **site.parameters("late", "4.2"), options={"ioTimeout": 1})
    assert site.two.refused("connectStorageRepository", repoId="late", **given) == "unsafe_mount"


def test_an_export_that_is_mounted_hard_is_refused(site: sites.Site) -> None:
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
def test_verbs_work_again_soon_after_the_server_is_back(site: sites.Site, shared: str) -> None:
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


@pytest.mark.timeout(300)
def test_an_export_that_was_made_anew_is_mounted_anew(site: sites.Site) -> None:
    """As when it was restored from a backup: the same names, other handles."""
    one, two = site.one, site.two
    site.connect("anew", "4.2")
    disk = one("createVirtualDisk", targetRepoId="anew", size=MIB)["imageId"]
    place = f"{site.server.path}/anew"
    site.hosts[0].sh(f"cp -a {place} {place}.copy; rm -rf {place}; mv {place}.copy {place}")
    assert two.refused("listImages", repositoryId="anew") == "storage_stale"
    for peer in (one, two):
        peer("connectStorageRepository", repoId="anew", **site.parameters("anew", "4.2"))
        assert peer.image_ids("anew") == {disk}
    for peer in (one, two):
        until(functools.partial(grows, peer, "anew"), 120)  # sanlock has to notice, leave and join again
    for peer in (one, two):
        peer("disconnectStorageRepository", repoId="anew")
        assert "_anew-" not in peer.host.run(["cat", "/proc/mounts"]).out


def grows(peer: peers.Peer, repo_id: str) -> bool:
    with contextlib.suppress(failures.ClientError):
        return bool(peer("createVirtualDisk", targetRepoId=repo_id, size=MIB))
    return False
