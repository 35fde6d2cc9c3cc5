"""The stack's own mount namespace: libvirt's compiled-in directories, /run and /var/log are private there.

    python3 -P -m vdsm.standalone.namespace RUN-DIR kvm|no-kvm PROGRAM [ARGUMENT...]

Makes the namespace and becomes PROGRAM in it; the other daemons join it. Mounts are made by system call: mount(8)
would leave a directory in the machine's own /run. Nothing of this is visible outside, and all of it is gone with the
last process inside. Runs as root.

no-kvm: QEMU's user may not open /dev/kvm (in a container its group often has another number). libvirt asks QEMU as
root what it can do, hears that there is KVM, finds that QEMU's user has none, and asks anew, for nine seconds at each
start of a VM (seen). So inside nobody may open it.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from vdsm.standalone import layout

KVM = Path("/dev/kvm")

CLONE_NEWNS = 0x00020000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def enter(place: layout.Layout, *, kvm: bool) -> None:
    """Moves this process into a fresh namespace. `place` must have its directories. `kvm`: whether QEMU may use it."""
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    # Mounts of the machine go on arriving here; ours never leave.
    _mount(None, Path("/"), MS_REC | MS_SLAVE)
    # sanlock opens /var/log/sanlock.log whatever it is told.
    bind(place.logs, Path("/var/log"))
    for name, seen in (
        ("etc", "/etc/libvirt"),
        ("lib", "/var/lib/libvirt"),
        ("cache", "/var/cache/libvirt"),
        ("log", "/var/log/libvirt"),
    ):
        bind(place.libvirt / name, Path(seen))
    if not kvm and KVM.exists():
        closed = place.private_run / "kvm"
        closed.touch(0)
        bind(closed, KVM)
    _private_run(place)


def _private_run(place: layout.Layout) -> None:
    """/run with all that is in it now, and libvirt's directory beside it. Mounting on /run/libvirt itself would need
    that directory on the machine, where nobody could say when to remove it. The system's bus is left out: over it
    libvirt would register its guests with the machine's systemd."""
    ours = place.private_run / "libvirt"
    ours.mkdir()
    bind(place.libvirt / "run", ours)
    for entry in Path("/run").iterdir():
        if entry.name not in (ours.name, "dbus"):
            with contextlib.suppress(FileNotFoundError):  # some entries come and go
                _repeat(entry, place.private_run / entry.name)
    bind(place.private_run, Path("/run"))


def _repeat(entry: Path, target: Path) -> None:
    if entry.is_symlink():
        target.symlink_to(entry.readlink())
        return
    if entry.is_dir():
        target.mkdir()
    else:
        target.touch()
    bind(entry, target)


def bind(source: Path, target: Path) -> None:
    """`source` with all that is mounted below it is seen at `target`, which must exist."""
    _mount(source, target, MS_BIND | MS_REC)


def _mount(source: Path | None, target: Path, flags: int) -> None:
    where = None if source is None else os.fsencode(source)
    _check(_libc.mount(where, os.fsencode(target), None, ctypes.c_ulong(flags), None), f"mount {source} on {target}")


def _check(answer: int, what: str) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    enter(layout.Layout(Path(sys.argv[1])), kvm=sys.argv[2] == "kvm")
    os.execvp(sys.argv[3], sys.argv[3:])
