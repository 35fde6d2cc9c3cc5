"""Disks behind iSCSI as the agents see them: logged in over the wire, two paths each, cut, grown, in use, gone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests import lab
from tests.lab import blocks, groups, iscsi
from tests.lab.waiting import until
from vdsm.client import failures, transport

pytestmark = pytest.mark.timeout(400)

# Login, udev and multipathd need some seconds each in a host where starting a program is slow.
APPEAR_S = 60.0
# noop interval and time-out and replacement_timeout are 15 s together; then multipathd has to look again.
NOTICE_S = 90.0
USER, PASSWORD = "joe", "Glockenspiel-4711"
MIB = 1 << 20

Told = dict[str, Any]


class Initiator:
    """A host with an agent, and a client of it. `user_id` is who logs in."""

    user_id = "engine"

    def __init__(self, host: lab.Host, target: iscsi.Target, agent: transport.Client) -> None:
        self.host = host
        self.agent = agent
        self.portals = [target.owner.address(net) for net in iscsi.NETS]

    def login(self, connection: str, **more: Any) -> Told:
        return dict(self.agent.call("ISCSIConnection.login", self._session(connection) | more))

    def logout(self, connection: str, **more: Any) -> list[str]:
        return list(self.agent.call("ISCSIConnection.logout", self._session(connection) | more)["users"])

    def login_to_all(self) -> Told:
        """The disk, once it has both paths."""
        for connection in self.portals:
            self.login(connection)
        until(lambda: self.states() == ["active", "active"], APPEAR_S)
        return self.disk()

    def disks(self, **params: Any) -> list[Told]:
        return list(self.agent.call("Host.getDeviceList", {"storageType": "ISCSI", **params}))

    def disk(self, **params: Any) -> Told:
        (found,) = self.disks(**params)
        return found

    def states(self) -> list[str]:
        """Of all paths, as known without asking the disks."""
        found = self.disks(checkStatus=False, refresh=False)
        return sorted(path["state"] for disk in found for path in disk["pathstatus"])

    def left(self) -> list[str]:
        """What there is of iSCSI and multipath in the host."""
        kept = "find /etc/iscsi/nodes /etc/iscsi/send_targets /etc/iscsi/static -mindepth 1"
        return self.host.sh(f"{kept}; ls -d /sys/block/sd* 2>/dev/null || :; multipath -l").out.splitlines()

    def clean_up(self) -> None:
        for connection in self.portals:
            self.logout(connection)

    def _session(self, connection: str) -> Told:
        return {"id": self.user_id, "connection": connection, "iqn": iscsi.TARGET}


@contextlib.contextmanager
def initiator(host: lab.Host, target: iscsi.Target) -> Iterator[Initiator]:
    iscsi.prepare(host)
    host.start_agent()
    with host.agent(120) as agent:
        made = Initiator(host, target, agent)
        yield made
        made.clean_up()


@pytest.fixture
def target(one: lab.Host) -> Iterator[iscsi.Target]:
    """Its disk holds nothing, whatever other tests had on it."""
    groups.wipe(one.luns[1])
    with iscsi.Target(one.luns[1]) as started:
        yield started


@pytest.fixture
def client(two: lab.Host, target: iscsi.Target) -> Iterator[Initiator]:
    with initiator(two, target) as made:
        yield made


def test_a_lun_is_one_disk_with_two_paths_on_every_host(one: lab.Host, target: iscsi.Target, client: Initiator) -> None:
    portal = client.portals[0]
    offered = client.agent.call("ISCSIConnection.discoverSendTargets", {"host": portal})
    assert sorted(offered) == sorted(f"{address}:{iscsi.PORT},1 {iscsi.TARGET}" for address in client.portals)
    client.agent.subscribe(["device"])
    disk = client.login_to_all()
    told = {"devtype": "iSCSI", "status": "free", "usedBy": [], "problems": [], "queueing": "off", "stable": True}
    assert {name: disk[name] for name in told} == told
    assert disk["path"] == f"/dev/mapper/{disk['GUID']}"
    assert (disk["capacity"], disk["logicalblocksize"]) == (256 * MIB, 512)
    assert (disk["vendorID"], disk["serial"]) == ("LIO-ORG", iscsi.SERIAL)
    assert sorted(session["connection"] for session in disk["pathlist"]) == sorted(client.portals)
    assert all(session["givesUpSeconds"] == 15 for session in disk["pathlist"])
    until(lambda: (event := client.agent.next_event(APPEAR_S)) is not None and event["subject"] == disk["GUID"])
    with initiator(one, target) as other:
        assert other.login_to_all()["GUID"] == disk["GUID"]
    blocks.write(client.host, disk["path"], "x")
    assert blocks.read(one, one.luns[1].path) == "x"
    client.clean_up()
    assert client.left() == []
    assert client.agent.call("ISCSIConnection.getSessions") == []


def test_a_cut_path_is_told_and_the_other_carries_on(one: lab.Host, client: Initiator) -> None:
    disk = client.login_to_all()
    first, second = iscsi.NETS
    one.cut(first)
    blocks.write(client.host, disk["path"], "x", timeout_s=60)
    until(lambda: client.states() == ["active", "failed"], NOTICE_S)
    assert client.disk(refresh=False)["status"] == "free"
    one.cut(second)
    until(lambda: client.states() == ["failed", "failed"], NOTICE_S)
    dead = client.disk()
    assert (dead["status"], dead["reason"]) == ("unknown", "no path to it carries I/O")
    assert "2 of 2 paths do not carry I/O" in dead["problems"][0]
    for net in iscsi.NETS:
        one.restore(net)
    until(lambda: client.states() == ["active", "active"], NOTICE_S)
    assert client.disk()["problems"] == []


@pytest.mark.torture
def test_a_lun_that_grew_is_seen_when_asked_for(one: lab.Host) -> None:
    disk = one.luns[1]
    disk.shrink(64)
    with iscsi.Target(disk) as target, initiator(one, target) as client:
        assert client.login_to_all()["capacity"] == 64 * MIB
        disk.heal()
        assert client.disk(refresh=False)["capacity"] == 64 * MIB
        until(lambda: client.disk()["capacity"] == 256 * MIB)
        assert [path["capacity"] for path in client.disk()["pathstatus"]] == [256 * MIB, 256 * MIB]


# Gets the secret backwards. Reads all command lines and environments until it is told; says what it saw of two words.
WATCHER = """\
import os, sys
words, seen = [b"iscsiadm", sys.argv[1][::-1].encode()], [0, 0]
while not os.path.exists("/run/enough"):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{pid}/cmdline", "rb").read() + open(f"/proc/{pid}/environ", "rb").read()
        except OSError:
            continue
        seen = [count + (word in line) for count, word in zip(seen, words)]
