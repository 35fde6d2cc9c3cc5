"""The audit trail: one line of JSON for each call that reached the helper, refused ones included.

    {"time": "2026-01-31T12:00:00.123Z", "pid": 812, "uid": 990, "call": "PrepareDirectory",
     "arguments": {"path": "/srv/images/a"}, "outcome": "done", "reason": null, "ms": 1.8}

`outcome` is "done" or the kind of a `contract.HelperError`, or "stopped" when the helper ended under the call. `call`
is null when none could be read. Name and arguments are exact once they passed the contract; what was refused by it
stands there as Python shows it, shortened. Secrets stand nowhere.
`ms` counts from accepting the connection. The line is written before the peer gets its answer.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import logging
import os
import reprlib
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("supervdsm.audit")


@dataclasses.dataclass(frozen=True)
class Peer:
    """Who called, as the kernel says (SO_PEERCRED): the ids at the time of connecting."""

    pid: int
    uid: int


class Trail:
    """The file. Opened for each line, so that it can be rotated by renaming it; only root may read it."""

    def __init__(self, path: str) -> None:
        """Creates the file, or makes an old one private again. Raises `OSError`: no helper without an audit trail."""
        self._path = path
        with self._opened() as trail:
            os.fchown(trail, 0, 0)
            os.fchmod(trail, 0o600)

    def write(self, peer: Peer, call: str | None, arguments: Any, outcome: str, reason: str | None, ms: float) -> None:
        """Appends one line by one write, so that lines of several processes never mix. A full disk must not stop root's
        work for the host's storage: then the line goes to the helper's log."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": now, "pid": peer.pid, "uid": peer.uid, "call": call, "arguments": arguments}
        line = json.dumps(entry | {"outcome": outcome, "reason": reason, "ms": round(ms, 1)}).encode() + b"\n"
        try:
            with self._opened() as trail:
                if os.write(trail, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            log.error("cannot write the audit trail (%s): %s", error.strerror, line.decode())

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        trail = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            yield trail
        finally:
            os.close(trail)


def shortened(unchecked: object) -> str:
    """What did not pass the contract, as a text of bounded length and depth."""
    return _SHORT.repr(unchecked)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
