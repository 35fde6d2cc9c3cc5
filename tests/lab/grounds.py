"""Disks that both hosts of a lab see, of each kind that a volume group may lie on.

    with grounds.KINDS["iscsi"](one, two) as device:
        ...                         a stable name, the same in both hosts; nothing of it is known by any other name

    lun      a LUN by the device mapper
    iscsi    the same behind a target of the first host's, to which both log in over two paths, by multipath
    4k       with sectors of 4096 bytes, for which LVM wants 1 GiB for a group's locks: two LUNs, one behind the other

Both hosts run their agents inside the block, and are booted anew at its end.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator

from tests import lab
from tests.lab import groups, iscsi, lun, peers
from tests.lab.waiting import until

# The only LUN with room for a group's locks and for images, and one to make a group larger with.
NUMBER, SPARE = 4, 5
SECTOR_BYTES = {"lun": 512, "iscsi": 512, "4k": 4096}
APPEAR_S = 120.0
_NO_UDEV = {"DM_DISABLE_UDEV": "1"}
# Past the page cache of the loop device's host: another one writes the LUN, too.
_LARGE_SECTORS = "modprobe loop; losetup --sector-size 4096 --direct-io=on --show --find {disk}"


@contextlib.contextmanager
def plain(one: lab.Host, two: lab.Host) -> Iterator[str]:
    with _renewed(one, two):
        _each(lab.Host.start_agent, one, two)
        yield one.luns[NUMBER].path


@contextlib.contextmanager
def large_sectors(one: lab.Host, two: lab.Host) -> Iterator[str]:
    with _renewed(one, two):
        for host in (one, two):
            _map(host, "joined", _bare(host, NUMBER), _bare(host, SPARE))
            loop = host.sh(_LARGE_SECTORS.format(disk="/dev/mapper/joined")).out.strip()
            _map(host, "lunlarge", loop)
        _each(lab.Host.start_agent, one, two)
        yield "/dev/mapper/lunlarge"


@contextlib.contextmanager
def behind_iscsi(one: lab.Host, two: lab.Host) -> Iterator[str]:
    with _renewed(one, two):
        _bare(two, NUMBER)
        _map(one, "exported", _bare(one, NUMBER))
        exported = lun.Lun(one, NUMBER)
        exported.path = "/dev/mapper/exported"
        iscsi.Target(exported).start()
        _each(iscsi.prepare, one, two)
        _each(lab.Host.start_agent, one, two)
        names = {_logged_in(peers.Peer(host), one) for host in (one, two)}
        (name,) = names
        yield name


KINDS: dict[str, Callable[[lab.Host, lab.Host], contextlib.AbstractContextManager[str]]] = {
    "lun": plain,
    "iscsi": behind_iscsi,
    "4k": large_sectors,
}


def mount(host: lab.Host, path: str) -> None:
    """A file system of this host's own over the directory, whose owner stays: what is in memory has no direct I/O."""
    disk = host.luns[host.number - 1].path
    host.sh(f"owner=$(stat -c %u:%g {path}); mkfs.ext4 -q -F {disk}; mount {disk} {path}; chown $owner {path}")


def _logged_in(peer: peers.Peer, target: lab.Host) -> str:
    """The disk's name, once it has all its paths."""
    portals = [target.address(net) for net in iscsi.NETS]
    offered = peer("ISCSIConnection.discoverSendTargets", host=portals[0])
    assert {line.split(":")[0] for line in offered} == set(portals), offered
    for portal in portals:
        peer("ISCSIConnection.login", id="lab", connection=portal, iqn=iscsi.TARGET)

    def paths() -> list[str]:
        found = peer("Host.getDeviceList", storageType="ISCSI", checkStatus=False, refresh=False)
        return [path["state"] for disk in found for path in disk["pathstatus"]]

    until(lambda: paths() == ["active", "active"], APPEAR_S)
    (disk,) = peer("Host.getDeviceList", storageType="ISCSI")
    assert (disk["stable"], disk["problems"]) == (True, [])
    return str(disk["path"])


def _bare(host: lab.Host, number: int) -> str:
    """The LUN's disk itself, no longer under the name that LUNs have."""
    host.run(["dmsetup", "remove", host.luns[number].name], environment=_NO_UDEV)
    return f"/dev/ubd{chr(ord('a') + number)}"


def _map(host: lab.Host, name: str, *disks: str) -> None:
    """The disks, one behind the other, are one of that name."""
    table, begin = "", 0
    for disk in disks:
        sectors = int(host.run(["blockdev", "--getsz", disk]).out)
        table += f"{begin} {sectors} linear {disk} 0\n"
        begin += sectors
    host.run(["dmsetup", "create", name], given=table, environment=_NO_UDEV)


def renew(*hosts: lab.Host) -> None:
    """All are booted anew: the quickest way out of everything. In this thread, with which they would end."""
    for host in hosts:
        host.kill()
        host.start()
    for host in hosts:
        host.wait()
        until(host.answers, APPEAR_S)


def _each(do: Callable[[lab.Host], None], *hosts: lab.Host) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(do, hosts))


@contextlib.contextmanager
def _renewed(one: lab.Host, two: lab.Host) -> Iterator[None]:
    _wipe(one)
    try:
        yield
    finally:
        renew(one, two)
        _wipe(one)


def _wipe(host: lab.Host) -> None:
    for number in (NUMBER, SPARE):
        groups.wipe(host.luns[number])
