"""Shared volume groups: made, started on this host, extended, stopped. All run in a call's process.

    make     devices checked > vgcreate, which starts it too
    start    leftovers of an outage cleared away > devices found > locking joined > volumes activated
    stop     nothing in use > volumes deactivated > locking left > forgotten

Each can be repeated; a call that was cut off leaves a state that the same call goes on from.
"""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from supervdsm import blockdevices, calls, contract, groups, killvg, lockmanager, lvm, settings, volumes
from supervdsm.calls import volumes as volume_calls

SANLOCK = "sanlock"
# Without udev the first start on a host fails, for a device node that is only just being made (trap 48); and after an
# outage lvmlockd may still be leaving. So often it is tried, so long (seconds) between.
START_TRIES, START_PAUSE_S = 5, 0.5
# sanlock renews a host id every 2 io_timeouts; so many of them are enough to see that.
_RENEWALS = 2.2
# LVM's text on each disk: what is there and what comes next, so half of it for either. A volume takes some 500 bytes,
# and 150 for each piece that it grew by; LVM's own size, 1 MiB, ends at about 1000 volumes. It is never made larger.
_METADATA = ("--metadatasize", "32764k")
_FIELDS = (
    "vg_name",
    "vg_uuid",
    "vg_size",
    "vg_free",
    "vg_extent_size",
    "vg_lock_type",
    "vg_missing_pv_count",
    "pv_name",
)


def make_volume_group(call: calls.MakeVolumeGroup, context: settings.Settings) -> calls.VolumeGroup:
    """Never activated by anybody but a call of ours: at boot it would be exclusive (trap 50)."""
    _check_host(call.host_id)
    with groups.held(call.group):
        _free_name(call.group, call.overwrite, context)
        _prepare(call.devices, call.overwrite, context)
        how = ["--shared", "--lock-type", SANLOCK, "--setautoactivation", "n", *_METADATA]
        lvm.change("vgcreate", "--yes", *how, call.group, *call.devices, devices=call.devices)
        groups.remember(call.group, call.devices, context)
        _check_joined(call.group, call.host_id)
        return _read(call.group, context)


def get_volume_group(call: calls.GetVolumeGroup, context: settings.Settings) -> calls.VolumeGroup:
    if lockmanager.joined(call.group) is not None and groups.is_remembered(call.group):
        return _read(call.group, context)
    return _read_unlocked(call.group, context)


def start_volume_group(call: calls.StartVolumeGroup, context: settings.Settings) -> calls.VolumeGroup:
    _check_host(call.host_id)
    with groups.held(call.group):
        if not (groups.is_remembered(call.group) and lockmanager.joined(call.group) == call.host_id):
            devices = groups.find(call.group, context)
            if lockmanager.joined(call.group) is None and not lockmanager.is_joining(call.group):
                if not _is_shared(call.group, devices):
                    raise contract.Refused(f"volume group {call.group} cannot be started: it is not a shared one")
                _clear_away(call.group)
            groups.remember(call.group, devices, context)
            try:
                _join(call.group, call.host_id, context)
            except contract.HelperError:
                groups.forget(call.group)
                raise
        for volume in call.volumes:
            volumes.activate(call.group, volume, context)
        return _read(call.group, context)


def stop_volume_group(call: calls.StopVolumeGroup, context: settings.Settings) -> calls.StoppedVolumeGroup:
    with groups.held(call.group):
        in_use = volumes.in_use(call.group)
        if in_use:
            return calls.StoppedVolumeGroup(in_use)
        if lockmanager.joined(call.group) is not None:
            if not groups.is_remembered(call.group):
                groups.remember(call.group, groups.find(call.group, context), context)
            groups.change(call.group, "vgchange", "--activate", "n", call.group, context=context)
            groups.change(call.group, "vgchange", "--lock-stop", call.group, context=context)
        if groups.is_remembered(call.group):
            _clear_away(call.group)
            groups.forget(call.group)
        return calls.StoppedVolumeGroup([])


def extend_volume_group(call: calls.ExtendVolumeGroup, context: settings.Settings) -> calls.VolumeGroup:
    """LVM wants the global lock to take a disk, so that no two hosts take one at once (trap 49)."""
    with groups.held(call.group):
        had = blockdevices.by_number(_read(call.group, context).devices)
        new = [path for number, path in blockdevices.by_number(call.devices).items() if number not in had]
        blockdevices.check(call.devices, context)
        if new:
            _ensure_global_lock(call.group, context)
            _prepare(new, call.overwrite, context)
            groups.remember(call.group, [*had.values(), *new], context)
            groups.change(call.group, "vgextend", "--yes", *_METADATA, call.group, *new, context=context)
        return _read(call.group, context)


def enable_global_lock(call: calls.EnableGlobalLock, context: settings.Settings) -> calls.GlobalLock:
    groups.devices(call.group)
    owner = _global_lock(call.group, context)
    if owner is not None:
        raise contract.Refused(f"volume group {owner} has the global lock")
    lockmanager.enable_global_lock(call.group)
    return calls.GlobalLock(call.group)


