"""lvmlockd and sanlock: whether a shared volume group can be started on this host, and which ones are.

sanlock knows the locks of a group as the lockspace "lvm_" and its name. Nothing here touches storage, but `holder`.
"""

import contextlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from supervdsm import calls, contract, killvg, lvm, settings
from supervdsm.calls import volumes as volume_calls

LVMLOCKCTL = "/usr/sbin/lvmlockctl"
SANLOCK = "/usr/sbin/sanlock"
# What lvm.conf has to say. -I: nothing in the environment of whoever runs it can put other code in its place.
KILL_COMMAND = f"/usr/bin/python3 -I {Path(killvg.__file__).resolve()}"
_PREFIX = "lvm_"
_HOST_IDS_BYTES = "1M"
_CONFIGURED = re.compile(r'^(host_id|lvmlockctl_kill_command)="?(.*?)"?$', re.MULTILINE)
_GLOBAL_LOCK = re.compile(rf"^info=ls ls_name={_PREFIX}(\S+) .*\bsanlock_gl_enabled=1$", re.MULTILINE)
_HELPER = re.compile(r"^ *helper_pid=(\d+)$", re.MULTILINE)


class Holder(NamedTuple):
    """The last host that had a host id: its name, and the moment (on its own clock) of its last renewal; 0 when it
    left. `io_timeout_s` is sanlock's for this lockspace."""

    name: str
    timestamp: int
    io_timeout_s: int


def get_lock_manager(call: calls.GetLockManager, context: settings.Settings) -> calls.LockManager:
    """Runs in a call's process."""
    return state()


def state() -> calls.LockManager:
    """Raises `Failed` when LVM's configuration cannot be read."""
    known = _known()
    host_id, kill_command = _configured()
    joined = _joined()
    found = list(_obstacles(known is not None, joined is not None, host_id, kill_command))
    return calls.LockManager(
        running=known is not None,
        host_id=host_id,
        kill_command=kill_command,
        groups={group: joined[group] for group in known or {} if joined and group in joined},
        global_locks=global_locks() if known else [],
        obstacles=found,
    )


def joined(group: str) -> int | None:
    """The host id under which this host takes part in the locking of `group`; None when it does not (yet)."""
    return (_joined() or {}).get(group) if group in (_known() or {}) else None


def is_known(group: str) -> bool:
    """Whether lvmlockd has anything of the group, be it only what an outage left."""
    return group in (_known() or {})


def is_joining(group: str) -> bool:
    """Whether a start that was cut off, or is not over, still goes on."""
    answer = _ask([SANLOCK, "client", "status"]) or ""
    return re.search(rf"^s {_PREFIX}{re.escape(group)}:\d+:\S+ ADD", answer, re.MULTILINE) is not None


def own_name() -> str:
    """The name that sanlock writes for this host. Raises `Failed`."""
    for line in (_ask([SANLOCK, "client", "status", "-D"]) or "").splitlines():
        if line.strip().startswith("our_host_name="):
            return line.strip().removeprefix("our_host_name=")
    raise contract.Failed("sanlock does not tell its host name")


def holder(group: str, host_id: int, path: str, offset: int) -> Holder | None:
    """What storage says of `host_id` in the lockspace at `path` and `offset`; None for an id that nobody ever had.

    Reads storage, and blocks as long as that does.
    """
    place = f"{_PREFIX}{group}:{host_id}:{path}:{offset}"
    answer = _ask([SANLOCK, "direct", "read_leader", "-s", place]) or ""
    found = dict(line.split(" ", 1) for line in answer.splitlines() if " " in line)
    name = found.get("resource_name", "")
    return Holder(name, int(found["timestamp"]), int(found["io_timeout"])) if name else None


def global_lock() -> str | None:
    """The started group that has LVM's global lock; None also when nobody has asked for that lock yet."""
    return next((group for group, has_it in (_known() or {}).items() if has_it), None)


def global_locks() -> list[str]:
    """The started groups that have LVM's global lock as far as lvmlockd knows, which looks when it starts them."""
    found = _GLOBAL_LOCK.findall(_ask([LVMLOCKCTL, "--info", "--dump"]) or "")
    return sorted(found)


