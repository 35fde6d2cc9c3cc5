"""What the tests share: one standalone stack for the session, one repository in it, joined once.

Tests that need the stack ask for `stack`, `agent` (a client of it) or `repo`. They leave it as they found it: what a
test makes, it removes, also when it fails.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import certificates
from tests.until import running, state, until
from tests.wire_fixture import free_port
from vdsm import ids, standalone
from vdsm.client import failures, transport
from vdsm.standalone import ground, layout
from vdsm.tool import guestimage

MAIN = "main"  # the session's repository
collect_ignore = ["lab"]  # a run of its own, which names it: that counts more

JOIN_S = 30.0
MEMORY_MIB = 64  # of guests without guest code
STACK = {"stack", "agent", "repo"}
DAEMONS = {*STACK, "world", "storage", "ground", "host", "service"}  # fixtures on private daemons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the stack says so by its fixtures; nobody has to remember a marker. Files with real guests come first,
    then those with real daemons: they take longest, and the others fill what is left of the other processes' time."""
    for item in items:
        if STACK & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.stack)
    ranks: dict[Path, int] = {}
    for item in items:
        ranks[item.path] = min(ranks.get(item.path, 2), _rank(item))
    items.sort(key=lambda item: ranks[item.path])


def _rank(item: pytest.Item) -> int:
    if item.get_closest_marker("guest"):
        return 0
    return 1 if DAEMONS & set(getattr(item, "fixturenames", ())) else 2


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    """Signs the certificate of the stack's agent, which has it in the stack's run directory."""
    return certificates.Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stack(authority: certificates.Authority) -> Iterator[standalone.Stack]:
    if os.geteuid() != 0:
        pytest.skip("the standalone stack needs root")

    def secure(place: layout.Layout) -> ground.Overrides:
        directory = place.run_dir / "tls"
        directory.mkdir()
        certificates.install(authority, directory, owner=ground.USER)
        return {"tls": dataclasses.asdict(certificates.settings(directory, free_port(), check_s=3600.0))}

    overrides = {"jobs": {"workers": 4}, "log": {"level": "DEBUG"}, "virt": {"sample_s": 2.0}}
    with standalone.Stack(tcp=True, overrides=overrides, prepare=secure) as started:
        yield started


@pytest.fixture(autouse=True)
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    """The session's agent serves after each test, also after one that killed it and then failed: the tests that follow
    find what they expect."""
    shared = request.getfixturevalue("stack") if "stack" in request.fixturenames else None
    yield
    if shared is not None:
        with serving(shared):
            pass


@contextlib.contextmanager
def serving(stack: standalone.Stack) -> Iterator[transport.Client]:
    """A new connection to the session's agent, which is started if it does not run, and gets its repository back."""
    if not running(stack.agent_pid):
        stack.start_agent()
    with transport.connect(str(stack.socket_path)) as client:
        known = [found["repoId"] for found in client.call("Storage.listStorageRepositories")]
        if MAIN not in known and (stack.storage_dir / MAIN / "repository").exists():
            reconnect_repository(stack, MAIN)
        yield client


@pytest.fixture
def agent(stack: standalone.Stack) -> Iterator[transport.Client]:
    with transport.connect(str(stack.socket_path)) as client:
        yield client


@pytest.fixture(scope="session")
def repo(stack: standalone.Stack) -> str:
    """The id of a connected repository that has joined its lockspace. The stack's end is its end."""
    return connect_repository(stack, MAIN)


def connect_repository(stack: standalone.Stack, repo_id: str) -> str:
    parameters = {"path": str(stack.storage_dir / repo_id)}
    with transport.connect(str(stack.socket_path)) as client:
        client.call(
            "Storage.formatStorageRepository",
            {"repoFormat": "localfs-1.0", "connectionParameters": parameters, "options": {"ioTimeout": 2}},
        )
        client.call(
            "Storage.connectStorageRepository",
            {"repoId": repo_id, "repoFormat": "localfs-1.0", "connectionParameters": parameters},
        )
        until(lambda: repository(client, repo_id)["state"] == "joined", JOIN_S)
    return repo_id


