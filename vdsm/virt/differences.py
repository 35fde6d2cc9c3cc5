"""Where the table of VMs did not agree with what is: kept for a while, logged, and told as events.

A difference is {vm_id, at, had, found, reason, done}: `had` is the table's state, None for a VM that it did not have;
`found` is what is, None for a domain that is gone without ever having been ours; `done` says in words what was done.
"""

import collections
import threading
import time
from typing import Any

from vdsm import logs
from vdsm.virt import vm

_log = logs.get("virt.differences")

# The newest are kept for `Host.reconcile`; older ones are in the log.
KEPT = 1000

Difference = dict[str, Any]


class Differences:
    """Methods may be called from any thread."""

    def __init__(self, publish: vm.Publish) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._kept: collections.deque[Difference] = collections.deque(maxlen=KEPT)
        self._count = 0

    def record(self, vm_id: str, had: str | None, found: str | None, reason: str, done: str) -> None:
        """Keeps, logs and publishes one."""
        _log.warning("VM %s: had %s, found %s (%s): %s", vm_id, had, found, reason, done)
        about = {"reason": reason, "done": done}
        with self._lock:
            self._count += 1
            self._kept.append({"vm_id": vm_id, "at": time.time(), "had": had, "found": found, **about})
        self._publish(vm_id, {"change": "difference", "status": found, "previous": had, **about})

    def mark(self) -> int:
        """For `since`: how many there have been."""
        return self._count

    def since(self, mark: int) -> list[Difference]:
        """Those after `mark` that are still kept, oldest first."""
        with self._lock:
            new = min(self._count - mark, len(self._kept))
            return list(self._kept)[len(self._kept) - new :]

    def all(self) -> list[Difference]:
        """All that are kept, oldest first."""
        return self.since(0)
