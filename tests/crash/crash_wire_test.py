"""Each verb through the wire, on the whole stack: whoever works for it is killed before one of its record writes.

Which step of which process that is, is left to `matrix.py`'s cases; here it is the agent that has to live with it, tell
its caller, and offer what mends it.
"""

import contextlib
import hashlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from tests.crash import outside, places
from tests.until import running, until
from vdsm import ids, standalone
from vdsm.client import failures

ZEROS_OF = 1 << 20
CONTENT = b"\x5a" * 4096 + bytes(ZEROS_OF - 8192) + b"\xa5" * 4096


class Wire:
    """A disk with known content in the session's repository, and what happens to it. `allowed` are the states, other
    than the one before, that an image may be in afterwards; None: it is not there."""

    def __init__(self, stack: standalone.Stack, images: conftest.Images, machines: conftest.Machines) -> None:
        self.client = images.client
        self.stack = stack
        self.repo = images.repo_id
        self.images = images
        self.machines = machines
        self.place = places.Files(stack.storage_dir / images.repo_id)
        self.disk = images.bytes(CONTENT)
        self.new = ids.new()
        self.write = 1
        self.allowed: dict[str, list[dict[str, Any] | None]] = {}

    def shown(self) -> dict[str, Any]:
        return outside.shown(self.place)

    def call(self, verb: str, **params: Any) -> None:
        """Calls while whoever works for it is killed, and waits for the job if there is one."""
        with killing(self.stack, self.write) as killed, contextlib.suppress(failures.ClientError):
            answer = self.client.call(verb, params) or {}
            if answer.get("jobId"):
                conftest.wait_job(self.client, answer["jobId"])
        assert killed, "nobody has come so far"

    def fix_all(self) -> None:
        for _ in range(8):
            found = self.client.call("Storage.checkStorageRepository", {"repositoryId": self.repo})
            if not found:
                return
            for fix in found:
                started = self.client.call("Storage.fixStorageRepository", {"repositoryId": self.repo, "fix": fix})
                if started["jobId"]:
                    conftest.done(self.client, started["jobId"])
        raise AssertionError(f"there is still something to fix: {found}")

    def vm(self) -> str:
        """A VM that has run on the disk and runs no more."""
        given = {"disks": [{"imageId": self.disk, "repoId": self.repo}], "leaseRepoId": self.repo}
        vm_id = self.machines.started(**given)
        self.machines.destroy(vm_id)
        return vm_id


def _create(wire: Wire) -> None:
    wire.allowed[wire.new] = [_image("disk", bytes(ZEROS_OF)), None]
    wire.call("Storage.createVirtualDisk", targetRepoId=wire.repo, size=ZEROS_OF, options={"imageId": wire.new})


def _snapshot(wire: Wire) -> None:
    wire.allowed[wire.new] = [_image("snapshot", CONTENT), None]
    given = {"targetRepoId": wire.repo, "baseVirtualDiskId": wire.disk, "options": {"imageId": wire.new}}
    wire.call("Storage.createSnapshot", **given)


def _copy(wire: Wire) -> None:
    wire.allowed[wire.new] = [_image("disk", CONTENT), None]
    given = {"targetRepoId": wire.repo, "imageId": wire.disk, "options": {"imageId": wire.new}}
    wire.call("Storage.copyImage", **given)


def _import(wire: Wire) -> None:
    wire.allowed[wire.new] = [_image("disk", CONTENT), None]
    path = wire.images.import_dir / f"{wire.new}.raw"
    path.write_bytes(CONTENT)
    path.chmod(0o644)
    given = {"targetRepoId": wire.repo, "path": str(path), "format": "raw", "options": {"imageId": wire.new}}
    wire.call("Storage.importImage", **given)


def _remove(wire: Wire) -> None:
    wire.allowed[wire.disk] = [None]
    wire.call("Storage.removeImage", repositoryId=wire.repo, imageId=wire.disk)


def _set_user_data(wire: Wire) -> None:
    wire.allowed[wire.disk] = [{**_image("disk", CONTENT), "user_data": {"set": 1}}]
    given = {"repositoryId": wire.repo, "imageId": wire.disk, "userData": {"set": 1}}
    wire.call("Storage.setImageUserData", **given)