def reconnect_repository(stack: standalone.Stack, repo_id: str) -> None:
    """After a restart of the agent: what is connected is transient."""
    parameters = {"path": str(stack.storage_dir / repo_id)}
    with transport.connect(str(stack.socket_path)) as client:
        client.call(
            "Storage.connectStorageRepository",
            {"repoId": repo_id, "repoFormat": "localfs-1.0", "connectionParameters": parameters},
        )
        until(lambda: repository(client, repo_id)["state"] == "joined", JOIN_S)


def end_domain(stack: standalone.Stack, vm_id: str) -> None:
    """Ends the VM behind the agent's back."""
    subprocess.run(["virsh", "-c", stack.place.libvirt_uri, "destroy", vm_id], check=True, capture_output=True)


def holders(stack: standalone.Stack, lease_id: str) -> list[int]:
    """Processes that hold the lease, as the stack's sanlock says."""
    environment = {**os.environ, "SANLOCK_RUN_DIR": str(stack.place.sanlock)}
    command = ["sanlock", "client", "status", "-o", "p"]
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line.rpartition(" p ") for line in listing.splitlines() if f":{lease_id}:" in line]
    return [int(pid) for _, _, pid in lines if pid.isdigit()]


@contextlib.contextmanager
def stopped_copy(stack: standalone.Stack, image_id: str) -> Iterator[int]:
    """The pid of the qemu-img that fills the image, stopped: the copy comes to no end by itself, however fast."""
    found: list[int] = []

    def stopped() -> bool:
        for worker in holders(stack, image_id):
            for children in Path(f"/proc/{worker}/task").glob("*/children"):
                for pid in map(int, children.read_text().split()):
                    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                        # Not on the way to it: its worker would still wait for the exec, deaf to everything.
                        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"qemu-img\0convert\0"):
                            os.kill(pid, signal.SIGSTOP)
                            found.append(pid)
        return bool(found) and state(found[-1]) == "T"

    until(stopped)
    try:
        yield found[-1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[-1], signal.SIGCONT)


def repository(client: transport.Client, repo_id: str) -> dict[str, Any]:
    found = client.call("Storage.listStorageRepositories")
    return next(known for known in found if known["repoId"] == repo_id)


class Images:
    """Makes images in a repository, and removes what is left of them."""

    def __init__(self, client: transport.Client, repo_id: str, import_dir: Path) -> None:
        self.client = client
        self.repo_id = repo_id
        self.import_dir = import_dir
        self.made: list[str] = []

    def disk(self, size: int = 1 << 20, **params: Any) -> str:
        answer = self.client.call("Storage.createVirtualDisk", {"targetRepoId": self.repo_id, "size": size, **params})
        return self._made(answer)

    def snapshot(self, disk: str, **params: Any) -> str:
        given = {"targetRepoId": self.repo_id, "baseVirtualDiskId": disk, **params}
        return self._made(self.client.call("Storage.createSnapshot", given))

    def imported(self, path: Path, format: str = "raw", **params: Any) -> str:
        """The disk that holds what the file `path` of the import directory does; waits for the job."""
        given = {"targetRepoId": self.repo_id, "path": str(path), "format": format, **params}
        answer = self.client.call("Storage.importImage", given)
        self.made.append(answer["imageId"])
        done(self.client, answer["jobId"])
        return str(answer["imageId"])

    def bytes(self, content: bytes) -> str:
        """A disk with this content."""
        path = self.import_dir / f"{ids.new()}.raw"
        path.write_bytes(content)
        path.chmod(0o644)
        try:
            return self.imported(path)
        finally:
            path.unlink()

    def status(self, image_id: str) -> dict[str, Any]:
        found = self.client.call("Storage.getImageStatus", {"repositoryId": self.repo_id, "imageId": image_id})
        return dict(found)

    def ids(self) -> set[str]:
        found = self.client.call("Storage.listImages", {"repositoryId": self.repo_id})
        return {image["imageId"] for image in found}

    def remove(self, image_id: str) -> None:
        self.client.call("Storage.removeImage", {"repositoryId": self.repo_id, "imageId": image_id})

    def clean_up(self) -> None:
        for image_id in reversed(self.made):
            if image_id in self.ids():
                self.remove(image_id)

    def _made(self, answer: dict[str, Any]) -> str:
        self.made.append(answer["imageId"])
        return str(answer["imageId"])


