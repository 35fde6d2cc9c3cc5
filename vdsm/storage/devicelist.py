"""What is told of this host's disks, put together from what the kernel, udev, multipathd and the disks say. Pure."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from supervdsm import calls
from supervdsm.calls import targets
from vdsm.storage import scans, sysblock

Answer = dict[str, Any]

FREE, USED, UNKNOWN = "free", "used", "unknown"
# What waits for lost storage must have failed before sanlock gives this host's leases away: 6 x io_timeout (trap 55),
# here of the io_timeout that repositories have unless asked otherwise. In seconds.
LIMIT_S = 60
# How often multipathd checks paths unless it is configured otherwise; it counts what it waits in these. In seconds.
CHECK_S = 5
_TYPES = {"iscsi": "iSCSI", "fc": "FCP"}
# multipath's number before the id of a SCSI disk.
_KINDS = {"naa.": "3", "eui.": "2"}
_USABLE = ("ready", "ghost", "shaky", "delayed")


@dataclasses.dataclass(frozen=True)
class Ground:
    """All that is known. `links`: names under /dev, by disk. `mounted`: mount points, by device number. `contents`:
    what each disk holds, or why that is not known."""

    scan: scans.Scan
    maps: calls.Maps
    links: Mapping[str, list[str]]
    mounted: Mapping[str, str]
    contents: Mapping[str, calls.Content | str]


def candidates(scan: scans.Scan) -> list[sysblock.Disk]:
    """Disks that can carry a repository: multipath maps, and whole disks that are no path of one."""
    maps = {disk.name for disk in scan.disks.values() if disk.transport == "multipath"}
    return [
        disk
        for disk in scan.disks.values()
        if disk.transport != "layer" and not maps & set(disk.holders) and disk.size_bytes > 0
    ]


def guid(disk: sysblock.Disk) -> str | None:
    """What names the disk on every host and after every boot; None when nothing does."""
    if disk.transport == "multipath":
        return (disk.map_uuid or "").removeprefix("mpath-")
    if disk.transport == "mapped":
        return disk.map_name
    for kind, number in _KINDS.items():
        if disk.wwid is not None and disk.wwid.startswith(kind) and disk.address is not None:
            return number + disk.wwid.removeprefix(kind)
    return disk.wwid


def name(disk: sysblock.Disk) -> str:
    """What the disk is called on the wire: its `guid`, or for want of one what the kernel calls it now."""
    return guid(disk) or disk.name


def silent(disk: str) -> sysblock.Disk:
    """A disk of which the kernel tells nothing but its name."""
    return sysblock.Disk(name=disk, number="", transport="other", map_name=None, map_uuid=None, holders=[], slaves=[])


def paths(disk: sysblock.Disk, ground: Ground) -> dict[str, bool]:
    """Whether each path of a disk carries I/O, by the path's own disk. A disk that is no map is its own path."""
    if disk.transport != "multipath":
        return {disk.name: disk.running}
    known = {path.disk: path for found in ground.maps.maps if found.disk == disk.name for path in found.paths}
    return {name: _usable(known.get(name), ground.scan.disks.get(name)) for name in sorted({*disk.slaves, *known})}


def _usable(path: targets.MapPath | None, disk: sysblock.Disk | None) -> bool:
    if disk is None or not disk.running:
        return False
    return path is None or (path.kernel == "active" and path.checker in _USABLE)


def is_covered(disk: sysblock.Disk, ground: Ground) -> bool:
    """Whether it is mounted, or another whole disk lies on it: what it holds is that one's then."""
    on_top = [ground.scan.disks[name] for name in disk.holders if name in ground.scan.disks]
    return disk.number in ground.mounted or any(holder.transport != "layer" for holder in on_top)


def uses(disk: sysblock.Disk, ground: Ground) -> list[str]:
    """Who has the disk or a piece of it now, as far as the kernel tells without reading it."""
    numbers = {disk.name: disk.number, **disk.partitions}
    found = [f"mounted at {ground.mounted[number]}" for number in numbers.values() if number in ground.mounted]
    for name in disk.holders:
        holder = ground.scan.disks.get(name)
        found.append(f"below {(holder and holder.map_name) or name}")
        if holder is not None:
            found += [use for use in uses(holder, ground) if use.startswith("mounted")]
    return found


