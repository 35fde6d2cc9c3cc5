"""The helper's socket in the file system."""

import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Iterator

from supervdsm import settings

MODE = 0o600
# Connections that the kernel keeps while the helper forks.
BACKLOG = 128

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def listening(path: str, uid: int, gid: int) -> Iterator[socket.socket]:
    """A socket that listens on the absolute `path`, owned by the agent; removed at the end. Raises `SettingsError` when
    another helper answers there, `OSError` when it cannot be made.

    The agent may own the directory, so the socket is never changed by a name that the agent can swap: it gets its owner
    and mode and begins to listen in a directory that only root can enter, and is then moved into place, over the socket
    of a helper that crashed. So it exists at `path` only when it accepts.
    """
    if _answers(path):
        raise settings.SettingsError(f"--socket {path}: another helper answers there")
    directory, name = os.path.split(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link, _closing(os.open(directory, _DIRECTORY)) as home:
        ours = _place(link, home, name, uid, gid)
        yield link
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(ours, os.stat(name, dir_fd=home, follow_symlinks=False)):
                os.unlink(name, dir_fd=home)


def _place(link: socket.socket, home: int, name: str, uid: int, gid: int) -> os.stat_result:
    """Lets `link` listen as `name` in the directory `home`."""
    private = f".supervdsm-{secrets.token_hex(8)}"
    os.mkdir(private, 0o700, dir_fd=home)
    with _closing(os.open(private, _DIRECTORY, dir_fd=home)) as inside:
        found = os.fstat(inside)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise settings.SettingsError(f"--socket: {private} was replaced while the socket was made")
        link.bind(f"/proc/self/fd/{inside}/{name}")
        os.chown(name, uid, gid, dir_fd=inside, follow_symlinks=False)
        os.chmod(name, MODE, dir_fd=inside)
        link.listen(BACKLOG)
        ours = os.stat(name, dir_fd=inside, follow_symlinks=False)
        os.rename(name, name, src_dir_fd=inside, dst_dir_fd=home)
    os.rmdir(private, dir_fd=home)
    return ours


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