@pytest.fixture
def images(agent: transport.Client, repo: str, stack: standalone.Stack) -> Iterator[Images]:
    made = Images(agent, repo, stack.import_dir)
    yield made
    with serving(stack) as made.client:
        made.clean_up()


class Machines:
    """Makes VMs, and ends what is left of them."""

    def __init__(self, client: transport.Client) -> None:
        self.client = client
        self.made: list[str] = []

    def create(self, *, vmId: str | None = None, **spec: Any) -> str:
        """A VM whose start has begun; without guest code unless `spec` says otherwise."""
        vm_id = vmId or ids.new()
        given = {"vmId": vm_id, "memory": MEMORY_MIB, "agentChannel": False, "consoleLog": False, **spec}
        self.client.call("VM.create", {"vmParams": given})
        self.made.append(vm_id)
        return vm_id

    def started(self, **spec: Any) -> str:
        vm_id = self.create(**spec)
        self.wait(vm_id, "Up")
        return vm_id

    def status(self, vm_id: str) -> str:
        return str(self.info(vm_id)["status"])

    def info(self, vm_id: str) -> dict[str, Any]:
        return dict(self.client.call("VM.getInfo", {"vmID": vm_id}))

    def wait(self, vm_id: str, status: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Waits for the state; a VM that goes Down instead fails the test with its reason."""

        def there() -> bool:
            info = self.info(vm_id)
            assert info["status"] in (status, "Down") or info["status"] != "Down", info
            assert info["status"] != "Down" or status == "Down", info
            return bool(info["status"] == status)

        until(there, timeout_s)
        return self.info(vm_id)

    def destroy(self, vm_id: str) -> None:
        self.client.call("VM.destroy", {"vmID": vm_id})
        self.made.remove(vm_id)

    def clean_up(self) -> None:
        known = self.client.call("Host.getVMList")
        for vm_id in [vm_id for vm_id in self.made if vm_id in known]:
            self.destroy(vm_id)


@pytest.fixture
def machines(agent: transport.Client, stack: standalone.Stack) -> Iterator[Machines]:
    made = Machines(agent)
    yield made
    with serving(stack) as made.client:
        made.clean_up()


def wait_job(client: transport.Client, job_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """The job's info once it has ended."""
    info = client.call("Job.wait", {"jobId": job_id, "timeout": timeout_s}, timeout_s + 10)
    assert info["ended"], f"not ended within {timeout_s} s: {info}"
    return dict(info)


def done(client: transport.Client, job_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """The job's info; the test fails when it is not done."""
    info = wait_job(client, job_id, timeout_s)
    assert info["status"] == "done", info
    return info


def abort(client: transport.Client, job_id: str) -> None:
    """Asks for the abort of a job that may have ended meanwhile."""
    try:
        client.call("Job.abort", {"jobId": job_id})
    except failures.ClientError as error:
        assert error.data["key"] == "job_not_active"


@pytest.fixture(scope="session")
def guest() -> guestimage.GuestImage:
    """The real Debian guest, built once and cached."""
    return guestimage.build(guestimage.default_cache())


@pytest.fixture(scope="session")
def boot_files(stack: standalone.Stack, guest: guestimage.GuestImage) -> dict[str, str]:
    """directKernel of VMs that boot the real guest."""
    for name, path in {"kernel": guest.kernel_path, "initrd": guest.initrd_path}.items():
        shutil.copyfile(path, stack.place.boot / name)
    place = stack.place.boot
    return {"kernel": f"{place}/kernel", "initrd": f"{place}/initrd", "cmdline": "root=LABEL=root console=ttyS0 quiet"}
