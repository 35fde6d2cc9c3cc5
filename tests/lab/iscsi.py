"""iSCSI in a lab: one host exports a LUN, the others see it as one multipath disk over two paths, `lan` and `san`.

The target is the kernel's own (LIO), set up by its file system of settings: it needs no daemon.
"""

import re
from typing import Self

from tests.lab import host, lun
from tests.lab.waiting import until

TARGET = "iqn.2026-01.test.lab:target"
PORT = 3260
NETS = ("lan", "san")
START_S = 60.0
SERIAL = "1ab0000000000001"
# How soon (seconds) a dead path is noticed and given up. Together well below what sanlock waits for its storage.
SETTINGS = {
    "node.session.timeo.replacement_timeout": 5,
    "node.conn[0].timeo.noop_out_interval": 2,
    "node.conn[0].timeo.noop_out_timeout": 3,
}

EXPORT = """\
modprobe -a target_core_mod target_core_iblock iscsi_target_mod
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
core=/sys/kernel/config/target/core/iblock_0/lab
mkdir -p $core
echo udev_path={disk} > $core/control
echo {serial} > $core/wwn/vpd_unit_serial
echo 1 > $core/enable
group=/sys/kernel/config/target/iscsi/{target}/tpgt_1
mkdir -p $group/lun/lun_0
ln -s $core $group/lun/lun_0/port
echo 0 > $group/attrib/authentication
echo 1 > $group/attrib/generate_node_acls
echo 1 > $group/attrib/cache_dynamic_acls
echo 0 > $group/attrib/demo_mode_write_protect
"""

# multipathd asks udev about disks, so udev comes first, and before the first disk does.
PREPARE = """\
modprobe -a iscsi_tcp sd_mod dm-multipath dm-service-time
pidof systemd-udevd >/dev/null || /lib/systemd/systemd-udevd --daemon
pidof iscsid >/dev/null || iscsid
pidof multipathd >/dev/null || multipathd
"""


# What initiators have to show, to log in and to ask for targets.
CHAP = """\
echo 1 > $group/attrib/authentication
printf %s {user} > $group/auth/userid
printf %s {password} > $group/auth/password
echo 1 > /sys/kernel/config/target/iscsi/discovery_auth/enforce_discovery_auth
printf %s {user} > /sys/kernel/config/target/iscsi/discovery_auth/userid
printf %s {password} > /sys/kernel/config/target/iscsi/discovery_auth/password
"""


def prepare(client: host.Host) -> None:
    """What an initiator needs runs; open-iscsi and multipath as Debian configures the one and the lab the other."""
    client.sh(PREPARE, START_S)


class Target:
    """A context manager. `disk` is exported by its host, which may not use it itself then. `chap`: user, password."""

    def __init__(self, disk: lun.Lun, chap: tuple[str, str] | None = None) -> None:
        self.owner = disk.owner
        self._disk = disk
        self._chap = chap

    def start(self) -> None:
        """Returns when it serves."""
        script = EXPORT.format(disk=self._disk.path, serial=SERIAL, target=TARGET)
        if self._chap is not None:
            script += CHAP.format(user=self._chap[0], password=self._chap[1])
        portals = " ".join(f"$group/np/{self.owner.address(net)}:{PORT}" for net in NETS)
        self.owner.sh(f"{script}mkdir {portals}\necho 1 > $group/enable\n", START_S)

    def stop(self) -> None:
        """No longer exported, and the LUN is free; nothing where the host is off."""
        if not self.owner.running:
            return
        self.owner.sh(
            f"""\
            group=/sys/kernel/config/target/iscsi/{TARGET}/tpgt_1
            echo 0 > /sys/kernel/config/target/iscsi/discovery_auth/enforce_discovery_auth
            echo 0 > $group/enable
            rm $group/lun/lun_0/port
            rmdir $group/np/* $group/lun/lun_0 $group ${{group%/*}}
            rmdir /sys/kernel/config/target/core/iblock_0/lab
            """
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class Disk:
    """A context manager: the target's LUN in an initiator. `path` is the multipath device."""

    def __init__(self, client: host.Host, target: Target) -> None:
        self._client = client
        self._target = target
        self.path = ""

    def connect(self) -> None:
        """Returns when the disk is there with both paths."""
        changes = "".join(
            f"sed -i 's/^{re.escape(name)} = .*/{name} = {value}/' /etc/iscsi/iscsid.conf\n"
            for name, value in SETTINGS.items()
        )
        self._client.sh(changes + PREPARE, START_S)
        portal = f"{self._target.owner.address('lan')}:{PORT}"
        self._client.run(["iscsiadm", "-m", "discovery", "-t", "sendtargets", "-p", portal])
        self._client.run(["iscsiadm", "-m", "node", "-T", TARGET, "--login"])
        until(lambda: self.paths() == ["active", "active"], START_S)
        self.path = f"/dev/mapper/{self._name()}"
        until(lambda: self._client.run(["test", "-b", self.path], check=False).code == 0)

    def paths(self) -> list[str]:
        """For each path "active", when the kernel uses it and the last check was good, or "failed".

        As multipathd knows it, which is seconds behind: wait for each change, or it is yet to come.
        """
        lines = [line.split() for line in self._ask_multipathd("paths", "%d %t %T")]
        return sorted("active" if line[1:] == ["active", "ready"] else "failed" for line in lines if len(line) == 3)

    def disconnect(self) -> None:
        """The disk is gone; nobody may use it. Nothing where the host is off."""
        if not self._client.running:
            return
        # udev looks at a disk whose path has come back, and holds it for a moment.
        until(lambda: self._client.run(["multipath", "-F"], check=False).code == 0)
        self._client.run(["iscsiadm", "-m", "node", "-T", TARGET, "--logout"])
        self._client.run(["iscsiadm", "-m", "node", "-T", TARGET, "-o", "delete"])

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *exception: object) -> None:
        self.disconnect()

    def _name(self) -> str:
        (name,) = self._ask_multipathd("maps", "%n")
        return name

    def _ask_multipathd(self, what: str, form: str) -> list[str]:
        """It answers "ok" when it knows none, and nothing while it starts."""
        answer = self._client.run(["multipathd", "show", what, "raw", "format", form], check=False).out
        return [line.strip() for line in answer.splitlines() if line.strip() != "ok"]