open("/run/seen", "w").write(f"{seen[0] > 0} {seen[1]}")
"""


@pytest.mark.torture
def test_a_password_is_needed_and_shown_nowhere(one: lab.Host, two: lab.Host) -> None:
    with iscsi.Target(one.luns[1], chap=(USER, PASSWORD)) as target, initiator(two, target) as client:
        two.run(["tee", "/run/watcher.py"], given=WATCHER)
        two.sh(f"rm -f /run/seen /run/enough; python3 /run/watcher.py {PASSWORD[::-1]} &")
        given = {"user": USER, "password": PASSWORD}
        for refused in ({}, {**given, "password": "Glockenspiel-0815"}):
            with pytest.raises(failures.ClientError) as caught:
                client.login(client.portals[0], **refused)
            assert caught.value.data["key"] == "login_refused"
            with pytest.raises(failures.ClientError, match="refuses this host or its user and password"):
                discover(client, **refused)
        assert client.left() == []
        assert len(discover(client, **given)) == 2
        assert client.left() == []
        assert client.login(client.portals[0], **given)["state"] == "LOGGED_IN"
        two.run(["touch", "/run/enough"])
        until(lambda: two.run(["test", "-s", "/run/seen"], check=False).code == 0)
        assert two.run(["cat", "/run/seen"]).out == "True 0"
        shown = two.run(["grep", "-r", "-l", "-F", PASSWORD, "/run", "/var/log", "/tmp", "/etc"], check=False).out
        (record,) = shown.splitlines()
        assert record.startswith("/etc/iscsi/nodes/")
        assert two.run(["stat", "-c", "%a %U", record]).out == "600 root\n"
        assert two.run(["grep", "-x", "node.startup = manual", record]).out
        assert two.run(["grep", "-r", "-l", "-F", "(not shown)", "/run/vdsm/log"]).out


def discover(client: Initiator, **credentials: str) -> list[str]:
    return list(client.agent.call("ISCSIConnection.discoverSendTargets", {"host": client.portals[0], **credentials}))


ONLY_DISKS = 'use_devicesfile=0 filter=["a|/dev/mapper/3|","r|.*|"]'
LVM = f"lvm {{}} --config 'global {{{{ use_lvmlockd=0 }}}} devices {{{{ {ONLY_DISKS} }}}}' -qq"


def test_the_last_path_to_a_disk_in_use_stays(client: Initiator) -> None:
    disk = client.login_to_all()
    client.login(client.portals[0], id="other")
    client.host.sh(f"{LVM.format('vgcreate')} shelf {disk['path']}; {LVM.format('lvcreate')} -an -L 8m -n board shelf")
    told = client.disk()
    assert (told["status"], told["usedBy"], told["vgName"]) == ("used", ["physical volume of shelf"], "shelf")
    assert told["pvUUID"]
    assert told["vgUUID"]
    client.host.sh(f"{LVM.format('lvchange')} -ay shelf/board")
    assert client.disk(checkStatus=False)["usedBy"] == ["below shelf-board"]
    assert client.logout(client.portals[0]) == ["other"]
    assert client.logout(client.portals[1]) == []
    with pytest.raises(failures.ClientError) as caught:
        client.logout(client.portals[0], id="other")
    assert (caught.value.data["key"], caught.value.data["facts"]["users"]) == ("disk_in_use", "below shelf-board")
    assert client.agent.call("ISCSIConnection.getSessions")[0]["users"] == ["other"]
    client.host.sh(f"{LVM.format('vgchange')} -an shelf; {LVM.format('vgremove')} -f shelf")
    assert client.logout(client.portals[0], id="other") == []
    assert client.left() == []


@pytest.mark.torture
def test_a_lun_that_hangs_delays_no_other(client: Initiator) -> None:
    """A disk that answers nothing, not even with an error."""
    lost = client.host.luns[2]
    lost.hang()
    client.login_to_all()
    found = {disk["GUID"]: disk for disk in client.agent.call("Host.getDeviceList")}
    assert (found[lost.name]["status"], found["lun0"]["status"]) == ("unknown", "free")
    assert "does not answer" in found[lost.name]["reason"]
    assert client.disk()["status"] == "free"
    lost.heal()
