"""Shared storage in the lab: leases across hosts, NFS, iSCSI over two paths, and what happens to each when a host, a
LUN or a cable goes."""

import concurrent.futures
from collections.abc import Iterator

import pytest

from tests import lab
from tests.lab import blocks, iscsi, nfs
from tests.lab.waiting import until

# What the kernel and sanlock do is the ground of all others, which meet it by the way.
pytestmark = pytest.mark.torture

# -- leases ------------------------------------------------------------------------------------------------------------

LOCKSPACE = "LAB:{number}:{path}:0"
LEASE = "LAB:lease:{path}:1048576"
IO_TIMEOUT_S = "1"
# sanlock gives a dead host's lease away after 8 x io_timeout + 60 s.
TAKEOVER_S = 150.0


def join(host: lab.Host) -> None:
    host.start_sanlock()
    lockspace = LOCKSPACE.format(number=host.number, path=host.luns[0].path)
    host.run(["sanlock", "client", "add_lockspace", "-s", lockspace, "-o", IO_TIMEOUT_S], 60)


def lease(host: lab.Host) -> str:
    return LEASE.format(path=host.luns[0].path)


def take(host: lab.Host, timeout_s: float = 30) -> bool:
    """Whether it could have the lease, for a moment."""
    command = ["sanlock", "client", "command", "-r", lease(host), "-c", "/bin/echo", "mine"]
    return host.run(command, timeout_s, check=False).out == "mine\n"


@pytest.fixture
def held(one: lab.Host, two: lab.Host) -> Iterator[lab.Host]:
    """Both hosts are in the lockspace, and this one holds the lease."""
    one.start_sanlock()
    first = one.luns[0].path
    lockspace = LOCKSPACE.format(number=0, path=first)
    one.run(["sanlock", "client", "init", "-s", lockspace, "-o", IO_TIMEOUT_S])
    one.run(["sanlock", "client", "init", "-r", lease(one)])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(join, (one, two)))
    one.sh(f"sanlock client command -r {lease(one)} -c /bin/sleep 4321 &")
    until(lambda: one.run(["pgrep", "-x", "sleep"], check=False).code == 0)  # which runs once the lease is there
    yield one
    for host in (one, two):
        host.renew()  # the quickest way out of a lockspace


def test_a_lease_excludes_the_other_host(held: lab.Host, two: lab.Host) -> None:
    assert not take(two)
    held.run(["pkill", "-x", "sleep"])
    until(lambda: take(two))


def test_a_host_that_loses_its_lun_loses_the_holder(held: lab.Host, two: lab.Host) -> None:
    held.luns[0].cut()
    until(lambda: held.run(["pgrep", "-x", "sleep"], check=False).code == 1, 60)
    assert held.answers()


@pytest.mark.timeout(400)
def test_a_dead_hosts_lease_is_taken_over(held: lab.Host, two: lab.Host) -> None:
    held.kill()
    assert not take(two, 10)
    until(lambda: take(two, TAKEOVER_S), TAKEOVER_S)


# -- NFS ---------------------------------------------------------------------------------------------------------------

# With these options, once the server does not answer: in version 3 a write fails after 4 s. In version 4.1 the first
# one does after 20 s (those behind it after 4 s each), and the opening of a file after 8 to more than 30 s (seen).
GIVEN_UP_S = 100.0


@pytest.mark.parametrize("version", ["3", "4.1", "4.2"])
def test_an_export_is_mounted(one: lab.Host, two: lab.Host, version: str) -> None:
    with nfs.Server(one.luns[2]) as server, server.mounted(two, "/run/mounted", version) as path:
        options = two.run(["findmnt", "-n", "-o", "OPTIONS", path]).out
        assert f"vers={version}," in options
        blocks.write(two, f"{path}/file", "x")
        assert blocks.read(one, f"{server.path}/file") == "x"


@pytest.mark.timeout(240)
def test_an_export_outlives_its_server(one: lab.Host, two: lab.Host) -> None:
    server = nfs.Server(one.luns[2])
    with server, server.mounted(two, "/run/mounted", "4.1") as path:
        blocks.write(two, f"{path}/file", "x")
        one.kill()
        with pytest.raises(lab.CommandError, match=r"Input/output error|timed out"):
            blocks.write(two, f"{path}/file", "y", timeout_s=GIVEN_UP_S)
        one.boot()
        server.start()
        until(lambda: two.run(["test", "-s", f"{path}/file"], check=False).code == 0, 60)
        assert blocks.read(two, f"{path}/file") == "x"


@pytest.mark.timeout(240)
def test_a_server_that_is_cut_off_fails_what_waits_for_it(one: lab.Host, two: lab.Host) -> None:
    with nfs.Server(one.luns[2]) as server, server.mounted(two, "/run/mounted", "4.1") as path:
        blocks.write(two, f"{path}/file", "x")
        one.cut("lan")
        with pytest.raises(lab.CommandError, match=r"Input/output error|timed out"):
            blocks.write(two, f"{path}/file", "y", timeout_s=GIVEN_UP_S)
        one.restore("lan")
        until(lambda: two.sh(f"echo z > {path}/other", check=False).code == 0, 60)


# -- iSCSI -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_a_disk_survives_the_loss_of_one_path(one: lab.Host, two: lab.Host) -> None:
    with iscsi.Target(one.luns[1]) as target, iscsi.Disk(two, target) as disk:
        blocks.write(two, disk.path, "x")
        for net in iscsi.NETS:
            one.cut(net)
            blocks.write(two, disk.path, net[0])
            until(lambda: disk.paths() == ["active", "failed"], 60)
            one.restore(net)
            until(lambda: disk.paths() == ["active", "active"], 60)
    assert blocks.read(one, one.luns[1].path) == "s"


@pytest.mark.timeout(240)
def test_a_disk_without_paths_fails_in_time(one: lab.Host, two: lab.Host) -> None:
    with iscsi.Target(one.luns[1]) as target, iscsi.Disk(two, target) as disk:
        for net in iscsi.NETS:
            two.cut(net)
        with pytest.raises(lab.CommandError, match="Input/output error"):
            blocks.write(two, disk.path, "x")
        until(lambda: disk.paths() == ["failed", "failed"], 60)
        for net in iscsi.NETS:
            two.restore(net)
        until(lambda: disk.paths() == ["active", "active"], 60)
        blocks.write(two, disk.path, "y")
