"""What a stack stands on: the user, the directories, the installed code and the configuration files.

Runs as root. Everything is made under the run directory, but for the system user and group `vdsm`, which stay.
"""

import compileall
import contextlib
import grp
import json
import os
import pwd
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vdsm import config
from vdsm.hooks import points
from vdsm.standalone import layout

USER = "vdsm"
# QEMU's group: it opens the images of repositories, and talks to sanlock.
STORAGE_GROUP = "kvm"
QEMU_USER = "libvirt-qemu"
# Of Debian's package, and the group of disks, to which it belongs there.
SANLOCK_USER, DISK_GROUP = "sanlock", "disk"

# A shell of `su` lacks the system's own directories.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# The source tree that this file is part of.
SOURCE = Path(__file__).resolve().parents[2]
BUILD = SOURCE / "build"

Overrides = Mapping[str, Mapping[str, Any]]

LIBVIRTD_CONF = """\
host_uuid = "{host_uuid}"
unix_sock_group = "{group}"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:stderr"
"""
# Ownership of images is the agent's business, done once when they are made. No confinement and no cgroups: both would
# need the machine's help.
QEMU_CONF = """\
user = "{user}"
group = "{group}"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""
CLIENT = """\
#!/bin/sh
PYTHONPATH={code} exec /usr/bin/python3 -P -m vdsm.client -a {socket} "$@"
"""
VIRTLOGD_CONF = 'log_outputs = "2:stderr"\n'


class GroundError(Exception):
    """The machine lacks something; the text says what, and how to get it."""


def check_machine() -> None:
    """Raises `GroundError` when a stack cannot stand here."""
    if os.geteuid() != 0:
        raise GroundError("the standalone stack needs root: run it as root, e.g. with sudo")
    if not (BUILD / "runtime").is_dir():
        raise GroundError(f"{BUILD / 'runtime'} is missing: run vdsm/tool/prerequisites.sh demo first")
    for program in ("libvirtd", "virtlogd", "virsh", "sanlock", "qemu-system-x86_64", "qemu-img", "nsenter", "setpriv"):
        if shutil.which(program, path=PATH) is None:
            raise GroundError(f"{program} is not installed: run vdsm/tool/prerequisites.sh demo first")


def ensure_user() -> None:
    """The system user and group `vdsm`, which may use KVM as QEMU does."""
    try:
        pwd.getpwnam(USER)
    except KeyError:
        command = ["/usr/sbin/useradd", "--system", "--user-group", "--groups", STORAGE_GROUP, "--no-create-home"]
        command += ["--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", USER]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode not in (0, 9):  # 9: another stack was quicker
            raise GroundError(f"cannot create the system user {USER}: {made.stderr.strip()}") from None


@contextlib.contextmanager
def usual_umask() -> Iterator[None]:
    """Others may read what is made inside, whatever the owner of the stack keeps to itself elsewhere."""
    old = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(old)


def make_directories(place: layout.Layout) -> None:
    agent = pwd.getpwnam(USER)
    storage_gid = grp.getgrnam(STORAGE_GROUP).gr_gid
    place.run_dir.chmod(0o755)
    for directory in (place.code, place.config.parent, place.logs, place.private_run):
        directory.mkdir(mode=0o755)
    for directory in (place.imports, place.storage, place.boot):
        directory.mkdir(mode=0o755)
    for directory in (place.hooks, *(place.hooks / name for name in points.POINTS)):
        directory.mkdir(mode=0o755)
    place.libvirt.mkdir(mode=0o755)
    for name in ("etc", "lib", "cache", "log", "run"):
        (place.libvirt / name).mkdir(mode=0o755)
    (place.logs / "libvirt").mkdir()  # the mount point of libvirt's own logs
    _make(place.sanlock, 0o755, pwd.getpwnam(SANLOCK_USER).pw_uid, storage_gid)
    # Root's with the sticky bit: the agent makes its socket there, and cannot replace the root helper's.
    _make(place.sockets, 0o1775, 0, agent.pw_gid)
    _make(place.console, 0o2770, agent.pw_uid, storage_gid)
    _make(place.exports, 0o755, agent.pw_uid, agent.pw_gid)
    _make(place.scratch, 0o700, agent.pw_uid, agent.pw_gid)


def _make(directory: Path, mode: int, uid: int, gid: int) -> None:
    directory.mkdir()
    os.chown(directory, uid, gid)
    directory.chmod(mode)


def install_code(place: layout.Layout) -> None:
    """Copies the runtime dependencies and both packages. A source tree that only its owner can read will do."""
    shutil.copytree(BUILD / "runtime", place.code, dirs_exist_ok=True)
    for package in ("vdsm", "supervdsm"):
        shutil.copytree(SOURCE / package, place.code / package, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(place.code / package, quiet=2)
    for path in place.code.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    place.launcher.chmod(0o755)
    place.client.parent.mkdir()
    place.client.write_text(CLIENT.format(code=place.code, socket=place.agent_socket))
    place.client.chmod(0o755)


def write_configuration(place: layout.Layout, overrides: Overrides) -> None:
    """The files of all daemons. Raises `vdsm.config.ConfigError` when `overrides` name what does not exist."""
    etc = place.libvirt / "etc"
    (etc / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(host_uuid=uuid.uuid4(), group=STORAGE_GROUP))
    (etc / "qemu.conf").write_text(QEMU_CONF.format(user=QEMU_USER, group=STORAGE_GROUP))
    (etc / "virtlogd.conf").write_text(VIRTLOGD_CONF)
    sections = {name: {**values, **overrides.get(name, {})} for name, values in agent_options(place).items()}
    sections |= {name: dict(values) for name, values in overrides.items() if name not in sections}
    place.config.write_text(_toml(sections))
    config.load(str(place.config))


def agent_options(place: layout.Layout) -> dict[str, dict[str, Any]]:
    return {
        "host": {"name": os.uname().nodename},
        "paths": {"tmp_dir": str(place.scratch)},
        "wire": {"unix_socket": str(place.agent_socket), "unix_group": USER},
        "storage": {
            "import_dirs": [str(place.imports)],
            "export_dirs": [str(place.exports)],
            "localfs_dirs": [str(place.storage)],
            "volume_use_dir": str(place.scratch / "volumes"),
        },
        "sanlock": {"run_dir": str(place.sanlock)},
        "virt": {
            "libvirt_uri": place.libvirt_uri,
            "launcher": str(place.launcher),
            "console_dir": str(place.console),
            "boot_dirs": ["/boot", str(place.boot)],
        },
        "hooks": {"dir": str(place.hooks)},
        "helper": {"socket": str(place.helper_socket)},
    }


def _toml(sections: Overrides) -> str:
    """Strings, numbers, booleans and lists of them are written in TOML as in JSON."""
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{option} = {json.dumps(_plain(value))}" for option, value in values.items()), ""]
    return "\n".join(lines)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(member) for member in value]
    return str(value) if isinstance(value, Path) else value


def settings(place: layout.Layout) -> config.Config:
    """The agent's configuration as it will read it."""
    return config.load(str(place.config))
