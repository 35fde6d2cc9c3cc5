"""What the kernel tells of its block devices and iSCSI sessions, in /sys. Reads no device.

Even so a file there may hang, when the driver of a dead disk holds what it needs. So this runs in a child, `serve`,
which names each disk before it looks at it: the agent then knows which one hung, and goes on without it.

    agent                            child
    {"root", "skip": [disk, ...]} -->
                                 <-- {"disk": name}, then {"facts": `Disk` as a dictionary} or {"reason"}, for each disk
                                 <-- {"sessions": [...]}
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdsm import channels

SECTOR_BYTES = 512  # the unit of sizes in /sys, whatever the sectors of the disk are
# What is never a place for a repository: pieces of memory, files in disguise, and what can be taken out.
_OTHERS = re.compile(r"(loop|ram|zram|sr|fd|nbd|md_d)\d")
# Layers on disks, by the beginnings of their names in the device mapper: pieces of them, and there may be thousands.
_LAYERS = re.compile(r"LVM-|CRYPT-|part\d+-|mpath-.*-part")
_SERIAL_HEADER_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Disk:
    """A whole disk. Sizes in bytes; a text is None where the kernel tells none.

    `transport` is iscsi, fc, multipath, mapped (another device of the device mapper), layer (a piece of other disks, of
    which nothing else is told) or other. `number` is the device number as major:minor. `holders` are the disks on top,
    `slaves` those below, `partitions` its own.
    """

    name: str
    number: str
    transport: str
    map_name: str | None  # of a mapped one
    map_uuid: str | None
    holders: list[str]
    slaves: list[str]
    size_bytes: int = 0
    logical_bytes: int = 0
    physical_bytes: int = 0
    discard_bytes: int = 0
    read_only: bool = False
    vendor: str | None = None
    product: str | None = None
    revision: str | None = None
    serial: str | None = None
    wwid: str | None = None
    state: str | None = None  # of a SCSI disk: running, blocked, offline, transport-offline, ...
    address: str | None = None  # of a SCSI disk: host:channel:target:lun
    session: int | None = None  # of an iSCSI disk
    partitions: dict[str, str] = dataclasses.field(default_factory=dict)  # name to device number

    @property
    def running(self) -> bool:
        """Whether the kernel sends it I/O; of what is no SCSI disk it is not known otherwise."""
        return self.state in (None, "running")


@dataclasses.dataclass(frozen=True)
class Session:
    """An iSCSI session. `state`: LOGGED_IN, FAILED (it is tried again) or FREE.

    `notice_s`: how long until a silent target is noticed (0: never); `replacement_s`: how long I/O waits then for the
    session to come back (negative: for ever).
    """

    number: int
    host: int
    target: str
    address: str
    port: int
    tag: int
    state: str
    notice_s: int
    replacement_s: int
    initiator: str | None

    @property
    def gives_up_s(self) -> int | None:
        """How long I/O over a lost connection waits at most; None: for ever."""
        return None if self.replacement_s < 0 or self.notice_s <= 0 else self.notice_s + self.replacement_s


def serve(argument: dict[str, Any], channel: channels.Channel) -> None:
    """A child's life: one scan."""
    root = Path(argument["root"])
    for name in disk_names(root):
        if name not in argument["skip"]:
            channel.send({"disk": name})
            try:
                channel.send({"facts": dataclasses.asdict(read_disk(root, name))})
            except (OSError, ValueError) as error:
                channel.send({"reason": str(error)})
    channel.send({"sessions": [dataclasses.asdict(session) for session in read_sessions(root)]})


def matters(name: str) -> bool:
    """Whether a device of that name may be, or lead to, a place for a repository."""
    return _OTHERS.match(name) is None


def disk_names(root: Path) -> list[str]:
    """Disks that may matter, by their names in /sys/block."""
    return sorted(path.name for path in (root / "block").iterdir() if matters(path.name))


