"""Guests for the demo and the tests, built from the distribution's own packages and cached.

- `build`: Debian on a disk of 1 GiB, booted directly (kernel, initial ramdisk, `root=LABEL=root console=ttyS0`).
- `build_data_disk`: a second disk for it, with a file system labelled DATA that the guest mounts on /data.
- `build_tiny`: a kernel and an initial ramdisk that say one line, and switch off at the power button.

Each is made under a temporary name in the cache and renamed when it is complete, so a build that is killed leaves
nothing that looks like a guest; the next one sweeps it up. Nothing is mounted in the machine's own namespace. Builders
on one cache wait for each other. Runs as root.

    python3 -m vdsm.tool.guestimage     builds all three and says where they are
"""

import contextlib
import fcntl
import gzip
import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vdsm import errors, logs, programs, sizes
from vdsm.standalone import ground
from vdsm.tool import guestrecipe

DISK_BYTES = 1 * sizes.GIB
PARTITION_START = 1 * sizes.MIB
# The end of the disk is left to a backup partition table.
PARTITION_BYTES = DISK_BYTES - 2 * sizes.MIB
DATA_DISK_BYTES = 64 * sizes.MIB
# Two minutes with a near mirror; a far one may take its time.
BOOTSTRAP_S = 1800.0
TOOL_S = 300.0

log = logs.get("tool.guestimage")


class GuestImage(NamedTuple):
    """A real guest: a raw disk of 1 GiB, and what boots it. Copy the disk before use; the cache is shared."""

    disk_path: Path
    kernel_path: Path
    initrd_path: Path
    hash: str


class TinyGuest(NamedTuple):
    """A guest without disk. `guestrecipe.TINY_GREETING` on its console says that it runs."""

    kernel_path: Path
    initrd_path: Path
    hash: str


class Kernel(NamedTuple):
    """A kernel of this machine, as installed by its package."""

    release: str

    @property
    def image(self) -> Path:
        return Path(f"/boot/vmlinuz-{self.release}")

    @property
    def modules(self) -> Path:
        return Path(f"/lib/modules/{self.release}")


def default_cache() -> Path:
    """VDSM_CACHE, or `build/cache` of the source tree."""
    return Path(os.environ.get("VDSM_CACHE", ground.BUILD / "cache"))


def build(cache_dir: Path) -> GuestImage:
    """The real guest, from the cache or built: one to three minutes, with packages from the machine's own mirror.
    Raises `ToolFailed`, `DeadlinePassed`."""
    kernel = installed_kernel()
    found = _cached(cache_dir, "guest", _hash(kernel.release, _suite()), lambda place: _build_guest(place, kernel))
    return GuestImage(found / "disk.img", found / "vmlinuz", found / "initrd", found.name)


def build_data_disk(cache_dir: Path) -> Path:
    """The second disk: 64 MiB, raw, one file system without partitions."""
    return _cached(cache_dir, "data", _hash(), _build_data) / "data.img"


def build_tiny(cache_dir: Path) -> TinyGuest:
    kernel = installed_kernel()
    found = _cached(cache_dir, "tiny", _hash(kernel.release), lambda place: _build_boot(place, kernel))
    return TinyGuest(found / "vmlinuz", found / "initrd", found.name)


def installed_kernel() -> Kernel:
    """The kernel that guests boot: the newest one with its modules; of two flavours the one made for clouds."""
    found = [Kernel(path.name.removeprefix("vmlinuz-")) for path in Path("/boot").glob("vmlinuz-*")]
    usable = [kernel for kernel in found if (kernel.modules / "modules.dep").exists()]
    if not usable:
        raise errors.ToolFailed(
            program="guest image",
            exit_code=1,
            reason="no kernel in /boot has its modules: install linux-image-cloud-amd64",
        )
    return max(usable, key=lambda kernel: ("cloud" in kernel.release, kernel.image.stat().st_mtime))


# -- the cache -------------------------------------------------------------------------------------------------------


