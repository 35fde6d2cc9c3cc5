"""Two real localfs repositories on a private sanlock, joined once for the whole session and empty for each test.

A test module that wants them says

    world, shelf = storage_fixture.world, storage_fixture.shelf    # repositories, as a child process sees them
    service = storage_fixture.service                              # the agent's side, with real children and jobs
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import supervdsm.client
from supervdsm import calls, contract
from tests import sanlock_fixture
from tests.until import until
from vdsm import config, events, forkserver, ids, leases, record, storage
from vdsm.jobs import job, pool, registry
from vdsm.storage import formats, repository
from vdsm.storage.rules import models
from vdsm.storage.steps import copyintents, intents, removal

Record = record.Record

HOST_NAME = "testhost"  # as the fixture's sanlock calls itself

W = TypeVar("W", bound="World")


def describe(place: Path, repo_id: str) -> repository.Description:
    return {
        **{"format": "localfs-1.0", "place": str(place), "name": "", "sector_bytes": 512, "host_id": 1},
        **{"repo_id": repo_id, "allowed_dirs": [str(place.parent)]},
    }


def content(known: Record, *names: str) -> Record:
    """A record without what each write changes, and without the fields `names`."""
    return {name: value for name, value in known.items() if name not in ("version", "writer", *names)}


def forge(slot: record.Slot, **said: Any) -> Record:
    """The slot's record, as if another writer had written it last: `said` is what that says of itself."""
    known = record.read(slot)
    forged = {**known, "writer": {**known["writer"], **said}}
    with Path(slot.path).open("r+b") as file:
        file.seek(slot.offset + record.RECORD_OFFSET + known["version"] % 2 * record.AREA_BYTES)
        file.write(record.encode(forged))
        os.fdatasync(file.fileno())
    return forged


class World:
    """`main` and `other` are repositories under `directory`, which also has room for files to import."""

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self.directory = directory
        self.run_dir = run_dir
        self.import_dir = directory / "import"
        self.export_dir = directory / "export"
        self.import_dir.mkdir()
        self.export_dir.mkdir()
        self.main, self.other = (self._made(name) for name in ("main", "other"))
        until(lambda: all(leases.state(repo.lockspace()) == "joined" for repo in (self.main, self.other)))

    def _made(self, name: str) -> repository.Repository:
        place = self.directory / name
        place.mkdir()
        repo = formats.open(describe(place, name))
        repo.format_(sanlock_fixture.IO_TIMEOUT_S)
        leases.join(repo.lockspace(), sanlock_fixture.IO_TIMEOUT_S)
        return repo

    def empty(self) -> None:
        """Takes away what a test left, whatever state it is in."""
        for repo in (self.main, self.other):
            for directory in ("images", "vms", "data"):
                for path in Path(repo.place, directory).iterdir():
                    path.unlink()


_entered = contextlib.ExitStack()
_shared: list[World] = []
_users = 0


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """One for all modules that have this fixture, from the first test that needs it to the end of the session."""
    global _users  # pytest makes a fixture of its own of each module's `world`
    if not _shared:
        _shared.append(_entered.enter_context(making_world(World)))
    _users += 1
    yield _shared[0]
    _users -= 1
    if not _users:
        _shared.clear()
        _entered.close()