def host_ids(path: str, offset: int) -> dict[int, tuple[str, int]]:
    """The host ids that hosts have in the lockspace of a group, each with its host's name and the moment of its last
    renewal. Reads storage, as `holder` does."""
    answer = _ask([SANLOCK, "direct", "dump", f"{path}:{offset}:{_HOST_IDS_BYTES}"]) or ""
    # offset, lockspace, name, timestamp, id, generation; a place that nobody ever had is left out
    lines = [line.split() for line in answer.splitlines() if f" {_PREFIX}" in line]
    return {int(line[4]): (line[2], int(line[3])) for line in lines if len(line) == 6 and int(line[3]) > 0}


def drop(group: str) -> None:
    """Makes lvmlockd forget a group whose locks are lost."""
    _ask([LVMLOCKCTL, "--drop", group])


def enable_global_lock(group: str) -> None:
    """Raises `Failed`."""
    done = subprocess.run([LVMLOCKCTL, "--gl-enable", group], capture_output=True, text=True, env=lvm.environment())
    if done.returncode != 0:
        raise contract.Failed(f"the global lock is not enabled: {(done.stdout + done.stderr).strip()}")


def _obstacles(lvmlockd: bool, sanlock: bool, host_id: int | None, kill_command: str | None) -> list[str]:
    found = []
    if not lvmlockd:
        found.append("lvmlockd does not answer")
    if not sanlock:
        found.append("sanlock does not answer")
    if host_id is None or not 1 <= host_id <= volume_calls.MAX_HOSTS:
        found.append(f"local/host_id of lvmlocal.conf is not 1 to {volume_calls.MAX_HOSTS}: set it to this host's id")
    if kill_command != KILL_COMMAND:
        found.append(f'global/lvmlockctl_kill_command of lvm.conf is not "{KILL_COMMAND}" (trap 47)')
    if sanlock and not _kills_as_root():
        found.append("sanlock was not started by root, so that it cannot run the kill command (trap 47)")
    return found


def _known() -> dict[str, bool] | None:
    """The groups of lvmlockd, and whether the global lock has been seen in each; None when lvmlockd does not run.

    A group that it is just leaving is none: its lockspace shows with REM.
    """
    answer = _ask([LVMLOCKCTL, "--info"])
    if answer is None:
        return None
    groups: dict[str, bool] = {}
    for part in re.split(r"^VG ", answer, flags=re.MULTILINE)[1:]:
        group = part.split(" ", 1)[0]
        if re.search(rf"^LS \S+ {_PREFIX}{re.escape(group)}$", part, re.MULTILINE):
            groups[group] = re.search(r"^LK GL ", part, re.MULTILINE) is not None
    return groups


def _joined() -> dict[str, int] | None:
    """The groups whose lockspace sanlock is in, with this host's id there; None when sanlock does not run. One that is
    being joined or left carries another word at its end."""
    answer = _ask([SANLOCK, "client", "status"])
    if answer is None:
        return None
    spaces = re.findall(rf"^s {_PREFIX}(\S+?):(\d+):\S+$", answer, re.MULTILINE)
    return {group: int(host_id) for group, host_id in spaces}


def _configured() -> tuple[int | None, str | None]:
    answer = lvm.run("lvmconfig", "--typeconfig", "full", "local/host_id", "global/lvmlockctl_kill_command", devices=())
    if answer.code != 0:
        raise contract.Failed(f"lvmconfig: {answer.reason}")
    found = dict(_CONFIGURED.findall(answer.out))
    number = int(found.get("host_id") or 0)
    return number or None, found.get("lvmlockctl_kill_command") or None


def _kills_as_root() -> bool:
    """Commands are run by a child of sanlock, which stays whoever sanlock was when it was started."""
    found = _HELPER.search(_ask([SANLOCK, "client", "status", "-D"]) or "")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return found is not None and "\nUid:\t0\t0\t" in Path(f"/proc/{found[1]}/status").read_text()
    return False


def _ask(command: Sequence[str]) -> str | None:
    """What it answers, which may be any bytes where it shows what lies on a disk; None when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=lvm.environment(),
    )
    return done.stdout if done.returncode == 0 else None