# -- the host ----------------------------------------------------------------------------------------------------------


def _check_host(host_id: int) -> None:
    """Raises `Refused` when a group must not be started here. One id for all: the holder of a lock is named by it, in
    our records as in lvmlockd's (trap 52)."""
    found = lockmanager.state()
    if found.obstacles:
        raise contract.Refused("; ".join(found.obstacles))
    if found.host_id != host_id:
        raise contract.Refused(f"local/host_id of lvmlocal.conf is {found.host_id}, and the agent's host id {host_id}")


def _check_joined(group: str, host_id: int) -> None:
    joined = lockmanager.joined(group)
    if joined != host_id:
        raise contract.Failed(f"volume group {group} was joined with host id {joined}, not {host_id}")


def _join(group: str, host_id: int, context: settings.Settings) -> None:
    _check_id_is_free(group, host_id, context)
    reason = ""
    for _ in range(START_TRIES):
        reason = groups.run(group, "vgchange", "--lock-start", group, context=context).reason
        if lockmanager.joined(group) is not None:
            _check_joined(group, host_id)
            return
        time.sleep(START_PAUSE_S)
    raise contract.Failed(f"volume group {group} is not started: {reason}")


def _check_id_is_free(group: str, host_id: int, context: settings.Settings) -> None:
    """Raises `Refused`, naming it, when another host has our id and lives: it renews the id while this one looks.

    sanlock would find out too, after 14 io_timeouts, and could not tell who it is.
    """
    places = _lock_places(groups.devices(group))
    if not places:
        shared = _read_unlocked(group, context).lock_type == SANLOCK
        trouble = "the disk with its locks is not there" if shared else "it is not a shared one"
        raise contract.Refused(f"volume group {group} cannot be started: {trouble}")
    _, path, offset = places[0]
    found = lockmanager.holder(group, host_id, path, offset)
    if found is None or found.timestamp == 0 or found.name == lockmanager.own_name():
        return
    deadline = time.monotonic() + _RENEWALS * found.io_timeout_s
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if lockmanager.holder(group, host_id, path, offset) != found:
            raise contract.Refused(f"host id {host_id} is {found.name}'s, which uses it in volume group {group} now")


class _LockPlace(NamedTuple):
    """Where the locks of a group are on a disk: this can be read while nobody has the group started."""

    group: str
    path: str
    offset: int


def _lock_places(devices: Sequence[str]) -> list[_LockPlace]:
    """Those that are there. The volume with the locks is made in one piece; what it grows by later lies behind."""
    fields = ["vg_name", "pv_name", "pe_start", "pvseg_start", "vg_extent_size", "lv_name", "seg_start_pe"]
    return [
        _LockPlace(
            row["vg_name"],
            row["pv_name"],
            int(row["pe_start"]) + int(row["pvseg_start"]) * int(row["vg_extent_size"]),
        )
        for row in lvm.report("pvs", fields, "--nolocking", "--segments", "--all", devices=devices)
        if row["lv_name"].strip("[]") == volume_calls.LOCK_VOLUME
        and row["seg_start_pe"] == "0"
        and blockdevices.by_number([row["pv_name"]])
    ]


def _check_nobody_lives_there(paths: Sequence[str], context: settings.Settings) -> None:
    """Raises `Refused`, naming them, when hosts use a group that has one of these disks: overwriting is for what is
    left behind (trap 56). Such a disk is not busy while no volume on it is active here."""
    for group, disks in _shared_groups(paths, context).items():
        users = _users(group, context)
        if users:
            raise contract.Refused(f"{', '.join(disks)} has volume group {group}, which {users} uses")


def _users(group: str, context: settings.Settings) -> str:
    """The hosts that use a shared group now; empty when nobody does. Takes as long as sanlock needs to renew, unless
    this host is one. Raises `Refused` when nobody can tell."""
    if lockmanager.is_known(group):
        return "this host"
    places = _lock_places(groups.find(group, context))
    if not places and _read_unlocked(group, context).missing:
        raise contract.Refused(f"volume group {group} may be in use: the disk with its locks is not there")
    for place in places:
        before = lockmanager.host_ids(place.path, place.offset)
        holders = [lockmanager.holder(group, host_id, place.path, place.offset) for host_id in before]
        deadline = time.monotonic() + max((_RENEWALS * found.io_timeout_s for found in holders if found), default=0.0)
        while time.monotonic() < deadline:
            time.sleep(0.2)
            now = lockmanager.host_ids(place.path, place.offset)
            living = {name for host_id, (name, renewed) in now.items() if before.get(host_id) != (name, renewed)}
            if living:
                return ", ".join(sorted(living))
    return ""


def _shared_groups(paths: Sequence[str], context: settings.Settings) -> dict[str, list[str]]:
    """The shared groups that these disks belong to, and which of the disks to each."""
    if not paths:
        return {}
    wanted = blockdevices.by_number(paths)
    fields = ["pv_name", "vg_name", "vg_lock_type"]
    found: dict[str, list[str]] = {}
    for row in lvm.report("pvs", fields, "--nolocking", devices=blockdevices.allowed(context)):
        for number in blockdevices.by_number([row["pv_name"]]):
            if number in wanted and row["vg_lock_type"] == SANLOCK:
                found.setdefault(row["vg_name"], []).append(wanted[number])
    return found


