"""Logical volumes of started groups: made, activated, grown, removed. All run in a call's process.

LVM takes the locks: the group's for each command, and for as long as a volume is active one on the volume, which other
hosts may share. A call that is cut off leaves what the command did so far: metadata of LVM is either old or new.
"""

import contextlib
import os
import random
import re
import subprocess
import time
from pathlib import Path

from supervdsm import calls, contract, groups, killvg, lvm, settings
from supervdsm.calls import volumes as volume_calls

_ABSENT = "Failed to find logical volume"
_ELSEWHERE = "locked by other host"
_AS_LARGE = re.compile(r"(?:not larger than|matches) existing size")
SECTOR_BYTES = 512
LOCK_WAIT_S = 10.0
_DIRECTORY = Path("/dev")


def list_volumes(call: calls.ListVolumes, context: settings.Settings) -> calls.Volumes:
    fields = ["lv_name", "lv_size", "lv_active_locally", "lv_device_open"]
    begins = f'lv_name=~"^{call.prefix.replace(".", "[.]")}"'
    rows = groups.report(call.group, "lvs", fields, "--select", begins, call.group, context=context)
    return calls.Volumes([_from_row(call.group, row) for row in rows])


def create_volume(call: calls.CreateVolume, context: settings.Settings) -> calls.VolumeDevice:
    """Active at once: each command of LVM takes the group's lock anew. What lay on the disk there stays."""
    how = ["--type", "linear", "--activate", "sy", "--zero", "n", "--wipesignatures", "n", "--setautoactivation", "n"]
    size = ["--size", _size(call.size_bytes)]
    groups.change(call.group, "lvcreate", "--yes", *how, *size, "--name", call.volume, call.group, context=context)
    return _active(call.group, call.volume, context)


def activate_volume(call: calls.ActivateVolume, context: settings.Settings) -> calls.VolumeDevice:
    return activate(call.group, call.volume, context)


def activate(group: str, volume: str, context: settings.Settings) -> calls.VolumeDevice:
    """Shared, with its present size, for the agent and QEMU. Raises `Failed`."""
    was_active = _size_bytes(group, volume) is not None
    _take(group, volume, context)
    if was_active:  # then that changed nothing, and another host may have grown it
        groups.change(group, "lvchange", "--refresh", f"{group}/{volume}", context=context)
    return _active(group, volume, context)


