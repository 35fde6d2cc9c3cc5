"""Directories that root makes ready for the agent.

The agent may be lying or taken over, and it can rename and link things inside directories that it owns, at any moment.
So nothing here is looked at by one name and changed by another: the walk goes from / name by name on descriptors, no
name may be a link, and what is checked, owned and chmodded is one open descriptor. What a swapped name can lead to is
then only a directory that passes the same checks.
"""

import contextlib
import os
from collections.abc import Iterator

from supervdsm import calls, contract, settings

# Set-group-id: images made inside belong to the group, so that QEMU can open them. Nobody else may look.
MODE = 0o2770

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prepare_directory(call: calls.PrepareDirectory, context: settings.Settings) -> calls.PreparedDirectory:
    """Makes `call.path` a directory of the agent's with `MODE`. Only the last name is made, its parent must exist.

    Raises `Refused` for a place that is not under a configured directory, for links and files on the way, and for a
    directory of somebody else (root's is taken over while it is empty). Every step can be repeated: a crash leaves an
    empty directory of root's at worst. Runs in a call's process, since storage may hang.
    """
    if not any(call.path.startswith(f"{root}/") for root in context.localfs_dirs):
        allowed = ", ".join(context.localfs_dirs) or "none"
        raise contract.Refused(f"{call.path} is not under a configured directory ({allowed})")
    parent_path, name = os.path.split(call.path)
    with _walk(parent_path) as parent:
        created = _make(parent, name)
        with _open(parent, name) as place:
            _check_owner(place, call.path, context.uid)
            # In this order: chown clears the set-group-id bit.
            os.fchown(place, context.uid, context.storage_gid)
            os.fchmod(place, MODE)
            os.fsync(place)
        os.fsync(parent)
    return calls.PreparedDirectory(path=call.path, created=created)


@contextlib.contextmanager
def _walk(path: str) -> Iterator[int]:
    """A descriptor of the directory `path`, reached from / one name after the other."""
    with contextlib.ExitStack() as opened:
        place = opened.enter_context(_open(None, "/"))
        for name in path.split("/")[1:]:
            place = opened.enter_context(_open(place, name))
        yield place


@contextlib.contextmanager
def _open(parent: int | None, name: str) -> Iterator[int]:
    """A descriptor of the directory `name` itself. Raises `Refused` for links and files, `Failed` for absent ones."""
    try:
        place = os.open(name, _OPEN, dir_fd=parent)
    except NotADirectoryError as error:  # what open says of a link, too
        raise contract.Refused(f"{name} is a link or a file, not a directory") from error
    except OSError as error:
        raise contract.Failed(f"{name}: {error.strerror}") from error
    try:
        yield place
    finally:
        os.close(place)


def _make(parent: int, name: str) -> bool:
    """False when something of that name is there already."""
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _check_owner(place: int, path: str, agent_uid: int) -> None:
    owner = os.fstat(place).st_uid
    if owner == agent_uid:
        return
    if owner != 0:
        raise contract.Refused(f"{path} belongs to user {owner}, not to the agent")
    if os.listdir(place):
        raise contract.Refused(f"{path} belongs to root and is not empty")