def _resize(wire: Wire) -> None:
    wire.allowed[wire.disk] = [_image("disk", CONTENT + bytes(ZEROS_OF))]
    given = {"repositoryId": wire.repo, "imageId": wire.disk, "size": 2 * ZEROS_OF}
    wire.call("Storage.resizeVirtualDisk", **given)


def _sysprep(wire: Wire) -> None:
    """It is killed before virt-sysprep would find that this is no guest."""
    wire.call("VM.sysprep", vmID=wire.vm(), leaseRepoId=wire.repo)


def _make_template(wire: Wire) -> None:
    given = {"vmID": wire.vm(), "leaseRepoId": wire.repo, "options": {"imageIds": {wire.disk: wire.new}}}
    wire.call("VM.makeTemplate", **given)


def _merge(wire: Wire) -> None:
    made = wire.images.snapshot(wire.disk)
    wire.images.remove(made)
    fixes = wire.client.call("Storage.checkStorageRepository", {"repositoryId": wire.repo})
    (fix,) = [fix for fix in fixes if fix["type"] == "merge"]
    wire.call("Storage.fixStorageRepository", repositoryId=wire.repo, fix=fix)


def _image(kind: str, content: bytes) -> dict[str, Any]:
    found = hashlib.sha256(content).hexdigest()
    return {"kind": kind, "size_bytes": len(content), "user_data": {}, "content": found}


@pytest.fixture
def wire(stack: standalone.Stack, images: conftest.Images, machines: conftest.Machines) -> Iterator[Wire]:
    made = Wire(stack, images, machines)
    images.made.append(made.new)
    yield made


def forked(stack: standalone.Stack) -> list[str]:
    """Pids of the agent's fork server and all that it has forked."""

    def children(pid: str) -> list[str]:
        return " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()

    def is_server(pid: str) -> bool:
        return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()

    (server,) = [pid for pid in children(str(stack.agent_pid)) if is_server(pid)]
    return [server, *children(server)]


@contextlib.contextmanager
def killing(stack: standalone.Stack, write: int) -> Iterator[list[str]]:
    """Inside the block every process that writes a record dies before its `write`-th; afterwards the list says which
    have."""
    killed: list[str] = []
    with tempfile.NamedTemporaryFile() as log, tempfile.NamedTemporaryFile() as told:
        effect = f"inject=pwritev2:signal=SIGKILL:when={write}"
        pids = forked(stack)
        attach = [word for pid in pids for word in ("-p", pid)]
        command = ["strace", "-f", "-o", log.name, "-e", "trace=pwritev2", "-e", effect, *attach]
        tracer = subprocess.Popen(command, stdout=told, stderr=told)

        def attached(pid: str) -> bool:
            return f"Process {pid} attached".encode() in Path(told.name).read_bytes() or not running(int(pid))

        try:
            until(lambda: all(attached(pid) for pid in pids), 60)
            yield killed
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(60)
            # A write that has not returned: its process is dead, also when the tracer went before it could say so.
            signs = ("killed by SIGKILL", "= ?", "<detached", "<unfinished")
            killed += [line for line in Path(log.name).read_text().splitlines() if any(sign in line for sign in signs)]


VERBS = (_create, _snapshot, _copy, _import, _remove, _resize, _sysprep, _make_template, _merge)


@pytest.mark.parametrize(
    ("act", "write"),
    [(_set_user_data, 1), *((act, write) for act in VERBS for write in (1, 2))],
    ids=lambda value: value if isinstance(value, int) else value.__name__.strip("_"),
)
def test_verb_whose_worker_is_killed_leaves_nothing_that_fixes_do_not_settle(
    wire: Wire, act: Callable[[Wire], None], write: int
) -> None:
    before, wire.write = wire.shown(), write
    act(wire)
    wire.fix_all()
    after = wire.shown()
    for image_id in before.keys() | after.keys() | wire.allowed.keys():
        assert after.get(image_id) in [before.get(image_id), *wire.allowed.get(image_id, [])], image_id
    mine = {wire.disk, wire.new}
    assert [stray for stray in outside.strays(wire.place) if any(known in stray for known in mine)] == []
    if wire.new not in after:
        wire.images.made.remove(wire.new)
    if wire.disk not in after:
        wire.images.made.remove(wire.disk)
