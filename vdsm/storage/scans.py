"""One look at all disks of this host, in a child with a deadline: a disk that hangs costs itself, and nobody else."""

import dataclasses
import signal
import threading
from pathlib import Path
from typing import Any

from vdsm import errors, forkserver, logs
from vdsm.storage import sysblock

_log = logs.get("storage.scans")

_TARGET = "vdsm.storage.sysblock:serve"
# One disk is read in a millisecond.
DISK_S = 5.0


@dataclasses.dataclass(frozen=True)
class Scan:
    """What was found. `silent`: disks that are there and could not be looked at, with the reason."""

    disks: dict[str, sysblock.Disk]
    sessions: list[sysblock.Session]
    silent: dict[str, str]


class Scanner:
    """Scans one at a time. Methods may be called from any thread."""

    def __init__(self, server: forkserver.ForkServer, root: Path = Path("/sys"), disk_s: float = DISK_S) -> None:
        self._server = server
        self._root = root
        self._disk_s = disk_s
        self._lock = threading.Lock()
        self._hung: dict[str, forkserver.Child] = {}  # by the disk at which it hangs; it is left out meanwhile

    def scan(self) -> Scan:
        """Blocks `DISK_S` for each disk that has begun to hang. Raises `WorkerDied`."""
        with self._lock:
            found = Scan({}, [], {})
            while not self._go_on(found):
                pass
            return found

    def _go_on(self, found: Scan) -> bool:
        """Reads on in a new child: False when that one hung, and another has to read what is left."""
        self._bury()
        found.silent.update({disk: f"the kernel does not tell of it within {self._disk_s:g} s" for disk in self._hung})
        child = self._server.spawn(_TARGET, {"root": str(self._root), "skip": [*found.disks, *found.silent]})
        disk = ""
        try:
            while (told := child.channel.receive(self._disk_s if disk else forkserver.START_TIMEOUT_S)) is not None:
                if "sessions" in told:
                    child.close()
                    found.sessions.extend(sysblock.Session(**session) for session in told["sessions"])
                    return True
                disk = self._note(found, disk, told)
        except TimeoutError:
            child.kill(signal.SIGKILL)
            if disk:
                _log.warning("disk %s hangs: it is left out", disk)
                self._hung[disk] = child
                return False
        child.close()
        raise errors.WorkerDied(how="a scan of the disks")

    def _note(self, found: Scan, disk: str, told: dict[str, Any]) -> str:
        """The disk that the child looks at from now on; none between two."""
        if "facts" in told:
            found.disks[disk] = sysblock.Disk(**told["facts"])
        elif "reason" in told:
            found.silent[disk] = told["reason"]
        return str(told.get("disk", ""))

    def _bury(self) -> None:
        for disk in [disk for disk, child in self._hung.items() if child.wait_gone(0)]:
            self._hung.pop(disk).close()
