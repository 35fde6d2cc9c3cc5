"""iSCSI targets, multipath maps and what is on block devices.

An iSCSI call that reached its end has an `Answer`: whether it worked is for the agent to tell by name, so it is no
error here. Passwords are in no log, no command line and no representation of a call.
"""

import dataclasses
import ipaddress
import re
from typing import Annotated

from supervdsm.contract import Call, Rule

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
_TARGET = re.compile(r"(?:iqn\.|eui\.|naa\.)[a-z0-9._:-]{1,219}")
_PRINTED = re.compile(r"[!-~]{1,255}")
_DISK = re.compile(r"[a-z][a-z0-9-]{0,30}")
_WWID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _is_text(text: str | None) -> bool:
    return text is None or _PRINTED.fullmatch(text) is not None


Address = Annotated[str, Rule("an IP address without a zone", _is_address)]
HostName = Annotated[
    str, Rule("an IP address or a host name", lambda text: _is_address(text) or _HOST.fullmatch(text) is not None)
]
Port = Annotated[int, Rule("1 to 65535", lambda port: 1 <= port <= 65535)]
GroupTag = Annotated[int, Rule("0 to 65535", lambda tag: 0 <= tag <= 65535)]
TargetName = Annotated[
    str, Rule("an iSCSI name in lower case: iqn., eui. or naa.", lambda text: _TARGET.fullmatch(text) is not None)
]
User = Annotated[str | None, Rule("1 to 255 printable ASCII characters without blanks", _is_text)]
Password = Annotated[str | None, Rule("1 to 255 printable ASCII characters without blanks", _is_text, secret=True)]
Seconds = Annotated[int, Rule("1 to 600", lambda seconds: 1 <= seconds <= 600)]
Number = Annotated[int, Rule("0 or more", lambda number: 0 <= number < 1 << 31)]
DiskName = Annotated[
    str, Rule("a disk's name in /sys/block", lambda text: _DISK.fullmatch(text) is not None and "--" not in text)
]
Wwid = Annotated[str, Rule("the WWID of a multipath map", lambda text: _WWID.fullmatch(text) is not None)]


# -- iSCSI -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """`outcome`: done; refused (user or password); unreachable; absent (no such session or target); failed. `reason`
    is one line, empty when done. `portals` are lines "address:port,tag name", of a discovery only."""

    outcome: str
    reason: str
    portals: list[str]


@dataclasses.dataclass(frozen=True)
class DiscoverTargets(Call[Answer], deadline_s=30):
    """Ask a portal which targets there are. What open-iscsi keeps of discoveries on this host stays as it is."""

    host: HostName
    port: Port
    user: User
    password: Password = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class LoginTarget(Call[Answer], deadline_s=45):
    """Log in to one portal of a target; done when its session exists. Times are seconds until a lost connection is
    noticed (interval + timeout) and what waits for it is given up (replacement). Never logged in by the system."""

    address: Address
    port: Port
    tag: GroupTag
    target: TargetName
    noop_interval_s: Seconds
    noop_timeout_s: Seconds
    replacement_timeout_s: Seconds
    user: User
    password: Password = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class LogoutTarget(Call[Answer], deadline_s=45):
    """Log out of one portal of a target, and forget what was kept for it. Its disks go: nobody may use them."""

    address: Address
    port: Port
    tag: GroupTag
    target: TargetName


@dataclasses.dataclass(frozen=True)
class Rescanned:
    """`devices` were asked for their size again."""

    devices: list[str]


@dataclasses.dataclass(frozen=True)
class RescanHost(Call[Rescanned], deadline_s=20):
    """Look for new disks behind a SCSI host (an iSCSI session, an HBA), and ask those that run for their size."""

    number: Number


# -- multipath -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MapPath:
    """A path of a map: its disk, how the kernel has it (active, failed), and the last check (ready, faulty, ...)."""

    disk: str
    kernel: str
    checker: str


@dataclasses.dataclass(frozen=True)
class Map:
    """A multipath map. `queueing`: what I/O does without paths, as multipathd words it: off (it fails), on, 12 chk, 30
    sec; - where nothing is configured."""

    wwid: str
    name: str
    disk: str
    queueing: str
    paths: list[MapPath]


@dataclasses.dataclass(frozen=True)
class Maps:
    """`reason` says why there is no answer of multipathd; None: there is one."""

    maps: list[Map]
    reason: str | None


@dataclasses.dataclass(frozen=True)
class GetMaps(Call[Maps], deadline_s=10):
    """Ask multipathd for its maps and their paths."""


@dataclasses.dataclass(frozen=True)
class MapChanged:
    """`wwid` is the map's."""

    wwid: str


@dataclasses.dataclass(frozen=True)
class ResizeMap(Call[MapChanged], deadline_s=20):
    """Let a map have the size that its paths have."""

    wwid: Wwid


@dataclasses.dataclass(frozen=True)
class RemoveMap(Call[MapChanged], deadline_s=20):
    """Remove a map that nobody uses, before its paths go. One in use, and an absent one, is `Failed`."""

    wwid: Wwid


# -- what is on a device ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Content:
    """What a device holds, None where it does not: a signature (a file system's name, LVM2_member, ...), a partition
    table, and of a physical volume of LVM its ids, its size and the tags of its group."""

    signature: str | None
    partitions: str | None
    pv_uuid: str | None
    pv_bytes: int | None
    vg_name: str | None
    vg_uuid: str | None
    vg_tags: list[str]


@dataclasses.dataclass(frozen=True)
class ReadContent(Call[Content], deadline_s=15):
    """Read what a disk holds. Hangs as long as the disk does, in a process of its own."""

    disk: DiskName
