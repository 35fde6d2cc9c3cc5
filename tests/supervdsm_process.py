"""Real root helpers for tests: processes on temporary sockets, and raw connections to them."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Users and groups that every Debian has: one plays the agent, one somebody else.
AGENT, AGENT_GROUP, STORAGE_GROUP, STRANGER = "daemon", "daemon", "sys", "nobody"
AGENT_UID, STRANGER_UID = pwd.getpwnam(AGENT).pw_uid, pwd.getpwnam(STRANGER).pw_uid
LENGTH = struct.Struct("!I")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the root helper needs root: run the tests as root")


def until(true: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Polls until `true()` is, and returns it."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return value


class Process:
    """A helper that runs. `place` holds its socket, its audit trail and the directory `data` for repositories."""

    def __init__(self, place: Path, program: Sequence[str] = ("-m", "supervdsm"), more: Sequence[str] = ()) -> None:
        self.place = place
        self.socket = str(place / "svdsm.sock")
        self.trail = place / "audit"
        self.data = place / "data"
        self.data.mkdir(exist_ok=True)
        command = [sys.executable, "-P", *program, *arguments(place), *more]
        self.process = subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)

    def ready(self) -> "Process":
        until(lambda: self.answers() or self.process.poll() is not None, "the helper starts")
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        return self

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as link:
            return link.connect_ex(self.socket) == 0

    def lines(self) -> list[dict[str, Any]]:
        """The audit trail."""
        return [json.loads(line) for line in self.trail.read_text().splitlines()]

    def children(self) -> list[int]:
        return descendants(self.process.pid)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            if self.process.stderr:
                self.process.stderr.close()


def arguments(place: Path) -> list[str]:
    users = ["--user", AGENT, "--group", AGENT_GROUP, "--storage-group", STORAGE_GROUP]
    files = ["--socket", str(place / "svdsm.sock"), "--audit", str(place / "audit")]
    return [*users, *files, "--localfs-dir", str(place / "data")]


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A directory that all users can enter, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="supervdsm-test-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def running(program: Sequence[str] = ("-m", "supervdsm")) -> Iterator[Process]:
    """A helper that must end by SIGTERM and leave no process."""
    with place() as directory:
        helper = Process(directory, program)
        try:
            yield helper.ready()
        finally:
            status, left = helper.stop(), helper.children()
        assert (status, left) == (0, [])


def extended(**limits: Any) -> tuple[str, ...]:
    """The program of a helper with calls that misbehave and other limits: see `supervdsm_extended.py`."""
    return (str(ROOT / "tests/supervdsm_extended.py"), json.dumps(limits))


def connect(path: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(10)
    link.connect(path)
    return link


def frame(document: Any) -> bytes:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return LENGTH.pack(len(payload)) + payload


def reply(link: socket.socket) -> dict[str, Any]:
    """What the helper answers on this connection."""
    with link.makefile("rb") as stream:
        document = json.loads(stream.read(LENGTH.unpack(stream.read(4))[0]))
    assert isinstance(document, dict)
    return document


def ask(path: str, sent: bytes) -> dict[str, Any]:
    """The answer to these raw bytes."""
    with connect(path) as link:
        with contextlib.suppress(ConnectionError):  # answered before it was read
            link.sendall(sent)
        return reply(link)


def call(socket_path: str, name: str, /, **arguments: Any) -> dict[str, Any]:
    return ask(socket_path, frame({"call": name, "arguments": arguments}))


def error(kind: str, reason: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "reason": reason}}
