"""Volume groups that several hosts share, and the logical volumes in them.

Their metadata is serialised by lvmlockd over sanlock, so any host may call any of these at any time. All sizes are in
bytes. A volume group must be started on this host before anything but `MakeVolumeGroup`, `StartVolumeGroup` and
`GetVolumeGroup` can be done with it; then calls that find it not started raise `Failed`.

A volume is activated shared: any number of hosts may have it active at once, and what excludes writers is the lease of
the image (trap 44). Its device is usable by the agent and by QEMU's group.
"""

import dataclasses
import re
from typing import Annotated

from supervdsm.contract import Call, Rule

_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,39}")
_VOLUME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_DEVICE = re.compile(r"/dev/(?:mapper|disk/by-id)/[A-Za-z0-9#+:=@_.-]{1,200}")
# LVM's own volume for the leases of a group's locks.
LOCK_VOLUME = "lvmlock"
MAX_HOSTS = 250

# sanlock holds "lvm_" and the name in 48 bytes.
GroupName = Annotated[
    str,
    Rule("1 to 40 letters, digits, - and _, the first one no -", lambda name: _GROUP.fullmatch(name) is not None),
]
VolumeName = Annotated[
    str,
    Rule(
        f"1 to 80 letters, digits, - . and _, the first one no - or ., and not {LOCK_VOLUME}",
        lambda name: _VOLUME.fullmatch(name) is not None and name != LOCK_VOLUME,
    ),
]
VolumePrefix = Annotated[
    str, Rule("nothing or the begin of a volume's name", lambda text: not text or _VOLUME.fullmatch(text) is not None)
]
# Names that stay when the host is booted or disks come in another order. Which of them: the helper's settings.
Device = Annotated[
    str,
    Rule(
        "a device by a stable name: /dev/mapper/NAME or /dev/disk/by-id/NAME",
        lambda path: _DEVICE.fullmatch(path) is not None and not path.endswith(("/.", "/..")),
    ),
]
HostId = Annotated[int, Rule(f"1 to {MAX_HOSTS}", lambda number: 1 <= number <= MAX_HOSTS)]
Bytes = Annotated[int, Rule("a positive number of bytes", lambda number: number > 0)]


@dataclasses.dataclass(frozen=True)
class LockManager:
    """What a shared volume group needs of this host.

    `host_id` and `kill_command` are LVM's configuration (local/host_id, global/lvmlockctl_kill_command), None where it
    has none. `groups` are the started ones with the host id by which sanlock knows this host in each. `global_locks`
    are those of them that had LVM's global lock when they were started or got it here; with two, two hosts may take one
    disk at once. `obstacles` say, one line each, why no group can be started safely: empty when all is well.
    """

    running: bool
    host_id: int | None
    kill_command: str | None
    groups: dict[str, int]
    global_locks: list[str]
    obstacles: list[str]


@dataclasses.dataclass(frozen=True)
class GetLockManager(Call[LockManager], deadline_s=15):
    """Ask lvmlockd, sanlock and LVM's configuration; touches no storage."""


@dataclasses.dataclass(frozen=True)
class VolumeGroup:
    """`lock_type` is "sanlock" for a shared one. `devices` are its physical volumes, by the names that lie at hand;
    `missing` counts those that this host does not see. `started`: this host takes part in its locking."""

    name: str
    uuid: str
    size_bytes: int
    free_bytes: int
    extent_bytes: int
    lock_type: str
    devices: list[str]
    missing: int
    started: bool


@dataclasses.dataclass(frozen=True)
class GetVolumeGroup(Call[VolumeGroup], deadline_s=30):
    """Read a volume group's facts; also one that is not started."""

    group: GroupName


@dataclasses.dataclass(frozen=True)
class MakeVolumeGroup(Call[VolumeGroup], deadline_s=300):
    """Make a shared volume group of whole devices, never activated by itself, and start it on this host. All leases for
    its locks are written then, 256 MiB or more, which takes a busy storage minutes.

    `Refused` when a device is not allowed by the helper's settings, holds anything and is not named in `overwrite`, is
    in use, or has a shared group that another host uses; and when a group of that name is on other devices. A crash
    leaves devices that hold something: name them in `overwrite` then.
    """

    group: GroupName
    devices: list[Device]
    overwrite: list[Device]
    host_id: HostId


@dataclasses.dataclass(frozen=True)
class StartVolumeGroup(Call[VolumeGroup], deadline_s=60):
    """Take part in a group's locking, then activate `volumes` shared. Nothing is done twice for one that is started.

    What an outage left of it on this host is cleared away first. Joining takes about 3 x io_timeout of lvmlockd, more
    after a crash; `DeadlinePassed` may be repeated. `Refused` when `GetLockManager` has obstacles, when `host_id` is
    not the one of LVM's configuration, and when the group is not a shared one.
    """

    group: GroupName
    host_id: HostId
    volumes: list[VolumeName]


