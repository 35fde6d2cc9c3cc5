"""Shared volume groups by the root helpers' calls: which disks they are given, who starts them and when not, and who
has LVM's global lock."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator

import pytest

from supervdsm import calls, contract
from tests import lab
from tests.lab import blocks, groups
from tests.lab.groups import DATA, LOCKS, OTHER, SPARE, Group
from tests.lab.waiting import until

LVM_CONF = "/etc/lvm/lvmlocal.conf"
pytestmark = pytest.mark.timeout(420)


@pytest.fixture
def group(group_of_one: Group) -> Group:
    return group_of_one


@contextlib.contextmanager
def configured(host: lab.Host, edit: str) -> Iterator[None]:
    """LVM's configuration is another one inside the block."""
    host.run(["sed", "-i.as-it-was", edit, LVM_CONF])
    try:
        yield
    finally:
        host.run(["mv", f"{LVM_CONF}.as-it-was", LVM_CONF])


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


def test_a_group_that_is_in_use_is_not_overwritten(group_of_both: Group, one: lab.Host) -> None:
    """Trap 56, whichever of its disks is named, and with no volume active."""
    locks, data, other = (one.luns[number].path for number in (LOCKS, DATA, OTHER))

    def overwrite(taken: str) -> None:
        groups.call(one, calls.MakeVolumeGroup("another", [taken], overwrite=[taken], host_id=one.number))

    for taken in (locks, data):
        with pytest.raises(contract.Refused, match=f"{taken} has volume group lunar, which this host uses"):
            overwrite(taken)
    group_of_both.call(one, calls.StopVolumeGroup)
    for taken in (locks, data):
        with pytest.raises(contract.Refused, match=f"{taken} has volume group lunar, which host2 uses"):
            overwrite(taken)
    one.luns[LOCKS].cut()
    with pytest.raises(contract.Refused, match="lunar may be in use: the disk with its locks is not there"):
        overwrite(data)
    one.luns[LOCKS].heal()
    with pytest.raises(contract.Refused, match=f"there is a volume group {group_of_both.name} on {locks}"):
        groups.call(one, calls.MakeVolumeGroup(group_of_both.name, [other], overwrite=[other], host_id=one.number))


@pytest.mark.torture
def test_a_group_whose_making_was_cut_off_is_made_anew(group: Group, one: lab.Host) -> None:
    """While LVM writes the leases of its locks; lvmlockd goes on with that for a while."""
    disk = one.luns[SPARE].path
    make = calls.MakeVolumeGroup("begun", [disk], overwrite=[disk], host_id=one.number)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        cut = pool.submit(groups.call, one, make)
        until(lambda: one.run(["test", "-e", "/dev/mapper/begun-lvmlock"], check=False).code == 0)
        one.run(["pkill", "-KILL", "-f", "vgcreate"])
        assert isinstance(cut.exception(60), contract.HelperError)

    def made() -> bool:
        with contextlib.suppress(contract.Refused):  # somebody still has it open: lvmlockd
            return bool(groups.call(one, make).started)
        return False

    until(made, 300)
    groups.call(one, calls.StopVolumeGroup("begun"))
    groups.wipe(one.luns[SPARE])


@pytest.mark.parametrize("path", ["/dev/mapper/control", "/dev/mapper/absent", "/dev/mapper/foreign"])
def test_disks_that_the_helper_was_not_given_are_refused(group: Group, one: lab.Host, path: str) -> None:
    create = "[ -e /dev/mapper/foreign ] || dmsetup create foreign --table '0 8192 zero'"
    one.sh(f"export DM_DISABLE_UDEV=1; {create}")
    with pytest.raises(contract.Refused, match="is not a disk"):
        group.call(one, calls.ExtendVolumeGroup, [path], [path])


def test_no_volume_is_removed_where_a_disk_of_the_group_is_missing(group: Group, one: lab.Host) -> None:
    """LVM would do it, and write that the disk is lost: then nobody can make or extend a volume."""
    group.create(one, "data")
    one.luns[DATA].cut()
    with pytest.raises(contract.Failed, match="does not see all disks of volume group lunar: 1 are missing"):
        group.remove(one, "data")
    one.luns[DATA].heal()
    group.create(one, "more")


def test_a_group_of_the_hosts_own_is_left_alone(group: Group, one: lab.Host) -> None:
    """Somebody names it instead of a repository's."""
    disk = one.luns[OTHER].path
    own = f"--config 'devices/use_devicesfile=0 global/use_lvmlockd=0' --devices {disk} --yes"
    make = f"lvm vgcreate {own} own {disk}; lvm lvcreate {own} --zero n --extents 1 --name backups own"
    groups.wipe(one.luns[OTHER])
    one.sh(f"export DM_DISABLE_UDEV=1; {make}", 60)
    try:
        with pytest.raises(contract.Refused, match="volume group own cannot be started: it is not a shared one"):
            groups.start(one, "own")
        assert groups.call(one, calls.StopVolumeGroup("own")) == calls.StoppedVolumeGroup([])
        assert one.run(["test", "-e", "/dev/mapper/own-backups"], check=False).code == 0
    finally:
        one.sh(f"export DM_DISABLE_UDEV=1; lvm vgremove {own} --force own", 60)


def test_a_disk_that_is_there_twice_is_refused(group: Group, one: lab.Host) -> None:
    """As a copy that an array has made: later LVM would see one of them alone."""
    group.call(one, calls.StopVolumeGroup)
    table = one.run(["dmsetup", "table", one.luns[DATA].name]).out
    one.run(["dmsetup", "create", "luntwin"], given=table, environment={"DM_DISABLE_UDEV": "1"})
    try:
        with pytest.raises(contract.Refused, match="disks are there twice"):
            groups.start(one, group.name)
    finally:
        one.run(["dmsetup", "remove", "luntwin"], environment={"DM_DISABLE_UDEV": "1"})


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
    two.start_helper()


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
