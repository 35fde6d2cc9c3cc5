"""Volumes of a group that two hosts share, by the root helpers' calls: what is active where, and what happens to it
when a host dies or the group's locks are lost."""

import concurrent.futures

import pytest

from supervdsm import calls, contract
from tests import lab
from tests.lab import blocks, groups
from tests.lab.groups import DATA, LOCKS, MIB, Group
from tests.lab.waiting import until

# With io_timeout 2: another host may have a dead one's locks after 8 x io_timeout + 60 s.
TAKEOVER_S = 200.0
# From the loss of the locks' disk to the end of the kill command; 16 s on an idle machine.
KILLED_S = 90.0
pytestmark = pytest.mark.timeout(420)


@pytest.fixture
def group(group_of_both: Group) -> Group:
    return group_of_both


def size_of(host: lab.Host, path: str) -> int:
    return int(host.run(["blockdev", "--getsize64", path]).out)


def has_open(host: lab.Host, path: str) -> None:
    """A process of the host opens the device, and keeps it so until it is ended with `pkill -x sleep`."""
    host.sh(f"sleep 4321 < {path} &")


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
    assert group.volumes(two, "da") == group.volumes(two) and group.volumes(two, "d.ta") == {}
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