@dataclasses.dataclass(frozen=True)
class StoppedVolumeGroup:
    """`in_use`: the volumes that somebody on this host has open; empty when the group was stopped."""

    in_use: list[str]


@dataclasses.dataclass(frozen=True)
class StopVolumeGroup(Call[StoppedVolumeGroup], deadline_s=60):
    """Deactivate all volumes of the group on this host and leave its locking; does nothing while one is in use.

    A group that is not started, or was lost in an outage, is cleared away.
    """

    group: GroupName


@dataclasses.dataclass(frozen=True)
class ExtendVolumeGroup(Call[VolumeGroup], deadline_s=60):
    """Add whole devices to a group. Those that it has already count as added; the rest is as in `MakeVolumeGroup`.

    Needs LVM's global lock, which lives in one of the shared groups. When no group that this host can see may have it,
    this group gets it. `Refused`, naming the groups that may have it, when they are only not started here.
    """

    group: GroupName
    devices: list[Device]
    overwrite: list[Device]


@dataclasses.dataclass(frozen=True)
class GlobalLock:
    """The group that has LVM's global lock now."""

    group: str


@dataclasses.dataclass(frozen=True)
class EnableGlobalLock(Call[GlobalLock], deadline_s=30):
    """Give LVM's global lock to this group. The caller answers for it that no other group of the hosts that share any
    device has it: with two, two hosts may take the same device at once. `Refused` while a started one has it, which
    is named."""

    group: GroupName


@dataclasses.dataclass(frozen=True)
class Volume:
    """A logical volume. `path` is its device, which is there while it is `active` on this host; `open` while somebody
    on this host has it open."""

    name: str
    path: str
    size_bytes: int
    active: bool
    open: bool


@dataclasses.dataclass(frozen=True)
class Volumes:
    """Volumes of a group, never LVM's own."""

    volumes: list[Volume]


@dataclasses.dataclass(frozen=True)
class VolumeDevice:
    """The device of a volume, which is there while it is active on this host, and its size."""

    path: str
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class ListVolumes(Call[Volumes], deadline_s=30):
    """List a group's volumes as its metadata has them now, and what is active of them on this host: those whose names
    begin with `prefix`, which may be empty."""

    group: GroupName
    prefix: VolumePrefix


@dataclasses.dataclass(frozen=True)
class CreateVolume(Call[VolumeDevice], deadline_s=60):
    """Make a linear volume of at least this size, which is active on this host as by `ActivateVolume`. It holds what
    lay there before.

    `Failed` when the group has no room, or the name exists.
    """

    group: GroupName
    volume: VolumeName
    size_bytes: Bytes


@dataclasses.dataclass(frozen=True)
class ActivateVolume(Call[VolumeDevice], deadline_s=60):
    """Activate a volume shared on this host, with its present size. Nothing is done twice."""

    group: GroupName
    volume: VolumeName


@dataclasses.dataclass(frozen=True)
class RefreshVolume(Call[VolumeDevice], deadline_s=60):
    """Give a volume that is active on this host the size that another host gave it (trap 46)."""

    group: GroupName
    volume: VolumeName


@dataclasses.dataclass(frozen=True)
class DeactivatedVolume:
    """`in_use`: somebody on this host has it open, and it stays active. That is no error."""

    in_use: bool


@dataclasses.dataclass(frozen=True)
class DeactivateVolume(Call[DeactivatedVolume], deadline_s=60):
    """Deactivate a volume on this host; one that is absent or not active is so already."""

    group: GroupName
    volume: VolumeName


@dataclasses.dataclass(frozen=True)
class ExtendVolume(Call[VolumeDevice], deadline_s=60):
    """Grow a volume to at least this size, in use or not; never shrinks. Only with the image's data lease: LVM lets
    two hosts do this. Other hosts see it after `RefreshVolume`. `Failed` when the group has no room."""

    group: GroupName
    volume: VolumeName
    size_bytes: Bytes


@dataclasses.dataclass(frozen=True)
class RemovedVolume:
    """`obstacle`: "" when it is gone, "in use" when somebody on this host has it open, "active elsewhere" when another
    host has it active; then it is whole."""

    obstacle: str


@dataclasses.dataclass(frozen=True)
class RemoveVolume(Call[RemovedVolume], deadline_s=60):
    """Remove a volume that no host uses, deactivating it here; an absent one is gone already."""

    group: GroupName
    volume: VolumeName
