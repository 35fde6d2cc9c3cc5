"""nfs-3.4: an export of an NFS server, mounted by the root helper; the same files as in localfs, for several hosts.

connectionParameters: {"connection": "SERVER:/EXPORT", "protocol_version": "3", "4.1" or "4.2"}; 4.2 unless said
otherwise, and no other version is tried. SERVER is a name or an address, an IPv6 one in brackets.

The exported directory belongs to the agent's user and to QEMU's group, mode 2770; root may be squashed, since nobody
who touches it is root: neither the agent's children, nor QEMU, nor sanlock.

When the server falls silent, what this host still has for it must have been given up before another host can have its
leases, or it arrives afterwards (trap 4). A program hears of it after seconds, but what is in the TCP connection stays
there until that breaks, and is delivered when the cable is back: `late_s`.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from supervdsm import calls, contract
from supervdsm import client as helper_client
from supervdsm.calls import mounts
from vdsm import config, errors, record, roothelper
from vdsm.storage import repository
from vdsm.storage.formats import filelayout

VERSION = "4.2"
# How long (seconds) unanswered bytes keep a connection of the kernel's RPC client. In version 3 always so long. In
# version 4 the server's lease time, but 18 at least (6.1; newer kernels: 3), in three steps (seen: 10 gives 18).
_TCP_V3_S, _TCP_V4_S, _TCP_STEPS = 180, 18, 3
# And until what waits behind a broken connection is given up: timeo x (retrans + 1) of the mount, and what programs
# take on a busy host.
_GIVE_UP_S, _SPARE_S = 4, 4
# sanlock renews every 2 x io_timeout, so that the connection is seen to be dead; another host may have the leases
# 8 x io_timeout + 60 s after the last renewal.
_RENEWAL, _TAKEOVER, _WATCHDOG_S = 2, 8, 60

# sanlock's answer for a file that it may not open: ENODEV, whatever the kernel said.
_CANNOT_OPEN = (19, -19)


class Mounted(NamedTuple):
    """A mount of NFS as the kernel shows it: `lease_s` is the server's, None in version 3."""

    path: str
    source: str
    options: frozenset[str]
    lease_s: int | None


class Nfs(filelayout.FileLayout):
    format = "nfs-3.4"
    abilities = repository.Abilities(shared=True, thin=True)

    def __init__(self, description: repository.Description) -> None:
        super().__init__(description)
        self._source = f"{description['server']}:{description['export']}"

    @classmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> repository.Description:
        """The format's own part of a description. Raises `InvalidParameters`. Touches nothing."""
        given = {"protocol_version": VERSION, **parameters}
        connection, version = given.get("connection"), given["protocol_version"]
        if given.keys() != {"connection", "protocol_version"} or not isinstance(connection, str):
            raise _bad("nfs takes a connection, SERVER:/EXPORT, and a protocol_version")
        server, separator, export = connection.partition(":/")
        try:
            calls.MountNfs(server, export := separator[1:] + export, version)
        except contract.Refused as error:
            raise _bad(error.reason) from error
        return {"place": f"{connection} {version}", "server": server, "export": export, "version": version}

    # -- its ground

    @classmethod
    def bring_up(
        cls, helper: helper_client.Helper, description: repository.Description, *, new: bool
    ) -> repository.Description:
        """Mounts the export. A mount whose export has been made anew is replaced: what was open there is lost anyway.

        Raises `ServerUnreachable`, `NoSuchExport`, `StorageDenied`, `StorageStale`.
        """
        export = {name: description[name] for name in ("server", "export", "version")}
        mount = roothelper.call(helper, calls.MountNfs(**export))
        if mount.outcome == mounts.STALE:
            roothelper.call(helper, calls.UnmountNfs(**export, lazy=True))
            mount = roothelper.call(helper, calls.MountNfs(**export))
        if mount.outcome not in (mounts.MOUNTED, mounts.WAS_MOUNTED):
            raise _failure(mount, description)
        return {**description, "place": mount.path}

    @classmethod
    def take_down(cls, helper: helper_client.Helper, description: repository.Description) -> None:
        export = {name: description[name] for name in ("server", "export", "version")}
        roothelper.call(helper, calls.UnmountNfs(**export, lazy=False))

    # -- the repository

    def format_(self, io_timeout_s: int) -> record.Record:
        """See `Repository.format_`. Raises `StorageDenied` too: sanlock is another user than the child."""
        self._check_mount(io_timeout_s)
        try:
            return super().format_(io_timeout_s)
        except PermissionError as error:
            raise errors.StorageDenied(place=self._source, reason=error.strerror) from error
        except errors.LeaseFailed as error:
            if error.facts["errno"] in _CANNOT_OPEN:
                reason = "sanlock, whose user is in QEMU's group, cannot open a file that the agent has made there"
                raise errors.StorageDenied(place=self._source, reason=reason) from error
            raise

    def header(self) -> record.Record:
        self._check_mount(None)
        try:
            found = super().header()
        except PermissionError as error:
            raise errors.StorageDenied(place=self._source, reason=error.strerror) from error
        self._check_mount(found["io_timeout_s"])
        return found

    def _check_mount(self, io_timeout_s: int | None) -> None:
        """Raises `UnsafeMount`; `NotARepository` when the export is not mounted."""
        known = nfs_mounts(Path("/proc/self/mountstats").read_text(errors="surrogateescape"))
        own = next((mount for mount in reversed(known) if mount.path == self.place), None)
        if own is None or own.source != self._source:
            raise errors.NotARepository(place=self._source, repo_format=self.format, reason="it is not mounted")
        hard = [mount.path for mount in known if mount.source == self._source and "hard" in mount.options]
        if hard:
            raise errors.UnsafeMount(place=self._source, reason=f"it is mounted hard at {hard[0]}")
        late_s = _late_s(own)
        if io_timeout_s is not None and late_s > takeover_s(io_timeout_s):
            enough = next(seconds for seconds in range(1, 1000) if late_s <= takeover_s(seconds))
            reason = (
                f"a write may arrive {late_s} s late, and with an io_timeout of {io_timeout_s} s another host may write"
                f" after {takeover_s(io_timeout_s)} s; with {enough} it could not"
            )
            raise errors.UnsafeMount(place=self._source, reason=reason)


