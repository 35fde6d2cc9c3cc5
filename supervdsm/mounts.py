"""NFS exports, mounted for the agent under one directory of root's, with options that suit leases.

Where an export is follows from server, export and version alone, so a call can be repeated and what it finds is its
own: DIRECTORY/SERVER_EXPORT-VERSION-HASH. A lock file beside it keeps two calls for one export apart; those for others
go on whatever happens to it. Every call runs in a process of its own with a deadline: a server that is frozen holds
nobody else.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from supervdsm import calls, contract, settings
from supervdsm.calls import mounts as words

# soft, timeo, retrans: what the server does not answer is given up and not sent again when it is back: a dead writer's
# write must not arrive after its lease has passed on (trap 4). timeo is in tenths of a second; it is sent twice.
# nosharecache: nobody else's mount of the export, with other options, is joined. nconnect: one connection, which breaks
# as one. lookupcache, actimeo: names that another host has made are seen at once (trap 21). Nobody uses locks of NFS.
OPTIONS = {
    **{"soft": "", "timeo": "20", "retrans": "1", "nosharecache": "", "nconnect": "1", "proto": "tcp"},
    **{"lookupcache": "none", "actimeo": "0", "nosuid": "", "nodev": "", "noexec": ""},
}
# As the kernel shows them again, which leaves out what is its default.
SHOWN = {"soft", "timeo=20", "retrans=1", "nosharecache", "lookupcache=none", "acregmin=0", "acdirmax=0", "nosuid"}
PROGRAM = "/sbin/mount.nfs"

_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_SLUG_CHARS = 80
# What mount.nfs says when it fails, by what it means. It says most of it on one line.
_SAID = {
    "No such file or directory": words.ABSENT,
    "access denied": words.DENIED,
    "Operation not permitted": words.DENIED,
    "Permission denied": words.DENIED,
    "Protocol not supported": words.OTHER_VERSION,
    "version or transport protocol is not supported": words.OTHER_VERSION,
    "Stale file handle": words.STALE,
    "timed out": words.UNREACHABLE,
    "refused": words.UNREACHABLE,
    "No route": words.UNREACHABLE,
    "unreachable": words.UNREACHABLE,
    "not registered": words.UNREACHABLE,
    "Failed to resolve": words.UNREACHABLE,
    "temporarily unavailable": words.UNREACHABLE,  # the name service
    "Input/output error": words.UNREACHABLE,
    "mount system call failed": words.UNREACHABLE,  # the same, as it words what the kernel said of version 4
}

_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: `options` are those of the mount and those of its file system."""

    path: str
    kind: str
    source: str
    options: frozenset[str]


def mount_nfs(call: calls.MountNfs, context: settings.Settings) -> calls.NfsMount:
    """Raises `Refused` when something else is mounted there, or the export with other options; `Failed` for what
    mount.nfs says beside the known reasons. Killed: it is mounted, or there is an empty directory. The next call finds
    out."""
    path = _path(call, context)
    source = f"{call.server}:{call.export}"
    with _alone(path):
        found = _mounts(path)
        if found:
            _check_own(found[-1], source, call.version)
            return _look(path)
        path.mkdir(mode=0o755, exist_ok=True)
        path.chmod(0o755)
        outcome, reason = _mount(source, path, call.version)
        if outcome != words.MOUNTED:
            path.rmdir()
        return calls.NfsMount(str(path), outcome, reason)


def unmount_nfs(call: calls.UnmountNfs, context: settings.Settings) -> calls.NfsUnmount:
    """Raises `Failed` when it is in use. Nothing asks the server first: a dead one is no obstacle."""
    path = _path(call, context)
    with _alone(path):
        found = _mounts(path)
        for _ in found:
            _unmount(path, lazy=call.lazy)
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
    return calls.NfsUnmount(was_mounted=bool(found))


def _path(call: calls.MountNfs | calls.UnmountNfs, context: settings.Settings) -> Path:
    source = f"{call.server}:{call.export}"
    readable = re.sub(r"[^A-Za-z0-9.]+", "_", source).strip("_")[:_SLUG_CHARS]
    digest = hashlib.sha256(f"{source} {call.version}".encode()).hexdigest()[:12]
    return Path(context.mount_dir, f"{readable}-{call.version}-{digest}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o755, exist_ok=True)
    path.parent.chmod(0o755)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # no longer than the deadline of whoever has it
        yield
    finally:
        os.close(lock)


def _mounts(path: Path) -> list[Mount]:
    """What is mounted there, the last one on top."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [mount for mount in map(parse, lines) if mount.path == str(path)]


def parse(line: str) -> Mount:
    """See proc(5): six fields, optional ones, a dash, three fields; what would split them is in octal."""
    before, _, after = line.partition(" - ")
    fields, (kind, source, options) = before.split(" "), after.split(" ")
    shown = {*fields[5].split(","), *options.split(",")}
    return Mount(_plain(fields[4]), kind, _plain(source), frozenset(shown))


def _plain(text: str) -> str:
    """The kernel escapes bytes, not characters."""
    raw = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def _check_own(found: Mount, source: str, version: str) -> None:
    wanted = SHOWN | {f"vers={version}"}
    if found.kind not in ("nfs", "nfs4") or found.source != source or wanted - found.options:
        lacks = ", ".join(sorted(wanted - found.options)) or "nothing"
        raise contract.Refused(f"{found.path} is {found.kind} of {found.source} and lacks {lacks}: unmount it first")


def _look(path: Path) -> calls.NfsMount:
    """The server is asked, so this may take as long as the mount takes to give up. A directory that was removed there
    while somebody had it open is still one, without links."""
    try:
        if path.stat().st_nlink == 0:
            return calls.NfsMount(str(path), words.STALE, "the directory was removed on the server")
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOENT):
            return calls.NfsMount(str(path), words.STALE, "Stale file handle")
        if error.errno in (errno.EACCES, errno.EPERM):
            return calls.NfsMount(str(path), words.DENIED, str(error.strerror))
        return calls.NfsMount(str(path), words.UNREACHABLE, str(error.strerror))
    return calls.NfsMount(str(path), words.WAS_MOUNTED, "")


def _mount(source: str, path: Path, version: str) -> tuple[str, str]:
    """retry: one try; the caller may call again. nolock: version 3 needs no daemon for locks then."""
    given = {"vers": version, **OPTIONS, "retry": "0", **({"nolock": ""} if version == "3" else {})}
    options = ",".join(f"{name}={value}" if value else name for name, value in given.items())
    command = [PROGRAM, source, str(path), "-o", options]
    try:
        done = subprocess.run(command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise contract.Failed(f"{PROGRAM} is not installed: it is in the package nfs-common") from error
    if done.returncode == 0:
        return words.MOUNTED, ""
    said = " ".join((done.stderr or done.stdout).split())[:300]
    for text, outcome in _SAID.items():
        if text in said:
            return outcome, said
    raise contract.Failed(said or f"mount.nfs ended with {done.returncode}")


def _unmount(path: Path, *, lazy: bool) -> None:
    """By system call: umount(8) asks the server what is there before it does anything."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_FORCE | _MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(path), flags) != 0:
        number = ctypes.get_errno()
        if number == errno.EBUSY:
            raise contract.Failed(f"{path} is in use")
        raise contract.Failed(f"{path}: {os.strerror(number)}")
