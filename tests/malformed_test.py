"""Image files from strangers, and data that guests and other programs have tampered with: refused or taken as what the
records say, and no other file of the host is ever opened for them. Traced with strace, in the processes that do it."""

import contextlib
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import conftest, storage_fixture
from tests.until import opened, running, until
from vdsm import errors, ids, record, standalone
from vdsm.client import transport

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service, World = storage_fixture.Shelf, storage_fixture.Service, storage_fixture.World

MIB, TIB = 1 << 20, 1 << 40
MARK = b"\x5e\xc2" * 512


class Trace:
    """What the traced processes have opened, connected to and executed since the last look."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._seen = 0

    def look(self) -> str:
        text = self._log.read_text(errors="replace")
        new, self._seen = text[self._seen :], len(text)
        return new


@contextlib.contextmanager
def tracing(pids: list[int], log: Path) -> Iterator[Trace]:
    """Follows these processes, and all that they start."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt install strace")
    calls = "trace=open,openat,openat2,connect,execve"
    command = ["strace", "-f", "-qq", "-e", calls, "-s", "400", "-o", str(log)]
    with subprocess.Popen([*command, *(word for pid in pids for word in ("-p", str(pid)))]) as tracer:
        try:
            until(lambda: all(traced(pid, tracer.pid) or not running(pid) for pid in pids))
            yield Trace(log)
        finally:
            tracer.terminate()


def traced(pid: int, tracer: int) -> bool:
    try:
        return f"TracerPid:\t{tracer}\n" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def trace(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trace]:
    server = service.server.pid
    with tracing([server, *children(server)], tmp_path_factory.mktemp("trace") / "calls") as found:
        yield found


