"""The daemons of a stack: how each is called, and how one knows that it serves.

All run in the foreground with their output in `log/NAME.log`, in the stack's mount namespace, with an environment of
their own. Nothing here is ever started a second time while leases may be held, but the agent, which holds none.
"""

import grp
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

from vdsm.standalone import ground, layout

PYTHON = ("/usr/bin/python3", "-P", "-m")


class Daemon(NamedTuple):
    """`socket` accepts connections once it serves; `deadline_s` after its start it must."""

    name: str
    argv: tuple[str, ...]
    socket: Path
    deadline_s: float


def environment(place: layout.Layout) -> dict[str, str]:
    """What every process of the stack is started with."""
    return {
        "PATH": ground.PATH,
        "LANG": "C.UTF-8",
        "HOME": str(place.scratch),
        "TMPDIR": str(place.scratch),
        "PYTHONPATH": str(place.code),
        # Unprivileged: without it sanlock insists on locking its memory, which not every root may.
        "SANLOCK_PRIVILEGED": "0",
        "SANLOCK_RUN_DIR": str(place.sanlock),
    }


def sanlock(place: layout.Layout, host_name: str) -> Daemon:
    """Runs as its own user, with the groups of images and of disks: root is nobody on an export that squashes it. It
    keeps root's right to kill, since whoever holds a lease must be killed, be it the agent's, QEMU or root's. 64
    threads: with the default 8, eight calls stuck on one frozen repository starve all others."""
    argv = ["setpriv", "--reuid", ground.SANLOCK_USER, "--regid", ground.STORAGE_GROUP]
    argv += ["--groups", f"{ground.STORAGE_GROUP},{ground.DISK_GROUP}"]
    argv += ["--inh-caps", "-all,+kill", "--ambient-caps", "-all,+kill", "--"]
    argv += ["sanlock", "daemon", "-D", "-L", "-1", "-S", "-1", "-w", "0", "-t", "64"]
    argv += ["-U", ground.SANLOCK_USER, "-G", ground.STORAGE_GROUP, "-e", host_name]
    return Daemon("sanlock", tuple(argv), place.sanlock_socket, 20)


def virtlogd(place: layout.Layout) -> Daemon:
    argv = ("virtlogd", "-f", "/etc/libvirt/virtlogd.conf", "-p", "/run/libvirt/virtlogd.pid")
    return Daemon("virtlogd", argv, place.virtlogd_socket, 20)


def libvirtd(place: layout.Layout) -> Daemon:
    """Its first start asks QEMU what it can do, which takes seconds."""
    argv = [*PYTHON, "vdsm.standalone.reaper", "libvirtd", "-f", "/etc/libvirt/libvirtd.conf"]
    argv += ["-p", "/run/libvirt/libvirtd.pid"]
    return Daemon("libvirtd", tuple(argv), place.libvirt_socket, 60)


def supervdsmd(place: layout.Layout) -> Daemon:
    argv = [*PYTHON, "supervdsm", "--socket", str(place.helper_socket), "--user", ground.USER, "--group", ground.USER]
    argv += ["--storage-group", ground.STORAGE_GROUP, "--localfs-dir", str(place.storage), "--audit", str(place.audit)]
    argv += ["--mount-dir", str(place.mounts)]
    return Daemon("supervdsmd", tuple(argv), place.helper_socket, 30)


def vdsmd(place: layout.Layout) -> Daemon:
    argv = as_user(ground.USER, ground.USER, [*PYTHON, "vdsm.daemon", "--config", str(place.config)])
    return Daemon("vdsmd", tuple(argv), place.agent_socket, 60)


def as_user(user: str, group: str, argv: list[str]) -> list[str]:
    """`argv` as that user and group, with QEMU's group and no others."""
    gid = grp.getgrnam(ground.STORAGE_GROUP).gr_gid
    return ["setpriv", "--reuid", user, "--regid", group, "--groups", str(gid), "--", *argv]


def qemu_may_use_kvm() -> bool:
    """Whether libvirt's QEMU user may open /dev/kvm. Whether a guest runs under it is the agent's question."""
    test = ["test", "-r", "/dev/kvm", "-a", "-w", "/dev/kvm"]
    return subprocess.run(as_user(ground.QEMU_USER, ground.STORAGE_GROUP, test)).returncode == 0


def serves(daemon: Daemon) -> bool:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(1)
        return link.connect_ex(str(daemon.socket)) == 0
