"""What the helper was started with: whom it serves and where it may work. Fixed for its whole life."""

import dataclasses
import grp
import os
import pathlib
import pwd
import stat
from collections.abc import Sequence

from supervdsm import contract


class SettingsError(Exception):
    """The helper must not start like this; the text names the option and why."""


@dataclasses.dataclass(frozen=True)
class Settings:
    # The agent: the only user beside root that may call, and the owner of what is prepared for it.
    uid: int
    # Group of the socket.
    gid: int
    # Group of repository directories: QEMU's, which opens the images in them.
    storage_gid: int
    # Repository directories are made and changed directly or deeper under these, nowhere else.
    localfs_dirs: tuple[str, ...]
    # NFS exports are mounted directly under it; it is made when it is needed.
    mount_dir: str = "/run/vdsm-mounts"
    # Disks that shared volume groups may be made of and found on: patterns of names in /dev/mapper and /dev/disk/by-id.
    volume_devices: tuple[str, ...] = ()


def resolve(
    user: str,
    group: str,
    storage_group: str,
    localfs_dirs: Sequence[str],
    mount_dir: str,
    volume_devices: Sequence[str],
) -> Settings:
    """Settings from names. Raises `SettingsError`."""
    try:
        uid = pwd.getpwnam(user).pw_uid
        gid, storage_gid = (grp.getgrnam(name).gr_gid for name in (group, storage_group))
    except KeyError as error:
        raise SettingsError(str(error.args[0])) from error
    for path in localfs_dirs:
        _check_root(path)
    if not contract.is_absolute_path(mount_dir):
        raise SettingsError(f"--mount-dir {mount_dir}: give an absolute path without '.', '..' or a slash at the end")
    check_place("--mount-dir", mount_dir)
    return Settings(uid, gid, storage_gid, tuple(localfs_dirs), mount_dir, tuple(volume_devices))


def check_place(option: str, path: str) -> None:
    """A file that root writes must lie where nobody else can put a link or another file in its place: a directory of
    root's that others cannot write, or a sticky one. Raises `SettingsError`."""
    directory = pathlib.Path(path).parent
    try:
        found = directory.stat()
    except OSError as error:
        raise SettingsError(f"{option} {path}: {error.strerror}") from error
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if found.st_uid != 0 or writable:
        raise SettingsError(f"{option} {path}: {directory} must belong to root and be writable by root only, or sticky")


def _check_root(path: str) -> None:
    """Calls walk from / without following links, so a configured directory must be spelled without them too."""
    if not contract.is_absolute_path(path):
        raise SettingsError(f"--localfs-dir {path}: give an absolute path without '.', '..' or a slash at the end")
    real = os.path.realpath(path)
    if real != path:
        raise SettingsError(f"--localfs-dir {path} leads through a symbolic link; give {real}")
