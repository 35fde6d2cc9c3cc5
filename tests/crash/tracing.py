"""strace on one process: what it does to storage, one line for each durable step, and what is injected at one of them.

A step is a system call that changes a repository, starts a tool, or says something to sanlock or to the agent. It is
named by its place in its process: the n-th call of that system call. strace counts in the same way (`when=n`, for each
thread), so a step that was seen in one run is met again in the next one.
"""

import contextlib
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.until import running, until

# What can change a file or a name. Opening is one: it may make or empty a file.
CHANGING = (
    *("openat", "pwrite64", "pwritev", "pwritev2", "write", "writev", "fallocate", "ftruncate", "fchmod", "fchmodat"),
    *(
        "fsync",
        "fdatasync",
        "rename",
        "renameat",
        "renameat2",
        "link",
        "linkat",
        "unlink",
        "unlinkat",
        "mkdir",
        "rmdir",
    ),
    *("chmod", "mkdirat", "copy_file_range"),
)
STARTING = ("vfork", "clone", "clone3", "fork")
SAYING = ("sendto", "sendmsg")
HEARING = "recvfrom"

ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR")  # of storage
DAEMON_GONE = "EPIPE"

_LINE = re.compile(r"(?:(?P<thread>\d+) +)?(?P<call>[a-z0-9_]+)\((?P<rest>.*)")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# The first bytes of messages to sanlock that make it change a lease on storage, as strace prints them: magic, version,
# command. What only asks is no step.
_COMMANDS = {"3": "leave", "7": "acquire", "10": "release", "22": "make", "23": "write"}
_SANLOCK = {rf"\20 (\4\1\0\0\0\{command}\0": name for command, name in _COMMANDS.items()}
_MESSAGE = r"{\""  # to the agent: JSON, behind its length
# To the root helper, when it is to change something: so, too.
_CALL = re.compile(r'{\\"call\\": ?\\"((?:Create|Activate|Extend|Deactivate|Remove)Volume)')
# What is behind a descriptor of a volume, and where.
_VOLUME, _AT = re.compile(r"<(/dev/[^<>]+)<block [\d:]+>>"), re.compile(r", (\d+)(?:, [\w|]+)?\) +=")
_SLOT_BYTES, _RECORD_OFFSET = 3 << 20, 2 << 20
HELPER, RECORD = "root helper", "record in a volume"
_ATTACH_S = 20.0
# A signal came first, and the kernel makes the call once more by itself; another run has no such line.
_AGAIN = "= ? ERESTART"


class Step(NamedTuple):
    """The `number`-th call of `call` in its process; `what` tells people, and whether a later run met the same."""

    call: str
    number: int
    what: str

    @property
    def name(self) -> str:
        return f"{self.call}#{self.number}"

    @property
    def changes(self) -> bool:
        """Whether storage is what it is about; else a tool is started, or something said."""
        return self.call in CHANGING


def options() -> list[str]:
    """strace, so that `steps` can read its log."""
    traced = ",".join((*CHANGING, *STARTING, *SAYING, HEARING))
    return ["strace", "-yy", "-s", "40", "-e", f"trace={traced}"]


def injection(step: Step, kind: str) -> str:
    """What makes the process die before the step, or the step fail once with an errno."""
    effect = f"error={kind}" if fails(kind) else "signal=SIGKILL"
    return f"inject={step.call}:{effect}:when={step.number}"


def steps(log: Path, places: dict[str, str]) -> list[Step]:
    """The steps of a log, in their order. `places` are the directories that count, none in another, each with its short
    name."""
    counts: Counter[tuple[str | None, str]] = Counter()
    found: list[Step] = []
    asked = ""  # of the root helper, which has not answered yet
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None or _AGAIN in line:
            continue
        call, rest = match["call"], match["rest"]
        counts[match["thread"], call] += 1
        if call == HEARING:
            what, asked = asked and f"{asked} has been sent", ""
        else:
            what = _what(call, rest, places) or ""
            asked = what if what.startswith(HELPER) else asked
        step = Step(call, counts[match["thread"], call], what)
        if step.what and step not in found:  # threads of a tool count for themselves: the first one to come there
            found.append(step)
    return found


def _what(call: str, rest: str, places: dict[str, str]) -> str | None:
    """What the call is about, in words that are the same in each run; None when it is no step."""
    if call in STARTING:
        return call
    if call in SAYING:
        lease = next((f"sanlock {name}" for first, name in _SANLOCK.items() if first in rest), None)
        asked = _CALL.search(rest)
        return lease or (f"{HELPER}: {asked[1]}" if asked else "agent" if _MESSAGE in rest else None)
    if call == "openat" and "O_CREAT" not in rest and "O_TRUNC" not in rest:
        return None
    for place, short in places.items():
        # a name, alone or behind the descriptor of its directory; or a descriptor, of the directory itself too
        found = re.search(rf'{re.escape(place)}(?:>, "|/)?(?P<path>[^">]*)[">]', rest)
        if found is not None:
            path = re.sub(r"(?<=ID)\..*", "", _UUID.sub("ID", found["path"]))
            return f"{short}/{path}"
        if place.startswith("/dev/") and (volume := _VOLUME.search(rest)):
            return f"{short}/{_part(volume[1], _AT.search(rest))}"
    return None


def _part(device: str, offset: re.Match[str] | None) -> str:
    """Of a volume: a slot's record, whatever else is in slots, or data."""
    name = Path("/sys/block", Path(device).name, "dm", "name")
    if not (name.read_text().strip() if name.exists() else device).endswith("-vdsm"):
        return "data"
    at = int(offset[1]) if offset else 0
    return RECORD if at > _SLOT_BYTES and at % _SLOT_BYTES >= _RECORD_OFFSET else "slots"


@contextlib.contextmanager
def attached(pid: int, log: Path, injected: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """strace on the main thread of a process that waits for something, until it ends or the block does."""
    told = log.with_suffix(".strace")
    with told.open("wb") as output:
        effect = ["-e", injected] if injected else []
        tracer = subprocess.Popen([*options(), *effect, "-o", log, "-p", str(pid)], stdout=output, stderr=output)
    try:
        until(lambda: b"attached" in told.read_bytes() or tracer.poll() is not None, _ATTACH_S)
        assert tracer.poll() is None, told.read_text()
        yield tracer
    finally:
        if running(pid):
            tracer.send_signal(signal.SIGINT)
        tracer.wait(_ATTACH_S)  # by itself, with the process, and not before its last words


def fails(kind: str) -> bool:
    """Whether what is injected is an errno; else it is a death."""
    return kind in (*ERRNOS, DAEMON_GONE)


def met(log: Path, failed: bool) -> bool:
    """Whether something was injected in the run whose log this is: a failure, or a death."""
    told = log.read_text(errors="replace") if log.exists() else ""
    if failed:
        return "(INJECTED)" in told
    return "+++ killed by SIGKILL +++" in told or told.endswith("= ?\n")


def tear(log: Path) -> None:
    """Does half of the write before which the process was killed: a block with nothing of sense in it."""
    *_, last = (line for line in log.read_text(errors="replace").splitlines() if line.startswith("pwrite"))
    path, offset = re.search(r"<(/[^<>]*)[<>]", last), re.search(r", (\d+)(?:, 0)?\) ", last)
    assert path is not None and offset is not None, last
    with Path(path[1]).open("r+b") as file:
        file.seek(int(offset[1]))
        file.write(b"torn" * 512)
        file.flush()
        os.fsync(file.fileno())  # other hosts may read it