def describe(disk: sysblock.Disk, ground: Ground) -> Answer:
    """One device as the verb tells it, in snake_case."""
    below = paths(disk, ground)
    ours = _path_disks(below, ground)
    sessions = [session for session in ground.scan.sessions if session.number in {path.session for path in ours}]
    first = ours[0] if ours else disk
    return {
        "guid": name(disk),
        "stable": guid(disk) is not None,
        "name": disk.name,
        "path": _path(disk, ground),
        "links": sorted(ground.links.get(disk.name, [])),
        "devtype": kind(disk, ground),
        "capacity": disk.size_bytes,
        "logicalblocksize": disk.logical_bytes,
        "physicalblocksize": disk.physical_bytes,
        "discard_max_bytes": disk.discard_bytes,
        "read_only": disk.read_only,
        "vendor": first.vendor or "",
        "product": first.product or "",
        "revision": first.revision or "",
        "serial": first.serial or "",
        "partitioned": bool(disk.partitions),
        "pathstatus": [_path_status(path, below, ground) for path in below],
        "pathlist": [{**dataclasses.asdict(one), "gives_up_s": one.gives_up_s} for one in sessions],
        "queueing": next((found.queueing for found in ground.maps.maps if found.disk == disk.name), None),
        "problems": list(_problems(disk, sessions, below, ground)),
        **_content(disk, ground),
    }


def _path(disk: sysblock.Disk, ground: Ground) -> str:
    """A name that stays, where there is one."""
    if disk.map_name is not None:
        return f"/dev/mapper/{disk.map_name}"
    by_id = sorted(link for link in ground.links.get(disk.name, []) if link.startswith("/dev/disk/by-id/"))
    return by_id[0] if by_id else f"/dev/{disk.name}"


def kind(disk: sysblock.Disk, ground: Ground) -> str:
    """How the host reaches it: iSCSI, FCP, MIXED or other."""
    return _kind(_path_disks(paths(disk, ground), ground))


def _path_disks(names: Iterable[str], ground: Ground) -> list[sysblock.Disk]:
    return [ground.scan.disks[name] for name in names if name in ground.scan.disks]


def _kind(paths: list[sysblock.Disk]) -> str:
    kinds = {_TYPES.get(path.transport, "other") for path in paths}
    return kinds.pop() if len(kinds) == 1 else "MIXED" if kinds else "other"


def _path_status(name: str, below: Mapping[str, bool], ground: Ground) -> Answer:
    disk = ground.scan.disks.get(name)
    address = disk.address if disk is not None else None
    return {
        "physdev": name,
        "type": _kind([disk] if disk is not None else []),
        "state": "active" if below[name] else "failed",
        "capacity": disk.size_bytes if disk is not None else 0,
        "lun": address.rpartition(":")[2] if address else "",
    }


def _content(disk: sysblock.Disk, ground: Ground) -> Answer:
    """Whether it is free. What the kernel tells decides first; a disk is free only when it was read and is empty."""
    used_by, content = uses(disk, ground), ground.contents.get(disk.name, "it was not read")
    told: Answer = {"pv_uuid": "", "pv_size": None, "vg_uuid": "", "vg_name": "", "vg_tags": []}
    if disk.partitions:
        used_by.append("split into partitions")
    if isinstance(content, str):
        return {**told, "status": USED if used_by else UNKNOWN, "used_by": used_by, "reason": content}
    if content.signature == "LVM2_member":
        used_by.append(f"physical volume of {content.vg_name}" if content.vg_name else "physical volume of no group")
    elif content.signature is not None:
        used_by.append(f"holds {content.signature}")
    if content.partitions is not None and not disk.partitions:
        used_by.append(f"has a partition table ({content.partitions})")
    told["pv_uuid"], told["pv_size"] = content.pv_uuid or "", content.pv_bytes
    told |= {"vg_uuid": content.vg_uuid or "", "vg_name": content.vg_name or "", "vg_tags": content.vg_tags}
    return {**told, "status": USED if used_by else FREE, "used_by": used_by, "reason": None}


def _problems(
    disk: sysblock.Disk, sessions: list[sysblock.Session], below: Mapping[str, bool], ground: Ground
) -> Iterator[str]:
    """What is not as a shared repository needs it."""
    failed = [name for name, usable in below.items() if not usable]
    if failed:
        yield f"{len(failed)} of {len(below)} paths do not carry I/O: {', '.join(failed)}"
    for found in ground.maps.maps:
        if found.disk == disk.name and (waits_s := queueing_s(found)) is not None and waits_s >= LIMIT_S:
            how = "for ever" if waits_s == float("inf") else f"for about {waits_s:g} s"
            yield f"without paths its I/O waits {how} (no_path_retry): it must fail within {LIMIT_S} s"
    if disk.transport == "multipath" and ground.maps.reason is not None:
        yield f"its paths are not checked: {ground.maps.reason}"
    for session in sessions:
        if session.gives_up_s is None:
            yield f"a lost connection to {session.address} is never given up"
        elif session.gives_up_s >= LIMIT_S:
            yield f"a lost connection to {session.address} is given up after {session.gives_up_s} s, not in {LIMIT_S} s"


def queueing_s(found: targets.Map) -> float | None:
    """How long I/O waits without paths, as multipathd words it: "off", "on", "12 chk", "30 sec"; None when it does
    not, or nothing is set."""
    number, _, unit = found.queueing.partition(" ")
    if number.isdigit():
        return float(number) * (CHECK_S if unit == "chk" else 1)
    return float("inf") if found.queueing == "on" else None
