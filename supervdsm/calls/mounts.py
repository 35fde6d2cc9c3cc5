"""Mounts of NFS exports."""

import dataclasses
import re
from typing import Annotated

from supervdsm.contract import Call, Rule, is_absolute_path

NFS_VERSIONS = ("3", "4.1", "4.2")
# What a mount came to. Only with the first two it is there and may be used.
MOUNTED, WAS_MOUNTED = "mounted", "was mounted"
STALE, UNREACHABLE, ABSENT, DENIED, OTHER_VERSION = "stale", "unreachable", "absent", "denied", "other version"
NFS_OUTCOMES = (MOUNTED, WAS_MOUNTED, STALE, UNREACHABLE, ABSENT, DENIED, OTHER_VERSION)

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:]{2,39}\]")


def is_nfs_server(text: str) -> bool:
    return bool(_NAME.fullmatch(text) or _IPV6.fullmatch(text))


def is_nfs_export(text: str) -> bool:
    return text == "/" or (is_absolute_path(text) and len(text.encode()) <= 1024)


NfsServer = Annotated[str, Rule("a host name, an IPv4 address, or an IPv6 address in brackets", is_nfs_server)]
NfsExport = Annotated[str, Rule("an absolute path without '.', '..' or empty names, up to 1024 bytes", is_nfs_export)]
NfsVersion = Annotated[str, Rule("3, 4.1 or 4.2", NFS_VERSIONS.__contains__)]
NfsOutcome = Annotated[str, Rule(", ".join(NFS_OUTCOMES), NFS_OUTCOMES.__contains__)]


@dataclasses.dataclass(frozen=True)
class NfsMount:
    """`path`: where the export is seen, if `outcome` says that it is; `reason`: what the system said if it is not."""

    path: str
    outcome: NfsOutcome
    reason: str


@dataclasses.dataclass(frozen=True)
class MountNfs(Call[NfsMount], deadline_s=50):
    """Mount an export under the configured directory, softly and with no names cached; fine if it is there already."""

    server: NfsServer
    export: NfsExport
    version: NfsVersion


@dataclasses.dataclass(frozen=True)
class NfsUnmount:
    """`was_mounted`: False when there was nothing to unmount."""

    was_mounted: bool


@dataclasses.dataclass(frozen=True)
class UnmountNfs(Call[NfsUnmount], deadline_s=50):
    """Unmount what MountNfs mounted, unless it is in use; lazy: whoever uses it, and what it waits for fails."""

    server: NfsServer
    export: NfsExport
    version: NfsVersion
    lazy: bool
