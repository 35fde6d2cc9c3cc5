"""LVM's commands, confined to the devices that a call is about.

Whatever the host's lvm.conf says, a command of ours looks at the devices it was given and at no others: not at the
disks of the host, not at a frozen LUN of another repository, and not into logical volumes, where guests keep volume
groups of their own (trap 50). What lvm.conf still decides is what belongs to the host: `local/host_id`, the kill
command, the size of the volume that holds the locks.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supervdsm import contract

LVM = "/usr/sbin/lvm"
# Two hosts that change a group at the same moment: lvmlockd refuses one of them, and LVM tries again after a second,
# so often.
LOCK_RETRIES = 20
_REASON_CHARS = 300
_CONFIG = (
    "devices/use_devicesfile=0",
    "devices/scan_lvs=0",
    # A suspended device would hold up the command for ever.
    "devices/ignore_suspended_devices=1",
    # What other commands have seen tells nothing of our devices.
    "devices/hints=none",
    "devices/obtain_device_list_from_udev=0",
    "devices/external_device_info_source=none",
    "global/use_lvmlockd=1",
    f"global/lvmlockd_lock_retries={LOCK_RETRIES}",
    "global/event_activation=0",
    "activation/monitoring=0",
    # The metadata that counts is on storage; copies in /etc would only grow old.
    "backup/backup=0",
    "backup/archive=0",
    # KiB; a group's text has to fit. Pages of it that are not used cost nothing.
    "global/io_memory_size=32768",
)
# MiB by which the volume with the locks grows when it is full: a lock takes 1, or 8 on sectors of 4096 bytes. LVM
# writes all of that while it has the group's lock, 256 by itself. What it is made with first stays LVM's own.
_OF_COMMAND = {"lvcreate": ("global/sanlock_lv_extend=64",)}


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Why it failed, in one line: what LVM says, without its warnings when there is more."""
        lines = [" ".join(line.split()) for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if not line.startswith("WARNING:")]
        return "; ".join(errors or lines)[:_REASON_CHARS] or f"LVM ended with {self.code}"


def run(command: str, *arguments: str, devices: Sequence[str]) -> Result:
    """Runs `lvm command` on these devices alone, as long as it takes: the call's deadline ends it. `devices` may be
    empty for a command that needs none."""
    argv = [LVM, command, "--config", " ".join([*_CONFIG, *_OF_COMMAND.get(command, ()), *_udev_config()])]
    if devices:
        argv += ["--devices", ",".join(devices)]
    done = subprocess.run(
        [*argv, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(),
    )
    return Result(done.returncode, done.stdout, done.stderr)


def change(command: str, *arguments: str, devices: Sequence[str]) -> None:
    """As `run`; raises `Failed` with LVM's reason when it fails."""
    done = run(command, *arguments, devices=devices)
    if done.code != 0:
        raise contract.Failed(f"{command}: {done.reason}")


def report(command: str, fields: Sequence[str], *arguments: str, devices: Sequence[str]) -> list[dict[str, str]]:
    """The rows of `vgs`, `lvs` or `pvs`. Raises `Failed`."""
    done = run(command, *form(fields), *arguments, devices=devices)
    if done.code != 0:
        raise contract.Failed(f"{command}: {done.reason}")
    return rows(done)


def form(fields: Sequence[str]) -> list[str]:
    """Arguments of `vgs`, `lvs` and `pvs` for `rows`: sizes are bytes, yes and no are "1" and "0"."""
    return ["--reportformat", "json", "--units", "b", "--nosuffix", "--binary", "-o", ",".join(fields)]


def rows(done: Result) -> list[dict[str, str]]:
    """What a report answered, one row for each thing."""
    document: dict[str, Any] = json.loads(done.out)
    (found,) = document["report"][0].values()
    return list(found)


def udev_runs() -> bool:
    """Whether udev makes the device nodes of this host; without it, libdevmapper does."""
    return Path("/run/udev/control").exists()


def environment() -> dict[str, str]:
    """For LVM and for programs that change device nodes."""
    kept = {name: os.environ[name] for name in ("SANLOCK_RUN_DIR", "LVM_SYSTEM_DIR") if name in os.environ}
    no_udev = {} if udev_runs() else {"DM_DISABLE_UDEV": "1"}
    return (
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "LVM_SUPPRESS_FD_WARNINGS": "1"} | kept | no_udev
    )


def _udev_config() -> list[str]:
    number = int(udev_runs())
    return [f"activation/udev_sync={number}", f"activation/udev_rules={number}"]
