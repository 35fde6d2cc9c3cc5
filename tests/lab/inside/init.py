"""The first process of a lab host: makes it a host of its own, then runs the commands that arrive on the network `ctl`.

    init=/usr/bin/python3 lab=CONFIG -- -IS .../init.py        on the kernel's command line

CONFIG is JSON: number, hosts, networks, luns, code, environment. The machine's root file system, read only, is the
lower layer of an overlay in memory; what is state there (/run, /tmp, what daemons keep in /var) is private and empty.
So nothing in a host changes the machine, and a host's end is the end of all it wrote, but for the LUNs.

One connection is one command: a line of JSON {argv, environment, input, deadline_s} comes in, a line of JSON
{code, out, err} goes back when the command has ended; code is null when it had to be killed at its deadline. A daemon
that the command left behind keeps running, and nobody waits for it. Needs nothing but the standard library and two
programs: starting programs is what is slow in such a host.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

CONTROL_PORT = 7000
MS_RDONLY, MS_MOVE, MNT_DETACH = 1, 8192, 2
SYS_PIVOT_ROOT = 155
RB_POWER_OFF = 0x4321FEDC
# What the machine's own services may have left there must not be seen.
EMPTY = ("/run", "/tmp", "/var/log", "/var/lib/nfs", "/var/lib/iscsi", "/etc/iscsi/nodes", "/etc/iscsi/send_targets")
# overrides: what multipathd knows of a vendor's disks would queue without end where no path is left (trap 55).
MULTIPATH = """\
defaults {
    user_friendly_names no
    find_multipaths no
    polling_interval 2
}
overrides {
    no_path_retry fail
}
blacklist {
    devnode "^(ubd|loop|ram|dm-)"
}
"""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LANG="C.UTF-8")
    mount("proc", "/proc", "proc")
    words = dict(word.split("=", 1) for word in Path("/proc/cmdline").read_text().split() if "=" in word)
    config = json.loads(Path(words["lab"]).read_text())
    own_root()
    own_places(config["code"])
    name_host(config)
    subprocess.run(["modprobe", "dm-mod"], check=True)
    connect_networks(config)
    map_luns(config["luns"])
    os.environ.update(config["environment"])
    listener = socket.create_server((address(0, config["number"]), CONTROL_PORT), backlog=64)
    print("lab: ready after", Path("/proc/uptime").read_text().split()[0], "s", flush=True)
    server = os.fork()
    if server == 0:
        os.setsid()
        serve(listener)
    listener.close()
    while os.wait()[0] != server:  # others are orphans, which it buries
        pass
    raise RuntimeError("nobody takes commands any more")


def own_root() -> None:
    mount("upper", "/mnt", "tmpfs")
    for name in ("upper", "work", "root", "probe/lib", "upper/usr/lib/modules"):
        Path("/mnt", name).mkdir(parents=True)
    # modprobe looks in /lib/modules, and this kernel's modules are elsewhere.
    Path("/mnt/probe/lib/modules").symlink_to("/usr/lib/uml/modules")
    release = os.uname().release
    Path("/mnt/upper/usr/lib/modules", release).symlink_to(f"/usr/lib/uml/modules/{release}")
    subprocess.run(["modprobe", "-d", "/mnt/probe", "overlay"], check=True)
    mount("overlay", "/mnt/root", "overlay", data="lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work")
    Path("/mnt/root/mnt/old").mkdir(parents=True)
    check(_libc.mount(b"/dev", b"/mnt/root/dev", None, MS_MOVE, None), "move /dev")
    os.chdir("/mnt/root")
    check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"mnt/old"), "pivot_root")
    os.chdir("/")
    check(_libc.umount2(b"/mnt/old", MNT_DETACH), "umount the old root")


def own_places(code: str) -> None:
    for source, target, kind in (("proc", "/proc", "proc"), ("sysfs", "/sys", "sysfs"), ("shm", "/dev/shm", "tmpfs")):
        mount(source, target, kind)
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    mount("devpts", "/dev/pts", "devpts", data="ptmxmode=0666")
    for path in EMPTY:
        mount("empty", path, "tmpfs", data="mode=1777" if path == "/tmp" else "mode=755")
    for path in ("/run/lock/iscsi", "/run/rpcbind", "/run/udev", "/run/sanlock"):
        Path(path).mkdir(parents=True)
    for path in ("sm", "sm.bak", "v4recovery", "rpc_pipefs", "nfsdcltrack"):
        Path("/var/lib/nfs", path).mkdir()
    for path in ("etab", "rmtab"):  # exportfs wants them
        Path("/var/lib/nfs", path).touch()
    # Directly, so that a program that was installed after the start is seen whole.
    mount("none", code, "hostfs", MS_RDONLY, data=code)


def name_host(config: dict[str, Any]) -> None:
    name = f"host{config['number']}"
    socket.sethostname(name)
    lines = ["127.0.0.1 localhost"]
    for number in range(1, config["hosts"] + 1):
        lines += [f"{address(net, number)} host{number}-{label}" for net, label in enumerate(config["networks"])]
    Path("/etc/hosts").write_text("\n".join(lines) + "\n")
    Path("/etc/hostname").write_text(name + "\n")
    Path("/etc/machine-id").write_text(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.lab").hex + "\n")
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName=iqn.2026-01.test.lab:{name}\n")
    Path("/etc/multipath.conf").write_text(MULTIPATH)


def connect_networks(config: dict[str, Any]) -> None:
    lines = ["link set lo up"]
    for net, label in enumerate(config["networks"]):
        lines += [f"link set vec{net} name {label}", f"addr add {address(net, config['number'])}/24 dev {label}"]
        lines += [f"link set {label} up"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines).encode(), check=True)


def address(net: int, number: int) -> str:
    return f"10.66.{net}.{number}"


def map_luns(count: int) -> None:
    """Between a LUN and its users lies a device of the device mapper from the start, so that faults can come later."""
    tables = []
    for number in range(count):
        disk = f"ubd{chr(ord('a') + number)}"
        sectors = Path(f"/sys/block/{disk}/size").read_text().strip()
        tables.append(f"lun{number},,,,0 {sectors} linear /dev/{disk} 0")
    # udev, which dmsetup would wait for, runs only where iSCSI is used.
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}
    subprocess.run(["dmsetup", "create", "--concise", ";".join(tables)], env=environment, check=True)


def serve(listener: socket.socket) -> None:
    while True:
        line, _ = listener.accept()
        threading.Thread(target=serve_one, args=(line,), daemon=True).start()


def serve_one(line: socket.socket) -> None:
    # The caller may be gone, or may only have asked whether somebody listens.
    with line, contextlib.suppress(ConnectionError), line.makefile("rwb") as stream:
        request = stream.readline()
        if request.endswith(b"\n"):
            stream.write(json.dumps(run(json.loads(request))).encode() + b"\n")


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Into files, not pipes: the end of the command ends the wait, whoever still holds its output open."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(request["input"].encode())
        given.seek(0)
        environment = {**os.environ, **request["environment"]}
        try:
            child = subprocess.Popen(
                request["argv"], stdin=given, stdout=out, stderr=err, env=environment, cwd="/", start_new_session=True
            )
        except OSError as error:
            return {"code": 127, "out": "", "err": str(error)}
        code = wait(child, request["deadline_s"])
        return {"code": code, "out": text(out), "err": text(err)}


def wait(child: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    try:
        return child.wait(deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in a device does not even die
        child.wait(1)
    return None


def text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    done = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    check(done, f"mount {target}")


def check(answer: int, what: str) -> None:
    if answer != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:  # noqa: BLE001 - the end of the first process is a panic, which hides the reason
        print("lab: init failed:", repr(error), flush=True)
        _libc.reboot(RB_POWER_OFF)