def takeover_s(io_timeout_s: int) -> int:
    """From the first renewal that the server did not get to the moment at which another host may have the leases."""
    return (_TAKEOVER - _RENEWAL) * io_timeout_s + _WATCHDOG_S


def _late_s(mount: Mounted) -> int:
    """From the first byte that the server did not get until nothing of this host can arrive there any more."""
    if mount.lease_s is None:
        broken_s = _TCP_V3_S
    else:
        broken_s = max(_TCP_V4_S, _TCP_STEPS * math.ceil(mount.lease_s / _TCP_STEPS))
    return broken_s + _GIVE_UP_S + _SPARE_S


def nfs_mounts(mountstats: str) -> list[Mounted]:
    """What /proc/self/mountstats tells of NFS. Where names hold spaces it escapes them as mountinfo does."""
    found = []
    for block in re.split(r"^device ", mountstats, flags=re.MULTILINE)[1:]:
        head = re.match(r"(\S+) mounted on (\S+) with fstype nfs4? ", block)
        if head is None:
            continue
        options = re.search(r"^\topts:\t(\S+)", block, re.MULTILINE)
        lease = re.search(r"\blease_time=(\d+)", block)
        words = frozenset(options[1].split(",")) if options else frozenset()
        found.append(Mounted(_plain(head[2]), _plain(head[1]), words, int(lease[1]) if lease else None))
    return found


def _plain(text: str) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), os.fsencode(text)))


def _failure(mount: calls.NfsMount, description: repository.Description) -> errors.VdsmError:
    export = {name: description[name] for name in ("server", "export", "version")}
    if mount.outcome == mounts.UNREACHABLE:
        return errors.ServerUnreachable(**export, reason=mount.reason)
    if mount.outcome == mounts.STALE:
        return errors.StorageStale(repo_id=description["repo_id"], reason=mount.reason)
    if mount.outcome == mounts.DENIED:
        return errors.StorageDenied(place=f"{export['server']}:{export['export']}", reason=mount.reason)
    return errors.NoSuchExport(**export, reason=mount.reason)


def _bad(reason: str) -> errors.InvalidParameters:
    return errors.InvalidParameters(parameter="connectionParameters", reason=reason)
