"""The closed list of what the root helper does for the agent, by topic. `contract` says what a call is.

Standard library only: the agent and the root helper both load this.
"""

from supervdsm.calls.directories import PreparedDirectory, PrepareDirectory
from supervdsm.calls.hardware import GetHardwareInfo, HardwareInfo
from supervdsm.calls.mounts import MountNfs, NfsMount, NfsUnmount, UnmountNfs
from supervdsm.calls.targets import (
    Answer,
    Content,
    DiscoverTargets,
    GetMaps,
    LoginTarget,
    LogoutTarget,
    MapChanged,
    Maps,
    ReadContent,
    RemoveMap,
    RescanHost,
    Rescanned,
    ResizeMap,
)

__all__ = [
    "Answer",
    "Content",
    "DiscoverTargets",
    "GetHardwareInfo",
    "GetMaps",
    "HardwareInfo",
    "LoginTarget",
    "LogoutTarget",
    "MapChanged",
    "Maps",
    "MountNfs",
    "NfsMount",
    "NfsUnmount",
    "PrepareDirectory",
    "PreparedDirectory",
    "ReadContent",
    "RemoveMap",
    "RescanHost",
    "Rescanned",
    "ResizeMap",
    "UnmountNfs",
]