@pytest.fixture
def secret(world: World) -> Iterator[Path]:
    """A file of the host, outside of the repositories and of what may be imported."""
    path = world.directory / "secret"
    path.write_bytes(MARK * (MIB // len(MARK)))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def file(world: World) -> Iterator[Path]:
    path = world.import_dir / ids.new()
    yield path
    path.unlink(missing_ok=True)


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def qcow2(path: Path, *options: object, size: object = "1M") -> None:
    qemu_img("create", "-q", "-f", "qcow2", *options, path, size)


def patched(offset: int, data: bytes) -> Callable[[Path, Path], None]:
    def make(path: Path, secret: Path) -> None:
        qcow2(path)
        with path.open("r+b") as image:
            image.seek(offset)
            image.write(data)

    return make


def backed(name: str) -> Callable[[Path, Path], None]:
    return lambda path, secret: qcow2(path, "-u", "-b", name.format(secret=secret), "-F", "raw")


def with_data_file(path: Path, secret: Path) -> None:
    qcow2(path, "-o", f"data_file={secret},data_file_raw=on")


def with_snapshot(path: Path, secret: Path) -> None:
    qcow2(path)
    qemu_img("snapshot", "-c", "inside", path)


def cut(length: int) -> Callable[[Path, Path], None]:
    def make(path: Path, secret: Path) -> None:
        qcow2(path)
        with path.open("r+b") as image:
            image.truncate(length)

    return make


def vmdk_text(path: Path, secret: Path) -> None:
    path.write_text(f'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 2048 FLAT "{secret}" 0\n')


JSON = '{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}'
# What is made, as what it is offered, and the reason that the caller is told.
HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "external data file": (with_data_file, "qcow2", "keeps its data in another file"),
    "absolute backing": (backed("{secret}"), "qcow2", "backing file, by the absolute name '.*secret'"),
    "relative backing": (backed("../secret"), "qcow2", "backing file, by the relative name '../secret'"),
    "described backing": (backed("json:" + JSON), "qcow2", "backing file, by the description 'json:"),
    "backing on the network": (backed("nbd://127.0.0.1:1/x"), "qcow2", "backing file, by the protocol name 'nbd:"),
    "called raw with a backing": (backed("{secret}"), "raw", "recognised as qcow2, not raw"),
    "text that names a file": (vmdk_text, "raw", "recognised as vmdk"),
    "63 TiB": (lambda path, secret: qcow2(path, size=63 * TIB), "qcow2", "its size is 69269232549888 bytes; the limit"),
    "huge L1 table": (patched(36, struct.pack(">I", 1 << 30)), "qcow2", "L1 table is too large"),
    "L1 table past the end": (patched(40, struct.pack(">Q", 1 << 40)), "qcow2", "L1 table reaches beyond the end"),
    "cut in the header": (cut(60), "qcow2", "cut short"),
    "cut in the tables": (cut(70_000), "qcow2", "beyond the end"),
    "empty": (lambda path, secret: path.write_bytes(b"") and None, "raw", "its size is 0 bytes"),
    "version 4": (patched(4, struct.pack(">I", 4)), "qcow2", "version 4 is not known"),
    "encrypted": (patched(32, struct.pack(">I", 1)), "qcow2", "encrypted"),
    "dirty": (patched(72, struct.pack(">Q", 1)), "qcow2", "marked dirty"),
    "corrupt": (patched(72, struct.pack(">Q", 2)), "qcow2", "marked corrupt"),
    "unknown feature": (patched(72, struct.pack(">Q", 1 << 40)), "qcow2", "unknown features"),
    "snapshot inside": (with_snapshot, "qcow2", "internal snapshots"),
    "no header": (lambda path, secret: path.write_bytes(bytes(MIB)) and None, "qcow2", "no qcow2 header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_with_the_reason_before_any_tool_sees_it(
    service: Service, shelf: Shelf, trace: Trace, file: Path, secret: Path, case: str
) -> None:
    make, claimed, reason = HOSTILE[case]
    make(file, secret)
    trace.look()
    with pytest.raises(errors.BadImageFile) as refused:
        service.storage.import_image("main", str(file), claimed)
    assert re.search(reason, refused.value.facts["reason"])
    done = trace.look()
    assert str(file) in done, "the trace misses what was done"
    assert str(secret) not in done and "execve" not in done and "AF_INET" not in done
    assert shelf.files() == set()


def test_trace_shows_what_a_careless_tool_would_open(secret: Path, file: Path, tmp_path: Path) -> None:
    backed("{secret}")(file, secret)
    words = ["sh", "-c", "read go; exec qemu-img info --backing-chain $0", str(file)]
    with (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as careless,
        tracing([careless.pid], tmp_path / "calls") as trace,
    ):
        careless.communicate(b"go\n")
        assert f'"{secret}"' in trace.look()


def test_good_file_is_imported_and_only_that_is_opened(
    service: Service, shelf: Shelf, trace: Trace, file: Path, secret: Path
) -> None:
    qcow2(file)
    trace.look()
    service.ended(service.storage.import_image("main", str(file), "qcow2")["job_id"])
    done = trace.look()
    assert "qemu-img" in done and str(secret) not in done


# -- data that was tampered with -------------------------------------------------------------------------------------


def guest_wrote_a_header(shelf: Shelf, secret: Path) -> str:
    """A raw disk whose guest wrote the header of an image on a backing file into its first sectors."""
    disk = shelf.disk(strategy="performance")
    bait = secret.with_name("bait")
    qcow2(bait, "-u", "-b", secret, "-F", "raw")
    with shelf.data(disk).open("r+b") as guest:
        guest.write(bait.read_bytes())
    bait.unlink()
    return disk


def header_was_rewritten(shelf: Shelf, secret: Path) -> str:
    """A disk on a snapshot, whose header says that it lies on something else."""
    disk = shelf.disk()
    shelf.snapshot(disk)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", shelf.data(disk))
    return disk


TAMPERED = {"guest wrote a header": guest_wrote_a_header, "header was rewritten": header_was_rewritten}

Act = Callable[[Service, Shelf, World, str], object]
ACTS: dict[str, Act] = {
    "copied": lambda service, shelf, world, disk: service.ended(service.storage.copy_image("other", disk)["job_id"]),
    "copied for speed": lambda service, shelf, world, disk: service.ended(
        service.storage.copy_image("other", disk, options={"strategy": "performance"})["job_id"]
    ),
    "copied onto a base": lambda service, shelf, world, disk: service.ended(
        service.storage.copy_image("main", disk, base_image_id=shelf.disk())["job_id"]
    ),
    "base of a copy": lambda service, shelf, world, disk: service.ended(
        service.storage.copy_image("main", shelf.disk(), base_image_id=disk)["job_id"]
    ),
    "snapshotted": lambda service, shelf, world, disk: service.storage.create_snapshot("main", disk),
    "exported": lambda service, shelf, world, disk: service.ended(
        service.storage.export_image("main", disk, str(world.export_dir / disk), "qcow2")["job_id"]
    ),
    "resized": lambda service, shelf, world, disk: service.storage.resize_virtual_disk("main", disk, 2 * MIB),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_data_leads_nowhere(
    service: Service, shelf: Shelf, world: World, trace: Trace, secret: Path, how: str, act: str
) -> None:
    disk = TAMPERED[how](shelf, secret)
    name = shelf.data(disk).name
    trace.look()
    ACTS[act](service, shelf, world, disk)
    done = trace.look()
    assert name in done, "the trace misses what was done"
    assert str(secret) not in done
    for left in world.export_dir.iterdir():
        left.unlink()


def test_running_guest_is_given_no_other_file(
    stack: standalone.Stack, agent: transport.Client, repo: str, images: conftest.Images, machines: conftest.Machines
) -> None:
    """QEMU holds open what it was given; a backing file that a header names would be among that."""
    raw, overlay = images.disk(options={"strategy": "performance"}), images.disk()
    images.snapshot(overlay)
    place = stack.storage_dir / repo
    secret, bait = stack.storage_dir / "secret", stack.storage_dir / "bait"
    secret.write_bytes(MARK)
    secret.chmod(0o666)
    qcow2(bait, "-u", "-b", secret, "-F", "raw")
    with data(place, raw).open("r+b") as guest:
        guest.write(bait.read_bytes())
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", data(place, overlay))
    try:
        vm_id = machines.started(disks=[{"imageId": image_id, "repoId": repo} for image_id in (raw, overlay)])
        pid = agent.call("VM.getInfo", {"vmID": vm_id})["pid"]
        held = opened(pid)
        assert {str(data(place, image_id)) for image_id in (raw, overlay)} <= held
        assert str(secret) not in held
    finally:
        secret.unlink()
        bait.unlink()


def data(place: Path, image_id: str) -> Path:
    known = record.read(record.Slot("", image_id, str(place / "images" / image_id), 0))
    return place / "data" / known["data"]["name"]
