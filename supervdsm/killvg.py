"""Takes a volume group away from this host, at once. LVM runs it when sanlock is about to lose the group's locks:

    global/lvmlockctl_kill_command = "/usr/bin/python3 -I .../supervdsm/killvg.py"        in lvm.conf

The name of the group comes behind it. The locks of a shared group live in one of its volumes. Where that one cannot be
reached, and others can, other hosts take the locks over while this host still writes (trap 47). So every device of the
group on this host gets the error target: what is written is refused from then on.

Exit 0: nothing of this host can change the group any more, and its locks may pass on. A write that the storage still
has, and has neither done nor refused, can be done at any later time; as long as there is one, and when anything else
fails, it is 1: then the locks stay, and the watchdog resets the host. Whoever has a device open keeps it, and gets
EIO. The error targets stay until the group is started again.

Stands alone under the system's interpreter, as root, from any environment. Standard library only.
"""

import contextlib
import os
import re
import subprocess
import sys
import syslog
import time
from collections.abc import Sequence
from pathlib import Path

# With its io_timeout of 10 sanlock gives a group about 40 s from here to the reset by the watchdog; less (seconds).
DEADLINE_S = 25.0
DMSETUP = "/usr/sbin/dmsetup"
_NAME = re.compile(r"((?:[^-]|--)+)-([^-].*)")


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: killvg.py VG", file=sys.stderr)
        return 2
    (group,) = arguments
    alive = kill(group)
    if alive:
        _tell(
            syslog.LOG_ALERT, f"volume group {group}: {', '.join(alive)} cannot be cut off, this host has to be reset"
        )
        return 1
    _tell(syslog.LOG_ALERT, f"volume group {group}: its locks are lost; all its devices refuse to be used now")
    return 0


def kill(group: str) -> list[str]:
    """Gives every device of `group` the error target, all at once. Answers the names of those that are not refused
    for certain after `DEADLINE_S`: empty is success."""
    deadline = time.monotonic() + DEADLINE_S
    # udev may itself hang with the storage: nobody waits for it here.
    command = [DMSETUP, "wipe_table", "--noflush", "--nolockfs", "--noudevsync"]
    running = [subprocess.Popen([*command, name], stdin=subprocess.DEVNULL) for name in devices(group)]
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    alive = [name for name in devices(group) if not is_dead(name)]
    return [name for name in alive if name in devices(group)]


def devices(group: str) -> dict[str, Path]:
    """The devices of `group` on this host by name, with their places in /sys. As the kernel has them: no storage is
    touched."""
    found = {}
    for place in Path("/sys/block").glob("dm-*"):
        with contextlib.suppress(FileNotFoundError):  # it was just removed
            name, uuid = ((place / "dm" / file).read_text().strip() for file in ("name", "uuid"))
            if uuid.startswith("LVM-") and _parts(name)[0] == group:
                found[name] = place
    return found


def device_name(group: str, volume: str) -> str:
    """The name of a volume's device: LVM joins group and volume by a hyphen, and doubles their own."""
    return "-".join(part.replace("-", "--") for part in (group, volume))


def volume_of(name: str) -> str:
    """The volume of a device of `devices`."""
    return _parts(name)[1]


def _parts(name: str) -> tuple[str, str]:
    """Group and volume of a device, both empty when it is none of LVM's."""
    match = _NAME.fullmatch(name)
    return (match[1].replace("--", "-"), match[2].replace("--", "-")) if match else ("", "")


def is_dead(name: str) -> bool:
    """Whether the device refuses whatever is asked of it."""
    command = [DMSETUP, "table", name]
    asked = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)
    targets = [line.split()[2] for line in asked.stdout.splitlines()]
    return targets != [] and set(targets) == {"error"}


def _tell(priority: int, message: str) -> None:
    print(message, file=sys.stderr)
    syslog.openlog("vdsm-killvg", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(priority, message)


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
