"""Volume groups that several hosts share, by the root helpers' calls: what is active where, and what happens to it when
a host dies or the group's locks are lost."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from supervdsm import calls, contract
from tests import lab
from tests.lab import blocks, groups
from tests.lab.waiting import until

MIB = 1 << 20
EXTENT_BYTES = 4 * MIB
# With io_timeout 2: another host may have a dead one's locks after 8 x io_timeout + 60 s.
TAKEOVER_S = 200.0
# From the loss of the locks' disk to the end of the kill command; 16 s on an idle machine.
KILLED_S = 90.0
LOCKS, DATA, SPARE, OTHER = 3, 4, 5, 2  # LUNs
LVM_CONF = "/etc/lvm/lvmlocal.conf"
pytestmark = pytest.mark.timeout(420)


class Group:
    """The group of a test, in both hosts."""

    name = groups.NAME

    def call(self, host: lab.Host, kind: Any, *arguments: Any) -> Any:
        return groups.call(host, kind(self.name, *arguments))

    def create(self, host: lab.Host, volume: str, size_bytes: int = 64 * MIB) -> None:
        """Active nowhere."""
        self.call(host, calls.CreateVolume, volume, size_bytes)
        self.call(host, calls.DeactivateVolume, volume)

    def activate(self, host: lab.Host, volume: str) -> str:
        """The path of its device."""
        path: str = self.call(host, calls.ActivateVolume, volume).path
        return path

    def volumes(self, host: lab.Host) -> dict[str, calls.Volume]:
        return {volume.name: volume for volume in self.call(host, calls.ListVolumes).volumes}

    def left(self, *hosts: lab.Host) -> list[dict[str, calls.Volume] | None]:
        """As `volumes`, of each host; None: it is not started there, or the host has been booted since."""

        def look(host: lab.Host) -> dict[str, calls.Volume] | None:
            joined = f"s lvm_{self.name}:" in host.run(["sanlock", "client", "status"], check=False).out
            try:
                return self.volumes(host) if joined else None
            except contract.HelperError:
                return None

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(look, hosts))

    def remove(self, host: lab.Host, volume: str) -> str:
        """Why not, or nothing."""
        obstacle: str = self.call(host, calls.RemoveVolume, volume).obstacle
        return obstacle


@pytest.fixture
def group(one: lab.Host, two: lab.Host) -> Group:
    """Started in both hosts, empty; its locks are on a disk that holds nothing else. It stays started for the next."""
    group = Group()
    mine, others = left = group.left(one, two)
    if None in left:
        groups.make(one, group.name, [one.luns[LOCKS], one.luns[DATA]])
        groups.start(two, group.name)
        mine, others = group.left(one, two)
    for name, volume in (others or {}).items():
        if volume.active:
            group.call(two, calls.DeactivateVolume, name)
    for name in mine or {}:
        assert group.remove(one, name) == ""
    return group


def size_of(host: lab.Host, path: str) -> int:
    return int(host.run(["blockdev", "--getsize64", path]).out)


def has_open(host: lab.Host, path: str) -> None:
    """A process of the host opens the device, and keeps it so until it is ended with `pkill -x sleep`."""
    host.sh(f"sleep 4321 < {path} &")


@contextlib.contextmanager
def configured(host: lab.Host, edit: str) -> Iterator[None]:
    """LVM's configuration is another one inside the block."""
    host.run(["sed", "-i.as-it-was", edit, LVM_CONF])
    try:
        yield
    finally:
        host.run(["mv", f"{LVM_CONF}.as-it-was", LVM_CONF])


# -- one group, two hosts ----------------------------------------------------------------------------------------------


@pytest.mark.torture
def test_both_hosts_make_and_see_the_same_volumes(group: Group, one: lab.Host, two: lab.Host) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: [group.create(host, f"{host.name}.{number}") for number in range(3)], (one, two)))
    names = {f"{host.name}.{number}" for host in (one, two) for number in range(3)}
    assert group.volumes(one).keys() == group.volumes(two).keys() == names
    assert not any(volume.active for volume in group.volumes(one).values())
    group.call(one, calls.RemoveVolume, "host2.1")
    assert group.volumes(two).keys() == names - {"host2.1"}