def read_disk(root: Path, name: str) -> Disk:
    """Raises `OSError` and `ValueError`, when it is just going among others."""
    place = root / "block" / name
    layer = Disk(
        name=name,
        number=(place / "dev").read_text().strip(),
        transport="layer",
        map_name=_text(place / "dm" / "name"),
        map_uuid=_text(place / "dm" / "uuid"),
        holders=_names(place / "holders"),
        slaves=_names(place / "slaves"),
    )
    return layer if _LAYERS.match(layer.map_uuid or "") else _whole(place, layer)


def _whole(place: Path, known: Disk) -> Disk:
    device = place / "device"
    real = os.path.realpath(device)
    session = re.search(r"/session(\d+)/", real)
    return dataclasses.replace(
        known,
        transport=_transport(place, real, known.map_uuid),
        size_bytes=int((place / "size").read_text()) * SECTOR_BYTES,
        logical_bytes=int((place / "queue" / "logical_block_size").read_text()),
        physical_bytes=int((place / "queue" / "physical_block_size").read_text()),
        discard_bytes=int(_text(place / "queue" / "discard_max_bytes") or 0),
        read_only=_text(place / "ro") == "1",
        vendor=_text(device / "vendor") if (device / "scsi_device").exists() else None,  # a number elsewhere
        product=_text(device / "model"),
        revision=_text(device / "rev") or _text(device / "firmware_rev"),
        serial=_serial(place),
        wwid=_text(device / "wwid") or _text(place / "wwid"),
        state=_text(device / "state"),
        address=next((path.name for path in (device / "scsi_device").glob("*")), None),
        session=int(session[1]) if session else None,
        partitions=dict(_partitions(place)),
    )


def read_sessions(root: Path) -> list[Session]:
    """Sessions that are whole: one that is coming or going has not all of its files."""
    found = []
    for place in sorted((root / "class" / "iscsi_session").glob("session*")):
        with contextlib.suppress(FileNotFoundError, StopIteration, ValueError):
            found.append(_session(root, place))
    return found


def _session(root: Path, place: Path) -> Session:
    number = int(place.name.removeprefix("session"))
    connection = next((root / "class" / "iscsi_connection").glob(f"connection{number}:*"))
    host = re.search(r"/host(\d+)/", os.path.realpath(place))
    initiator = _text(place / "initiatorname")
    return Session(
        number=number,
        host=int(host[1]) if host else -1,
        target=(place / "targetname").read_text().strip(),
        address=(connection / "persistent_address").read_text().strip(),
        port=int((connection / "persistent_port").read_text()),
        tag=int((place / "tpgt").read_text()),
        state=(place / "state").read_text().strip(),
        notice_s=sum(int((connection / name).read_text()) for name in ("recv_tmo", "ping_tmo")),
        replacement_s=int((place / "recovery_tmo").read_text()),
        initiator=initiator if initiator != "(null)" else None,
    )


def _transport(place: Path, real: str, map_uuid: str | None) -> str:
    if (place / "dm").exists():
        return "multipath" if (map_uuid or "").startswith("mpath-") else "mapped"
    if "/session" in real:
        return "iscsi"
    return "fc" if "/rport-" in real else "other"


def _serial(place: Path) -> str | None:
    """A SCSI disk's page 0x80, or what drivers of other disks tell."""
    with contextlib.suppress(OSError):
        page = (place / "device" / "vpd_pg80").read_bytes()[_SERIAL_HEADER_BYTES:]
        return page.decode("ascii", "replace").strip("\0 ") or None
    told = _text(place / "device" / "serial") or _text(place / "serial")
    return told if told != "(null)" else None  # what some drivers print of nothing


def _partitions(place: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(place.glob("*/partition")):
        yield path.parent.name, (path.parent / "dev").read_text().strip()


def _names(place: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in place.iterdir())
    return []


def _text(path: Path) -> str | None:
    """None for what is not there, not told, or not told to this user."""
    with contextlib.suppress(OSError):
        return path.read_bytes().decode("utf-8", "replace").strip() or None
    return None