def _take(group: str, volume: str, context: settings.Settings) -> None:
    """sanlock gives many hosts that take a lock shared at once one after the other, and refuses some meanwhile."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        done = groups.run(group, "lvchange", "--activate", "sy", f"{group}/{volume}", context=context)
        if done.code == 0:
            return
        if _ELSEWHERE not in done.err or time.monotonic() > deadline:
            raise contract.Failed(f"lvchange: {done.reason}")
        time.sleep(random.uniform(0.1, 0.5))


def refresh_volume(call: calls.RefreshVolume, context: settings.Settings) -> calls.VolumeDevice:
    groups.change(call.group, "lvchange", "--refresh", f"{call.group}/{call.volume}", context=context)
    return _active(call.group, call.volume, context)


def deactivate_volume(call: calls.DeactivateVolume, context: settings.Settings) -> calls.DeactivatedVolume:
    return calls.DeactivatedVolume(in_use=not _deactivate(call.group, call.volume, context))


def extend_volume(call: calls.ExtendVolume, context: settings.Settings) -> calls.VolumeDevice:
    """While it is active here LVM has its lock shared, and has to be told that this will do (trap 46)."""
    active = _size_bytes(call.group, call.volume) is not None
    shared = ["--lockopt", "shupdate"] if active else []
    name = f"{call.group}/{call.volume}"
    done = groups.run(call.group, "lvextend", *shared, "--size", _size(call.size_bytes), name, context=context)
    if done.code != 0 and not _AS_LARGE.search(done.err):
        raise contract.Failed(f"lvextend: {done.reason}")
    if not active:
        return _inactive(call.group, call.volume, context)
    if done.code != 0:  # another host has grown it
        groups.change(call.group, "lvchange", "--refresh", name, context=context)
    return _active(call.group, call.volume, context)


def remove_volume(call: calls.RemoveVolume, context: settings.Settings) -> calls.RemovedVolume:
    """LVM takes the volume's lock exclusively for this, which it gets when no other host has it active. One that is
    active here goes inactive first: found to be open, LVM would keep the lock exclusively.

    Of all changes this is the one that LVM does also where a disk of the group is not seen: it writes then that the
    disk is lost, and no host can make or extend a volume afterwards."""
    missing = groups.missing(call.group, context)
    if missing:
        raise contract.Failed(f"this host does not see all disks of volume group {call.group}: {missing} are missing")
    active = _size_bytes(call.group, call.volume) is not None
    if active and not _deactivate(call.group, call.volume, context):
        return calls.RemovedVolume("in use")
    done = groups.run(call.group, "lvremove", "--yes", f"{call.group}/{call.volume}", context=context)
    if done.code == 0 or _ABSENT in done.err:
        return calls.RemovedVolume("")
    if _ELSEWHERE in done.err:
        if not active:  # a call that was cut off may have left the lock here, too
            _deactivate(call.group, call.volume, context)
        return calls.RemovedVolume("active elsewhere")
    raise contract.Failed(f"lvremove: {done.reason}")


def in_use(group: str) -> list[str]:
    """The volumes of the group that somebody on this host has open, the one of the locks aside."""
    names = {killvg.device_name(group, volume_calls.LOCK_VOLUME)}
    opened = [name for name in killvg.devices(group) if name not in names and _open_count(name)]
    return sorted(killvg.volume_of(name) for name in opened)


def _deactivate(group: str, volume: str, context: settings.Settings) -> bool:
    """False when it is in use. LVM is asked also when there is no device: a call that was cut off may have left the
    volume's lock."""
    if _is_open(group, volume):
        return False
    done = groups.run(group, "lvchange", "--activate", "n", f"{group}/{volume}", context=context)
    if done.code == 0 or _ABSENT in done.err:
        return True
    if _is_open(group, volume):  # just now
        return False
    raise contract.Failed(f"lvchange: {done.reason}")


def _active(group: str, volume: str, context: settings.Settings) -> calls.VolumeDevice:
    """What has just been activated or reloaded. udev knows whose it is by a rule of ours; without udev, and until it
    has read that rule, it is said here."""
    size_bytes = _size_bytes(group, volume)
    if size_bytes is None:
        raise contract.Failed(f"volume {group}/{volume} is not active on this host")
    path = _path(group, volume)
    os.chown(path, context.uid, context.storage_gid)
    path.chmod(0o660)
    return calls.VolumeDevice(str(path), size_bytes)


def _inactive(group: str, volume: str, context: settings.Settings) -> calls.VolumeDevice:
    (row,) = groups.report(group, "lvs", ["lv_size"], f"{group}/{volume}", context=context)
    return calls.VolumeDevice(str(_path(group, volume)), int(row["lv_size"]))


def _from_row(group: str, row: dict[str, str]) -> calls.Volume:
    name, active = row["lv_name"], row["lv_active_locally"] == "1"
    is_open = active and row["lv_device_open"] == "1"
    return calls.Volume(name, str(_path(group, name)), int(row["lv_size"]), active=active, open=is_open)


def _path(group: str, volume: str) -> Path:
    return _DIRECTORY / group / volume


def _size(size_bytes: int) -> str:
    """LVM takes whole sectors, and makes whole extents of them."""
    return f"{-(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES}b"


def _is_open(group: str, volume: str) -> bool:
    name = killvg.device_name(group, volume)
    return name in killvg.devices(group) and _open_count(name) > 0


def _size_bytes(group: str, volume: str) -> int | None:
    """As the kernel has it; None when it is not active on this host."""
    place = killvg.devices(group).get(killvg.device_name(group, volume))
    if place is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        return int((place / "size").read_text()) * SECTOR_BYTES
    return None


def _open_count(name: str) -> int:
    """0 when it has just gone."""
    command = [killvg.DMSETUP, "info", "--columns", "--noheadings", "-o", "open", name]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=lvm.environment())
    return int(asked.stdout) if asked.returncode == 0 else 0