def _hash(*ingredients: str) -> str:
    digest = hashlib.sha256()
    for source in (Path(__file__), Path(guestrecipe.__file__)):
        digest.update(source.read_bytes())
    for ingredient in ingredients:
        digest.update(ingredient.encode() + b"\0")
    return digest.hexdigest()[:16]


def _cached(cache_dir: Path, kind: str, digest: str, make: Callable[[Path], None]) -> Path:
    """`cache_dir/KIND-DIGEST`, made by `make` in a directory of another name when it is not there."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    wanted = cache_dir / f"{kind}-{digest}"
    with _locked(cache_dir / f"{kind}.lock"):
        if not wanted.is_dir():
            for outdated in [*cache_dir.glob(f"{kind}-*"), *cache_dir.glob(f"new-{kind}-*")]:
                shutil.rmtree(outdated)
            fresh = cache_dir / f"new-{kind}-{digest}"
            fresh.mkdir()
            make(fresh)
            fresh.rename(wanted)
    return wanted


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- the real guest --------------------------------------------------------------------------------------------------


def _build_guest(place: Path, kernel: Kernel) -> None:
    root = place / "root"
    log.info("installing Debian %s into %s", _suite(), root)
    _bootstrap(root)
    log.info("adding kernel modules %s and the recipe's files", kernel.release)
    for name in guestrecipe.UNWANTED:
        shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(
        kernel.modules,
        root / "lib/modules" / kernel.release,
        symlinks=True,
        ignore=shutil.ignore_patterns("build", "source"),
    )
    _add_files(root)
    _in_guest(root, "systemctl", "enable", "--quiet", *guestrecipe.ENABLED)
    _in_guest(root, "systemctl", "mask", "--quiet", *guestrecipe.MASKED)
    _in_guest(root, "ssh-keygen", "-A")
    log.info("making the disk")
    _make_disk(root, place / "disk.img")
    shutil.rmtree(root)
    _build_boot(place, kernel)


def _bootstrap(root: Path) -> None:
    _private(
        [
            "/usr/sbin/debootstrap",
            "--variant=minbase",
            f"--include={','.join(guestrecipe.PACKAGES)}",
            _suite(),
            str(root),
            _mirror(_suite()),
        ],
        BOOTSTRAP_S,
    )


def _add_files(root: Path) -> None:
    for name, mode in guestrecipe.DIRECTORIES.items():
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    files = {**guestrecipe.FILES, "etc/machine-id": f"{secrets.token_hex(16)}\n"}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)


def _in_guest(root: Path, *argv: str) -> None:
    _private(["/usr/sbin/chroot", str(root), *argv], TOOL_S)


def _make_disk(root: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    sector = PARTITION_START // 512
    table = f"start={sector}, size={PARTITION_BYTES // 512}, type=L, bootable\n".encode()
    programs.check(programs.run(["/usr/sbin/sfdisk", "-q", str(disk)], input_bytes=table, timeout_s=TOOL_S), "sfdisk")
    _make_file_system("root", root, disk, PARTITION_BYTES, "-E", f"offset={PARTITION_START}")


def _make_file_system(label: str, root: Path, disk: Path, size_bytes: int, *options: str) -> None:
    """Filled as it is made, so nothing has to be mounted."""
    argv = [
        "/usr/sbin/mkfs.ext4",
        "-q",
        "-F",
        "-L",
        label,
        "-d",
        str(root),
        *options,
        str(disk),
        f"{size_bytes // 1024}k",
    ]
    programs.check(programs.run(argv, timeout_s=TOOL_S), "mkfs.ext4")


def _private(argv: list[str], timeout_s: float) -> None:
    """Runs a program that may mount and leave processes: both end with it, also when it is killed."""
    apart = ["/usr/bin/unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    environment = {"PATH": ground.PATH, **_proxy()}
    programs.check(programs.run([*apart, *argv], timeout_s=timeout_s, env=environment), Path(argv[0]).name)


# -- where packages come from: as this machine's apt is configured ---------------------------------------------------


def _suite() -> str:
    return platform.freedesktop_os_release()["VERSION_CODENAME"]


def _mirror(suite: str) -> str:
    fields = ("ORIGIN", "COMPONENT", "RELEASE", "CODENAME", "REPO_URI")
    form = "|".join(f"$({field})" for field in fields)
    argv = ["/usr/bin/apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    listed = programs.check(programs.run(argv, timeout_s=TOOL_S), "apt-get").stdout.decode()
    rows = [dict(zip(fields, line.split("|"), strict=True)) for line in listed.splitlines()]
    # A security archive has the same code name, but is another release and no complete distribution.
    usable = [row["REPO_URI"] for row in rows if row["RELEASE"] in (suite, "stable") and row["COMPONENT"] == "main"]
    debian = [row["REPO_URI"] for row in rows if row["REPO_URI"] in usable and row["ORIGIN"] == "Debian"]
    if not debian:
        raise errors.ToolFailed(
            program="guest image",
            exit_code=1,
            reason=f"apt knows no Debian {suite} archive: run apt-get update, or fix its sources",
        )
    return debian[0]


def _proxy() -> dict[str, str]:
    """apt's proxy, for debootstrap, which downloads by itself."""
    argv = ["/usr/bin/apt-config", "shell", "PROXY", "Acquire::http::Proxy"]
    line = programs.check(programs.run(argv, timeout_s=TOOL_S), "apt-config").stdout.decode().strip()
    return {"http_proxy": line.partition("=")[2].strip("'")} if line else {}


