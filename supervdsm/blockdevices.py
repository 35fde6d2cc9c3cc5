"""Which disks volume groups may be made of: those that the helper's settings name, by names that stay."""

import contextlib
import fnmatch
import json
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from supervdsm import contract, lvm, settings

PLACES = (Path("/dev/mapper"), Path("/dev/disk/by-id"))
# How much of a device's beginning must be zeros for it to count as empty: a label of LVM, a partition table, a
# lockspace of sanlock, the superblock of nearly every file system.
_HEAD_BYTES = 1 << 20


def allowed(context: settings.Settings) -> list[str]:
    """All disks of this host that volume groups may be on, each by one name."""
    names: dict[int, str] = {}
    for place in PLACES:
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            number = _number(str(path))
            if number is not None and _may(str(path), number, context):
                names.setdefault(number, str(path))
    return list(names.values())


def check(paths: Iterable[str], context: settings.Settings) -> None:
    """Raises `Refused` unless each of `paths` is a disk of this host that may be used."""
    for path in paths:
        number = _number(path)
        if number is None:
            raise contract.Refused(f"{path} is not a disk of this host")
        if not _may(path, number, context):
            raise contract.Refused(f"{path} is not a disk for volume groups: see --volume-device")


def check_empty(paths: Iterable[str]) -> None:
    """Raises `Refused` for a device that holds anything, or that somebody uses."""
    for path in paths:
        with _opened(path, os.O_RDONLY) as device:
            used = os.pread(device, _HEAD_BYTES, 0).strip(b"\0") != b""
        found = _signatures(path) or (["data"] if used else [])
        if found:
            raise contract.Refused(f"{path} is not empty: {', '.join(found)}")


def wipe(paths: Iterable[str]) -> None:
    """Takes away all by which anything on these devices would be recognised. Raises `Refused` for one in use."""
    for path in paths:
        with _opened(path, os.O_WRONLY | os.O_SYNC) as device:
            os.pwrite(device, bytes(_HEAD_BYTES), 0)
        _wipefs("--all", path)  # a backup of a partition table is at the end


def by_number(paths: Sequence[str]) -> dict[int, str]:
    """Device numbers and names, of those that are there."""
    return {number: path for path in paths if (number := _number(path)) is not None}


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """Exclusively: a disk that is mounted, or part of something, is busy."""
    try:
        device = os.open(path, flags | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise contract.Refused(f"{path}: {error.strerror}") from error
    try:
        yield device
    finally:
        os.close(device)


def _signatures(path: str) -> list[str]:
    found = _wipefs("--no-act", "--json", path)
    return [one["type"] for one in json.loads(found)["signatures"]] if found else []


def _wipefs(*arguments: str) -> str:
    command = ["/usr/sbin/wipefs", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=lvm.environment())
    if done.returncode != 0:
        raise contract.Failed(done.stderr.strip())
    return done.stdout


def _may(path: str, number: int, context: settings.Settings) -> bool:
    """A logical volume is nobody's disk, whatever it is called: guests keep volume groups in theirs (trap 50)."""
    named = any(fnmatch.fnmatchcase(path, pattern) for pattern in context.volume_devices)
    return named and not _mapper_uuid(number).startswith("LVM-")


def _number(path: str) -> int | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def _mapper_uuid(number: int) -> str:
    try:
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/uuid").read_text()
    except FileNotFoundError:
        return ""
