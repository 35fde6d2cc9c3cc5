"""The closed list of what the root helper does for the agent, by topic. `contract` says what a call is.

Standard library only: the agent and the root helper both load this.
"""

from supervdsm.calls.directories import PreparedDirectory, PrepareDirectory
from supervdsm.calls.hardware import GetHardwareInfo, HardwareInfo
from supervdsm.calls.mounts import MountNfs, NfsMount, NfsUnmount, UnmountNfs

__all__ = [
    "GetHardwareInfo",
    "HardwareInfo",
    "MountNfs",
    "NfsMount",
    "NfsUnmount",
    "PrepareDirectory",
    "PreparedDirectory",
    "UnmountNfs",
]