# -- kernel and initial ramdisk, the data disk -----------------------------------------------------------------------


def _build_boot(place: Path, kernel: Kernel) -> None:
    shutil.copyfile(kernel.image, place / "vmlinuz")
    root = place / "ramdisk"
    for directory in ("bin", "dev", "proc", "sys", "root", "modules"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    programs.check(
        programs.run(["/usr/sbin/chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], timeout_s=TOOL_S),
        "busybox",
    )
    order = []
    for module in _module_order(kernel):
        shutil.copyfile(module, root / "modules" / module.name)
        order.append(module.name)
    (root / "modules" / "order").write_text("".join(f"{name}\n" for name in order))
    (root / "init").write_text(guestrecipe.INIT)
    (root / "init").chmod(0o755)
    _pack(root, place / "initrd")
    shutil.rmtree(root)


def _module_order(kernel: Kernel) -> list[Path]:
    """Files of the wanted modules, each after what it needs. What the kernel has built in is not listed."""
    needs: dict[str, tuple[Path, list[str]]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        name, _, wanted = line.partition(":")
        needs[_module_name(name)] = (kernel.modules / name, [_module_name(other) for other in wanted.split()])
    built_in = {_module_name(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in built_in:
            return
        path, wanted = needs[name]
        if path not in order:
            for other in wanted:
                add(other)
            order.append(path)

    for name in guestrecipe.MODULES:
        add(name)
    return order


def _module_name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


def _pack(root: Path, archive: Path) -> None:
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    argv = ["/usr/bin/cpio", "--create", "--format=newc", "--owner=+0:+0", "--quiet", "-D", str(root)]
    packed = programs.check(programs.run(argv, input_bytes=names.encode(), timeout_s=TOOL_S), "cpio").stdout
    archive.write_bytes(gzip.compress(packed, mtime=0))


def _build_data(place: Path) -> None:
    root = place / "root"
    root.mkdir()
    for name, text in guestrecipe.DATA_FILES.items():
        (root / name).write_text(text)
    disk = place / "data.img"
    with disk.open("wb") as file:
        file.truncate(DATA_DISK_BYTES)
    _make_file_system("DATA", root, disk, DATA_DISK_BYTES)
    shutil.rmtree(root)


def main() -> None:
    logs.setup()
    cache = default_cache()
    for path in (*build(cache)[:3], build_data_disk(cache), *build_tiny(cache)[:2]):
        print(path)


if __name__ == "__main__":
    main()