def test_a_volume_that_one_host_left_active_is_written_by_the_other(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 44: the lock of an active volume is lvmlockd's, not the writer's, and outlives the writer."""
    group.create(one, "data")
    path = group.activate(one, "data")
    blocks.write(one, path, "x")
    assert blocks.read(two, group.activate(two, "data")) == "x"
    blocks.write(two, path, "y")
    assert blocks.read(one, path) == "y"
    assert group.remove(two, "data") == "active elsewhere"
    assert group.volumes(two)["data"].size_bytes == 64 * MIB
    assert group.call(one, calls.DeactivateVolume, "data") == calls.DeactivatedVolume(in_use=False)
    assert group.remove(two, "data") == ""
    assert group.remove(two, "data") == ""
    assert group.call(one, calls.DeactivateVolume, "data") == calls.DeactivatedVolume(in_use=False)


@pytest.mark.torture
def test_a_lock_left_active_by_a_call_does_not_keep_its_volume(group: Group, one: lab.Host, two: lab.Host) -> None:
    """A call that was cut off between the device and its lock: LVM knows of no active volume any more."""
    group.create(one, "data")
    for host in (one, two):
        group.activate(host, "data")
    two.run(["dmsetup", "remove", f"{group.name}-data"], environment={"DM_DISABLE_UDEV": "1"})
    assert group.remove(one, "data") == "active elsewhere"
    group.activate(one, "data")
    assert group.remove(two, "data") == "active elsewhere"
    assert group.remove(one, "data") == ""
    group.create(one, "data")
    group.activate(one, "data")
    one.run(["dmsetup", "remove", f"{group.name}-data"], environment={"DM_DISABLE_UDEV": "1"})
    assert group.remove(one, "data") == ""


def test_a_volume_in_use_grows_and_the_other_host_sees_it_when_it_looks(
    group: Group, one: lab.Host, two: lab.Host
) -> None:
    """Trap 46."""
    group.create(one, "data")
    path = group.activate(one, "data")
    group.activate(two, "data")
    has_open(one, path)
    assert group.call(one, calls.ExtendVolume, "data", 90 * MIB).size_bytes == 92 * MIB
    assert size_of(one, path) == 92 * MIB
    assert size_of(two, path) == 64 * MIB
    assert group.call(two, calls.RefreshVolume, "data").size_bytes == 92 * MIB
    assert group.call(two, calls.ExtendVolume, "data", 5).size_bytes == 92 * MIB  # never shrinks
    group.call(one, calls.ExtendVolume, "data", 100 * MIB)
    assert group.call(two, calls.ActivateVolume, "data").size_bytes == 100 * MIB
    assert size_of(two, path) == 100 * MIB
    one.run(["pkill", "-x", "sleep"])


def test_a_volume_in_use_stays(group: Group, one: lab.Host, two: lab.Host) -> None:
    group.create(one, "data")
    path = group.activate(one, "data")
    has_open(one, path)
    assert group.call(one, calls.DeactivateVolume, "data") == calls.DeactivatedVolume(in_use=True)
    assert group.call(one, calls.StopVolumeGroup) == calls.StoppedVolumeGroup(["data"])
    assert group.remove(one, "data") == "in use"
    assert group.volumes(one)["data"] == calls.Volume("data", path, 64 * MIB, active=True, open=True)
    assert group.volumes(two)["data"] == calls.Volume("data", path, 64 * MIB, active=False, open=False)
    one.run(["pkill", "-x", "sleep"])
    assert group.call(one, calls.StopVolumeGroup) == calls.StoppedVolumeGroup([])
    assert one.run(["test", "-e", path], check=False).code == 1
    with pytest.raises(contract.Failed, match="is not started on this host"):
        group.volumes(one)


@pytest.mark.parametrize(
    "udev", [False, pytest.param(True, marks=pytest.mark.torture)], ids=["without udev", "with udev"]
)
def test_the_agent_and_qemu_may_write_volumes(group: Group, one: lab.Host, udev: bool) -> None:
    if udev:
        one.sh("/lib/systemd/systemd-udevd --daemon")
        until(lambda: one.run(["udevadm", "control", "--ping"], check=False).code == 0)
    groups.start(one, group.name)
    group.create(one, "data")
    path = group.activate(one, "data")
    for size in (64, 128):
        group.call(one, calls.ExtendVolume, "data", size * MIB)
        if udev:
            one.run(["udevadm", "settle"])
        for user, other in (("vdsm", "vdsm"), ("libvirt-qemu", "kvm")):
            who = ["setpriv", "--reuid", user, "--regid", other, "--clear-groups"]
            one.run([*who, "dd", "if=/dev/zero", f"of={path}", "bs=4096", "count=1", "oflag=direct", "conv=notrunc"])
        nobody = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "head", "-c1", path]
        assert one.run(nobody, check=False).code == 1
    locks = f"/dev/mapper/{group.name}-lvmlock"
    assert one.run(["stat", "-L", "-c", "%U", locks]).out == "root\n"
    if udev:
        assert group.remove(one, "data") == ""
        one.run(["udevadm", "control", "--exit"])
        one.run(["rm", "-f", "/run/udev/control"])


# -- who may use which disk --------------------------------------------------------------------------------------------


@pytest.mark.torture
def test_disks_that_hold_something_are_taken_only_by_name(group: Group, one: lab.Host) -> None:
    disk = one.luns[OTHER]
    one.run(["mkfs.ext4", "-q", "-F", disk.path])
    with pytest.raises(contract.Refused, match=f"{disk.path} is not empty: ext4"):
        group.call(one, calls.ExtendVolumeGroup, [disk.path], [])
    blocks.write(one, disk.path, "x")
    one.run(["wipefs", "-q", "--all", disk.path])
    with pytest.raises(contract.Refused, match=f"{disk.path} is not empty: data"):
        group.call(one, calls.ExtendVolumeGroup, [disk.path], [])
    one.run(["mkfs.ext4", "-q", "-F", disk.path])
    one.sh(f"mkdir -p /run/mounted; mount {disk.path} /run/mounted")
    with pytest.raises(contract.Refused, match=f"{disk.path}: Device or resource busy"):
        group.call(one, calls.ExtendVolumeGroup, [disk.path], [disk.path])
    one.run(["umount", "/run/mounted"])


def test_a_group_that_is_in_use_is_not_overwritten(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 56, whichever of its disks is named, and with no volume active."""
    locks, data, other = (one.luns[number].path for number in (LOCKS, DATA, OTHER))

    def overwrite(taken: str) -> None:
        groups.call(one, calls.MakeVolumeGroup("another", [taken], overwrite=[taken], host_id=one.number))

    for taken in (locks, data):
        with pytest.raises(contract.Refused, match=f"{taken} has volume group lunar, which this host uses"):
            overwrite(taken)
    group.call(one, calls.StopVolumeGroup)
    for taken in (locks, data):
        with pytest.raises(contract.Refused, match=f"{taken} has volume group lunar, which host2 uses"):
            overwrite(taken)
    one.luns[LOCKS].cut()
    with pytest.raises(contract.Refused, match="lunar may be in use: the disk with its locks is not there"):
        overwrite(data)
    one.luns[LOCKS].heal()
    with pytest.raises(contract.Refused, match=f"there is a volume group {group.name} on {locks}"):
        groups.call(one, calls.MakeVolumeGroup(group.name, [other], overwrite=[other], host_id=one.number))


@pytest.mark.parametrize("path", ["/dev/mapper/control", "/dev/mapper/absent", "/dev/mapper/foreign"])
def test_disks_that_the_helper_was_not_given_are_refused(group: Group, one: lab.Host, path: str) -> None:
    create = "[ -e /dev/mapper/foreign ] || dmsetup create foreign --table '0 8192 zero'"
    one.sh(f"export DM_DISABLE_UDEV=1; {create}")
    with pytest.raises(contract.Refused, match="is not a disk"):
        group.call(one, calls.ExtendVolumeGroup, [path], [path])


def test_guests_volume_groups_are_not_seen(group: Group, one: lab.Host) -> None:
    """Trap 50. By its name the volume could be one of the disks that the helper was given."""
    group.create(one, "data")
    path = group.activate(one, "data")
    inside = ["--config", "devices { scan_lvs=1 use_devicesfile=0 } global { use_lvmlockd=0 }", "--devices", path]
    one.run(["vgcreate", *inside, "guests", path], environment={"DM_DISABLE_UDEV": "1"})
    assert "guests" in one.run(["vgs", *inside, "--noheadings", "-o", "vg_name"]).out
    with pytest.raises(contract.Failed, match="has a volume group guests"):
        groups.call(one, calls.GetVolumeGroup("guests"))
    with pytest.raises(contract.Refused, match="is not a disk for volume groups"):
        group.call(one, calls.ExtendVolumeGroup, [f"/dev/mapper/{group.name}-data"], [])
    assert group.call(one, calls.DeactivateVolume, "data") == calls.DeactivatedVolume(in_use=False)


def test_nothing_activates_volumes_by_itself(group: Group, one: lab.Host) -> None:
    """Trap 50: what a booting host does, and what either the group or the volume would allow it."""
    group.create(one, "data")
    disks = ",".join(one.luns[number].path for number in (LOCKS, DATA))
    fields = ["--binary", "--noheadings", "-o", "vg_autoactivation,lv_autoactivation"]
    allowed = one.run(["lvs", "--nolocking", "--devices", disks, *fields, f"{group.name}/data"]).out.split()
    assert allowed == ["0", "0"]
    one.run(["vgchange", "--activate", "ay", "--devices", disks, group.name], environment={"DM_DISABLE_UDEV": "1"})
    assert not group.volumes(one)["data"].active


@pytest.mark.torture
def test_a_disk_that_hangs_delays_no_other_group(group: Group, one: lab.Host) -> None:
    began = time.monotonic()
    group.volumes(one)
    free_s = time.monotonic() - began
    one.luns[SPARE].hang()
    began = time.monotonic()
    group.create(one, "data")
    group.activate(one, "data")
    group.volumes(one)
    assert time.monotonic() - began < 10 * free_s + 5


# -- starting ----------------------------------------------------------------------------------------------------------


def test_one_start_is_enough_on_a_host_that_never_had_the_group(group: Group, two: lab.Host) -> None:
    """Trap 48. A start that finds it started does nothing."""
    two.renew()
    assert groups.start(two, group.name).started
    began = groups.start(two, group.name)
    assert began.name == group.name
    assert groups.call(two, calls.GetLockManager()).groups == {group.name: two.number}


def test_no_group_is_started_without_the_kill_command(group: Group, two: lab.Host) -> None:
    """Trap 47: without it, a host that loses the locks goes on writing."""
    group.call(two, calls.StopVolumeGroup)
    with configured(two, "/kill_command/d"):
        (obstacle,) = groups.call(two, calls.GetLockManager()).obstacles
        assert "lvmlockctl_kill_command of lvm.conf is not" in obstacle
        with pytest.raises(contract.Refused, match="lvmlockctl_kill_command"):
            groups.start(two, group.name)


def test_no_group_is_started_where_sanlock_cannot_run_the_kill_command(group: Group, two: lab.Host) -> None:
    """Trap 47: it needs root, and sanlock has nobody of root's when it was not started by root."""
    group.call(two, calls.StopVolumeGroup)
    end_sanlock(two)
    daemon = "sanlock daemon -D -L -1 -S -1 -w 0 -U sanlock -G kvm > /dev/null 2>&1"
    who = "setpriv --reuid sanlock --regid kvm --clear-groups"
    two.sh(f"rm -f $SANLOCK_RUN_DIR/*; SANLOCK_PRIVILEGED=0 {who} {daemon} &")
    until(lambda: two.run(["sanlock", "client", "status"], check=False).code == 0)
    with pytest.raises(contract.Refused, match="sanlock was not started by root"):
        groups.call(two, calls.StartVolumeGroup(group.name, two.number, []))
    end_sanlock(two)


def end_sanlock(host: lab.Host) -> None:
    """Which has no lockspace."""
    host.run(["sanlock", "client", "shutdown"])
    until(lambda: host.run(["pgrep", "-x", "sanlock"], check=False).code == 1)


def test_a_host_has_one_id(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 52: one for lvmlockd and for all of ours, and nobody else's."""
    group.call(two, calls.StopVolumeGroup)
    with pytest.raises(contract.Refused, match=r"lvmlocal\.conf is 2, and the agent's host id 7"):
        groups.call(two, calls.StartVolumeGroup(group.name, 7, []))
    taken = "host id 1 is host1's, which uses it in volume group lunar now"
    with configured(two, "s/host_id = 2/host_id = 1/"), pytest.raises(contract.Refused, match=taken):
        groups.call(two, calls.StartVolumeGroup(group.name, 1, []))
    with pytest.raises(contract.Failed, match="is not started on this host"):
        group.volumes(two)


# -- the global lock ---------------------------------------------------------------------------------------------------


def test_the_global_lock_is_found_or_given_to_the_group_that_grows(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 49: the first group has it, and may be away. When that one comes back there are two, which is told."""
    spare, other = one.luns[SPARE].path, one.luns[OTHER].path
    groups.call(one, calls.MakeVolumeGroup("second", [spare], overwrite=[spare], host_id=one.number))
    with pytest.raises(contract.Refused, match=f"volume group {group.name} has the global lock"):
        groups.call(one, calls.EnableGlobalLock("second"))
    group.call(one, calls.StopVolumeGroup)
    grow = calls.ExtendVolumeGroup("second", [other], overwrite=[other])
    with pytest.raises(contract.Refused, match=f"{group.name} may have it"):
        groups.call(one, grow)
    away = [one.luns[number] for number in (LOCKS, DATA)]
    for disk in away:
        disk.cut()
    assert groups.call(one, grow).devices == [spare, other]
    for disk in away:
        disk.heal()
    groups.start(one, group.name)
    both = [group.name, "second"]
    assert groups.call(one, calls.GetLockManager()).global_locks == both
    with pytest.raises(contract.Refused, match=f"{' and '.join(both)} both have LVM's global lock"):
        group.call(one, calls.ExtendVolumeGroup, [one.luns[1].path], [one.luns[1].path])
    one.run(["lvmlockctl", "--gl-disable", "second"])
    assert groups.call(one, calls.GetLockManager()).global_locks == [group.name]
    groups.call(one, calls.StopVolumeGroup("second"))
    for number in (SPARE, OTHER):
        groups.wipe(one.luns[number])


# -- outages -----------------------------------------------------------------------------------------------------------


def test_a_host_that_loses_the_locks_writes_no_more(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 47. The disk with the data is there all the time. What is refused here is still this host's then: nobody
    else has got the locks. Who survives it bars the way back, so that he finds out."""
    group.create(one, "data")
    path = group.activate(one, "data")
    blocks.write(one, path, "x")
    has_open(one, path)
    one.luns[LOCKS].cut()
    until(lambda: not groups.call(one, calls.GetLockManager()).groups, KILLED_S)
    assert group.remove(two, "data") == "active elsewhere"
    one.run(["dd", f"if={one.luns[DATA].path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"])
    with pytest.raises(lab.CommandError, match="Input/output error"):
        blocks.write(one, path, "y")
    assert one.run(["dmsetup", "table", f"{group.name}-data"]).out.split()[2] == "error"
    until(lambda: "lvm_" not in one.run(["sanlock", "client", "status"]).out, KILLED_S)
    # Nobody waits for anybody: the other host goes on at once.
    assert blocks.read(two, group.activate(two, "data")) == "x"
    blocks.write(two, path, "z")
    group.create(two, "more")
    one.luns[LOCKS].heal()
    with pytest.raises(contract.Refused, match=f"volume {group.name}/data has lost its lock, and a process still has"):
        groups.start(one, group.name)
    assert group.call(one, calls.StopVolumeGroup) == calls.StoppedVolumeGroup(["data"])
    one.run(["pkill", "-x", "sleep"])
    groups.start(one, group.name)
    assert not group.volumes(one)["data"].active
    assert blocks.read(one, group.activate(one, "data")) == "z"
    blocks.write(one, group.activate(one, "more"), "w")


def test_a_group_with_a_write_under_way_is_not_given_up(group: Group, one: lab.Host) -> None:
    """The disk may do it at any later time, so the locks must not pass on: the watchdog has to decide."""
    group.create(one, "data")
    path = group.activate(one, "data")
    one.luns[DATA].hang()
    one.sh(f"dd if=/dev/zero of={path} bs=4096 count=1 oflag=direct status=none &")
    until(lambda: one.run(["pgrep", "-x", "dd"], check=False).code == 0)
    killed = one.run(["/usr/bin/python3", "-I", "/run/vdsm/code/supervdsm/killvg.py", group.name], 60, check=False)
    assert (killed.code, "cannot be cut off" in killed.err) == (1, True)
    one.luns[DATA].heal()
    one.renew()


def test_a_dead_hosts_volumes_are_used_by_the_others(group: Group, one: lab.Host, two: lab.Host) -> None:
    """Trap 44. Only removing them has to wait, until it is back or its locks may pass on."""
    group.create(one, "data")
    group.activate(one, "data")
    one.kill()
    group.create(two, "more")
    blocks.write(two, group.activate(two, "data"), "y")
    assert group.remove(two, "data") == "active elsewhere"
    one.boot()
    groups.start(one, group.name)
    assert group.remove(two, "data") == ""
    assert group.volumes(one).keys() == {"more"}


@pytest.mark.torture
@pytest.mark.parametrize("loss", ["host", "locks"])
def test_what_a_lost_host_had_active_can_be_removed_in_time(
    group: Group, one: lab.Host, two: lab.Host, loss: str
) -> None:
    """As the two before, until the locks have passed on: the host that lost them refuses everything by then."""
    group.create(one, "data")
    path = group.activate(one, "data")
    if loss == "host":
        one.kill()
    else:
        one.luns[LOCKS].cut()
    assert group.remove(two, "data") == "active elsewhere"
    until(lambda: group.remove(two, "data") == "", TAKEOVER_S)
    if loss == "locks":
        with pytest.raises(lab.CommandError, match="Input/output error"):
            blocks.write(one, path, "y")
    one.mend()
    groups.start(one, group.name)
    assert group.volumes(one) == {}
