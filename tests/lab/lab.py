"""The lab itself: a directory, the networks, the hosts. See `tests.lab` for what it is."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.lab import host, network
from vdsm.standalone import ground, layout

# On a real file system, for O_DIRECT; a host's users must be able to pass, and a host has a /tmp of its own.
PLACE = Path("/var/tmp")
PREFIX = "vdsm-lab-"
MIB = 1 << 20
PROGRAMS = ("linux.uml", "ip", "socat", "dmsetup", "iscsid", "multipathd", "rpc.nfsd", "rpcbind", "sanlock", "lvmlockd")
# The fourth has just room for the volume that holds a shared volume group's locks: data is on another one then. The
# last two are for volume groups.
LUNS_MIB = (256, 256, 256, 292, 1024, 512)


# What the kernel says when it has no root file system, and how long (seconds) it may take to find out.
ROOTLESS, KERNEL_S = "VFS: Unable to mount root fs", 60


def missing() -> str | None:
    """What this machine lacks for a lab, and how to get it; None when there can be one."""
    if os.geteuid() != 0:
        return "a lab needs root, for its network namespace"
    absent = [program for program in PROGRAMS if shutil.which(program, path=ground.PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed: run vdsm/tool/prerequisites.sh lab"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: in a container, run it with --device /dev/net/tun"
    return _kernel_refused()


def _kernel_refused() -> str | None:
    """What it says about the machine when it is booted with nothing on it. It has tried everything that it needs by the
    time it misses its root file system, which ends it; that takes a second."""
    with tempfile.TemporaryDirectory() as empty:
        argv = ["linux.uml", "mem=64M", "con=null", "con0=null,fd:2", f"uml_dir={empty}"]
        environment = {"PATH": ground.PATH, "TMPDIR": str(_memory_dir(Path(empty), 64))}
        ended = subprocess.run(
            ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            timeout=KERNEL_S,
            check=False,
        )
    lines = ended.stdout.splitlines() or ["nothing"]
    return (
        None if any(ROOTLESS in line for line in lines) else f"linux.uml does not run here; its last word: {lines[-1]}"
    )


class Lab:
    """A context manager. `hosts` of `memory_mib` each; all see the same LUNs, one for each of `luns_mib`.

    Call it in a thread that lives as long as the lab: the hosts end with the thread that started them.
    """

    def __init__(self, hosts: int = 2, memory_mib: int = 512, luns_mib: Sequence[int] = LUNS_MIB) -> None:
        self._count = hosts
        self._memory_mib = memory_mib
        self._luns_mib = tuple(luns_mib)
        self._stack = contextlib.ExitStack()
        self.hosts: list[host.Host] = []

    @property
    def directory(self) -> Path:
        """Consoles, sockets, LUNs. Valid from start to stop."""
        return self._directory

    def start(self) -> Self:
        """Returns when all hosts take commands. Raises `HostError`, and then nothing is left."""
        remove_abandoned()
        with contextlib.ExitStack() as stack:
            self._directory = stack.enter_context(_directory())
            place = layout.Layout(self._directory)
            _install_inside(place)
            net = network.Network()
            stack.callback(net.stop)
            net.start(self._count)
            machine = host.Machine(
                directory=self._directory,
                network=net,
                hosts=self._count,
                memory_mib=self._memory_mib,
                memory_dir=_memory_dir(self._directory, self._count * self._memory_mib),
                luns=tuple(self._make_lun(number, size) for number, size in enumerate(self._luns_mib)),
                code=place.code,
            )
            self.hosts = [host.Host(machine, number) for number in range(1, self._count + 1)]
            for one in self.hosts:
                stack.callback(one.close)
                one.start()
            with ground.usual_umask():
                ground.install_code(place)  # while they boot
            for one in self.hosts:
                one.wait()
            self._stack = stack.pop_all()
        return self

    def stop(self) -> None:
        self._stack.close()
        self.hosts = []

    def mend(self) -> None:
        """Every host alive, connected, its LUNs sound. Daemons and mounts stay."""
        for one in self.hosts:
            one.mend()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _make_lun(self, number: int, size_mib: int) -> Path:
        path = self._directory / f"lun{number}"
        with path.open("wb") as file:
            file.truncate(size_mib * MIB)
        return path


def _install_inside(place: layout.Layout) -> None:
    """What the lab itself runs in its hosts."""
    with ground.usual_umask():
        inside = place.code / "tests" / "lab" / "inside"
        shutil.copytree(Path(__file__).parent / "inside", inside, ignore=shutil.ignore_patterns("__pycache__"))


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Locked as long as its owner lives, from before anything is in it."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PLACE))
    path.chmod(0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        shutil.rmtree(path)
        os.close(fd)


def remove_abandoned() -> None:
    """Directories of labs whose process was killed; nothing of them runs any more."""
    for path in PLACE.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # somebody else removes it, or it is in use
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if any(path.iterdir()):  # an empty one is being made
                    shutil.rmtree(path)
            finally:
                os.close(fd)


def _memory_dir(directory: Path, wanted_mib: int) -> Path:
    """Where the hosts' memory is, a sparse file without a name. A container's /dev/shm may be too small for it."""
    shm = Path("/dev/shm")
    with contextlib.suppress(FileNotFoundError):
        if shutil.disk_usage(shm).free > wanted_mib * MIB:
            return shm
    return directory