@contextlib.contextmanager
def making_world(kind: type[W]) -> Iterator[W]:
    for program, package in (("sanlock", "sanlock python3-sanlock"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt install {package}")
    with sanlock_fixture.running() as daemon, tempfile.TemporaryDirectory(prefix="vdsm-storage-") as directory:
        yield kind(Path(directory), daemon.run_dir)


class Shelf:
    """A repository with a session of this process, and short words for what tests do with them."""

    def __init__(self, repo: repository.Repository, session: leases.Session) -> None:
        self.repo = repo
        self.session = session

    def disk(self, size_bytes: int = 1 << 20, **given: Any) -> str:
        """A new virtual disk's id."""
        asked = {"size_bytes": size_bytes, "base": None, "strategy": models.SPACE, "user_data": {}}
        argument = {"image_id": ids.new(), "digest": "a disk", **asked, **given}
        return str(intents.create_virtual_disk(self.repo, self.session, argument)["image_id"])

    def snapshot(self, disk_id: str, **given: Any) -> str:
        asked = {"image_id": ids.new(), "disk_id": disk_id, "generation": None, "user_data": {}, "digest": "a snapshot"}
        return str(intents.create_snapshot(self.repo, self.session, {**asked, **given})["image_id"])

    def begin_copy(self, **given: Any) -> dict[str, Any]:
        """A target that waits for its job."""
        asked = {"kind": models.DISK, "size_bytes": 1 << 20, "strategy": models.SPACE, "user_data": {}}
        told = {"digest": "a copy", "verb": "copyImage", "job_id": ids.new(), "source": {}}
        return copyintents.begin_copy(self.repo, self.session, {"image_id": ids.new(), **asked, **told, **given})

    def remove(self, image_id: str) -> list[str]:
        """Ids of what has left storage."""
        argument = {"image_id": image_id, "generation": None}
        return list(removal.remove_image(self.repo, self.session, argument)["cleaned"])

    def image(self, image_id: str) -> Record:
        return self.repo.get(image_id)

    def change(self, image_id: str, **fields: Any) -> Record:
        """Writes into the record what a test needs there."""
        return self.repo.update(self.session, image_id, lambda found: {**found, **fields})

    def data(self, image_id: str) -> Path:
        return Path(self.repo.data_path(self.image(image_id)["data"]["name"]))

    def write(self, image_id: str, pattern: int, offset: int = 0, length: int = 65536) -> None:
        """Writes bytes of `pattern` into a disk, as a guest would."""
        data_format = self.image(image_id)["data"]["format"]
        qemu_io(self.data(image_id), data_format, f"write -P {pattern} {offset} {length}")

    def shows(self, image_id: str, pattern: int, offset: int = 0, length: int = 65536) -> None:
        """Fails unless the image holds bytes of `pattern` there."""
        data_format = self.image(image_id)["data"]["format"]
        qemu_io(self.data(image_id), data_format, f"read -P {pattern} {offset} {length}")

    def files(self) -> set[str]:
        """Names of all slots and data, as "images/ID", "vms/ID", "data/NAME"."""
        place = Path(self.repo.place)
        return {f"{where}/{path.name}" for where in ("images", "vms", "data") for path in (place / where).iterdir()}


def qemu_io(path: Path, data_format: str, command: str) -> None:
    argv = ["qemu-io", "-f", data_format, "-c", command, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


@pytest.fixture
def shelf(world: World) -> Iterator[Shelf]:
    """The repository `main`."""
    sanlock_fixture.use(world.run_dir)  # other modules have daemons of their own
    with leases.Session() as session:
        yield Shelf(world.main, session)
        held = session.held()
    world.empty()
    assert held == set(), "a lease was left held"


def killed(act: Callable[[], object]) -> None:
    """Runs `act` in a process of its own, in which it must come to be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it was not killed"


def dies_before(target: object, name: str, call: int = 1) -> None:
    """For `act` of `killed`: the process dies when the function `name` of `target` is called for the `call`th time."""
    real, count = getattr(target, name), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(target, name, counted)


class Root(supervdsm.client.Helper):
    """The root helper where there is none: the directory for a new repository is there already."""

    def __init__(self) -> None:
        super().__init__("no helper")

    def call(self, call: contract.Call[contract.R]) -> contract.R:
        assert isinstance(call, calls.PrepareDirectory), call
        return calls.PreparedDirectory(call.path, created=False)  # type: ignore[return-value]


class Service:
    """Storage as the agent has it, with `main` and `other` connected."""

    def __init__(self, world: World, *preload: str) -> None:
        """`preload`: modules of tests that children and workers need, too."""
        self.world = world
        self.settings = config.Config(
            host=config.Host(id=1, name=HOST_NAME),
            storage=config.Storage(
                localfs_dirs=(str(world.directory),),
                import_dirs=(str(world.import_dir),),
                export_dirs=(str(world.export_dir),),
                io_deadline_s=10.0,
            ),
            sanlock=config.Sanlock(run_dir=str(world.run_dir), unsafe_no_watchdog=True),
        )
        self.events = events.EventLog()
        self.server = forkserver.ForkServer(["vdsm.jobs.worker", *storage.preload(), *preload], "WARNING")
        self.pool = pool.Pool(self.server, workers=2, lease_wait_s=2.0)
        self.jobs = registry.Registry(self.pool, self.events)
        helper = supervdsm.client.Helper(str(world.directory / "no helper"))
        self.storage = storage.Storage(self.settings, self.events, self.server, self.jobs, helper)

    @contextlib.contextmanager
    def running(self) -> Iterator["Service"]:
        self.storage.start()
        self.pool.start()
        try:
            for repo in (self.world.main, self.world.other):
                self.connect(Path(repo.place).name)
            yield self
        finally:
            assert self.pool.stop(10)
            self.storage.stop()
            self.server.stop()

    def connect(self, name: str, repo_id: str | None = None) -> str:
        """Connects the repository in the directory `name`; returns when it is joined."""
        repo_id = repo_id or name
        self.storage.connect_storage_repository(repo_id, "localfs-1.0", {"path": str(self.world.directory / name)})
        until(lambda: self.repository(repo_id)["state"] == "joined")
        return repo_id

    def repository(self, repo_id: str) -> dict[str, Any]:
        return next(found for found in self.storage.list_storage_repositories() if found["repo_id"] == repo_id)

    def ended(self, job_id: str, status: str = "done") -> job.Info:
        """The job as it has ended; fails unless that is as `status`."""
        info = self.jobs.wait(job_id, 60)
        assert info["status"] == status, info
        return info


@pytest.fixture(scope="module")
def service(world: World) -> Iterator[Service]:
    sanlock_fixture.use(world.run_dir)
    with Service(world).running() as running:
        yield running
