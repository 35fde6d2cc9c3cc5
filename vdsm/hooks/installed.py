"""Which hook scripts there are, and whether they may be run.

A script runs with the agent's rights. So nobody but root and the agent's own user may be able to change it, replace
it, or replace a directory on the way to it, also where a link leads (sshd asks the same of its keys).
"""

import dataclasses
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from vdsm.hooks import points

# What editors, rpm and dpkg leave beside a script.
BACKUPS = ("~", ".bak", ".orig", ".swp", ".rpmnew", ".rpmorig", ".rpmsave")
BACKUP_PARTS = (".dpkg-", ".ucf-")


@dataclasses.dataclass(frozen=True)
class Script:
    """`name` is the file's, `refused` why it must not be run: None when it may."""

    name: str
    path: Path
    refused: str | None


def scripts(directory: Path) -> list[Script]:
    """The scripts in a point's directory, in the order of their names; none when there is no such directory.

    What is no regular file, not executable (the classic way to switch a script off), hidden or a backup is none.
    """
    try:
        found = sorted(path for path in directory.iterdir() if not _is_leftover(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Script(directory.name, directory, f"{directory}: {error.strerror}")]
    return [Script(path.name, path, _refusal(path)) for path in found if path.is_file() and os.access(path, os.X_OK)]


def report(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{point: {script: {"checksum": SHA-256 of its content}}} of the points that have scripts, as upstream's
    capabilities tell; a script that is not run has the reason as "refused" too."""
    found = {name: scripts(root / name) for name in points.POINTS}
    return {name: {script.name: _described(script) for script in there} for name, there in found.items() if there}


def strangers(root: Path) -> list[str]:
    """Directories with scripts that no point is named by: the scripts never run."""
    if not root.is_dir():
        return []
    directories = [path for path in sorted(root.iterdir()) if path.name not in points.POINTS and path.is_dir()]
    return [path.name for path in directories if scripts(path)]


def _is_leftover(name: str) -> bool:
    return name.startswith((".", "#")) or name.endswith(BACKUPS) or any(part in name for part in BACKUP_PARTS)


def _refusal(path: Path) -> str | None:
    try:
        directory, target = path.parent.resolve(strict=True), path.resolve(strict=True)
        for place in dict.fromkeys([directory, *directory.parents, target, *target.parents]):
            reason = _unsafe(place, sticky_is_safe=place != directory)
            if reason is not None:
                return f"{place} {reason}"
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _unsafe(path: Path, *, sticky_is_safe: bool) -> str | None:
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to user {found.st_uid}"
    # On the way through a sticky directory, such as /tmp, others cannot replace what is not theirs.
    sticky = sticky_is_safe and stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    return "can be written by others" if found.st_mode & 0o022 and not sticky else None


def _described(script: Script) -> dict[str, Any]:
    try:
        with script.path.open("rb") as file:
            told: dict[str, Any] = {"checksum": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        told = {"checksum": "", "refused": f"cannot be read: {error.strerror}"}
    return told if script.refused is None else told | {"refused": script.refused}