def _is_shared(group: str, devices: Sequence[str]) -> bool:
    """No: it is a group of the host's own, and its volumes are nothing that an outage or a call has left."""
    (row,) = lvm.report("vgs", ["vg_lock_type"], "--nolocking", group, devices=devices)
    return row["vg_lock_type"] == SANLOCK


def _clear_away(group: str) -> None:
    """What an outage has left: devices that have the error target or at least no lock, without whose removal no start
    succeeds, and lvmlockd's memory of the group.

    Raises `Refused` when somebody still has one open: he must find out before the name means data again.
    """
    left = killvg.devices(group)
    for name in left:
        volume = killvg.volume_of(name)
        command = [killvg.DMSETUP, "remove", name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=lvm.environment())
        if done.returncode != 0 and name in killvg.devices(group):
            raise contract.Refused(f"volume {group}/{volume} has lost its lock, and a process still has it open")
        Path(f"/dev/{group}/{volume}").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or has more
        Path(f"/dev/{group}").rmdir()
    if left and lockmanager.is_known(group):
        lockmanager.drop(group)


# -- devices -----------------------------------------------------------------------------------------------------------


def _prepare(devices: list[str], overwrite: list[str], context: settings.Settings) -> None:
    """Raises `Refused`; then nothing has been wiped."""
    if not devices:
        raise contract.Refused("no devices")
    blockdevices.check(devices, context)
    wiped = [path for path in devices if path in overwrite]
    blockdevices.check_empty([path for path in devices if path not in overwrite])
    _check_nobody_lives_there(wiped, context)
    blockdevices.wipe(wiped)


def _free_name(group: str, overwrite: list[str], context: settings.Settings) -> None:
    """sanlock and the devices of all hosts know a group by its name. One that is overwritten is none; what a call that
    was cut off while it made it has left active here would keep its disks busy."""
    try:
        devices = groups.find(group, context)
    except contract.Failed:
        return
    if not set(devices) <= set(overwrite):
        raise contract.Refused(f"there is a volume group {group} on {', '.join(devices)}")
    locks = {killvg.device_name(group, volume_calls.LOCK_VOLUME)}  # made first, in a group that is not yet a shared one
    if not groups.is_remembered(group) and killvg.devices(group).keys() <= locks:
        if lockmanager.joined(group) is not None:
            lvm.change("vgchange", "--lock-stop", group, devices=devices)
        _clear_away(group)


def _global_lock(group: str, context: settings.Settings) -> str | None:
    """The started group that has the global lock. `pvs` asks for that lock, without which nobody knows who has it."""
    groups.run(group, "pvs", context=context)
    return lockmanager.global_lock()


def _ensure_global_lock(group: str, context: settings.Settings) -> None:
    """Gives this group the global lock when nobody can have it any more (trap 49)."""
    several = lockmanager.global_locks()
    if len(several) > 1:
        raise contract.Refused(
            f"{' and '.join(several)} both have LVM's global lock: take it from one (lvmlockctl --gl-disable VG)"
        )
    if _global_lock(group, context) is not None:
        return
    rows = lvm.report("vgs", ["vg_name", "vg_lock_type"], "--nolocking", devices=blockdevices.allowed(context))
    others = sorted({row["vg_name"] for row in rows if row["vg_lock_type"] == SANLOCK} - {group})
    if others:
        raise contract.Refused(
            f"no started volume group has LVM's global lock; {', '.join(others)} may have it: start it, or enable the "
            f"lock in {group}"
        )
    lockmanager.enable_global_lock(group)


# -- facts -------------------------------------------------------------------------------------------------------------


def _read(group: str, context: settings.Settings) -> calls.VolumeGroup:
    return _group(groups.report(group, "vgs", _FIELDS, group, context=context), groups.devices(group), started=True)


def _read_unlocked(group: str, context: settings.Settings) -> calls.VolumeGroup:
    devices = groups.find(group, context)
    return _group(lvm.report("vgs", _FIELDS, "--nolocking", group, devices=devices), devices, started=False)


def _group(rows: list[dict[str, str]], devices: list[str], *, started: bool) -> calls.VolumeGroup:
    names = blockdevices.by_number(devices)
    seen = [names[number] for number in blockdevices.by_number([row["pv_name"] for row in rows]) if number in names]
    facts = rows[0]
    return calls.VolumeGroup(
        name=facts["vg_name"],
        uuid=facts["vg_uuid"],
        size_bytes=int(facts["vg_size"]),
        free_bytes=int(facts["vg_free"]),
        extent_bytes=int(facts["vg_extent_size"]),
        lock_type=facts["vg_lock_type"],
        devices=seen,
        missing=int(facts["vg_missing_pv_count"]),
        started=started,
    )
