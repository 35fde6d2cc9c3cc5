"""Starts the project's daemons in a lab host, as the standalone stack does, and returns when they serve.

    python3 -P -m tests.lab.inside.daemons sanlock|helper|agent HOST-ID

Each with those before it; lvmlockd comes with the helper. Their run directory is RUN_DIR. There is no libvirt: a lab
host is for storage, and the agent serves without one.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vdsm.standalone import daemons, ground, layout, namespace

RUN_DIR = Path("/run/vdsm")
# What carries calls from the tests comes in here: see `host`.
AGENT_PORT, HELPER_PORT = 7001, 7002
LVMLOCKD_SOCKET = Path("/run/lvm/lvmlockd.socket")
# sanlock's io_timeout (seconds) for volume groups. With 1, two cores under load have been seen to lose leases.
IO_TIMEOUT_S = 2
LVM = """\
local { host_id = %d }
global {
    use_lvmlockd = 1
    lvmlockctl_kill_command = "/usr/bin/python3 -I %s"
}
"""
LOG_LINES = 20
# Such a host has no watchdog. It is reset by the tests.
OPTIONS = {"sanlock": {"unsafe_no_watchdog": True}}
CARRIER_S = 60.0
# Two busy cores and two hosts beside them: a daemon takes so many times what it may on a machine of its own.
PATIENCE = 3


def main() -> None:
    what, number = sys.argv[1], int(sys.argv[2])
    place = layout.Layout(RUN_DIR)
    if not place.config.exists():
        prepare(place, number)
    serve(place, sanlock(place))
    if what in ("helper", "agent"):
        serve(place, lvmlockd())
        serve(place, supervdsmd(place))
        accept_calls(number, HELPER_PORT, place.helper_socket)
    if what == "agent":
        serve(place, daemons.vdsmd(place))
        accept_calls(number, AGENT_PORT, place.agent_socket)


def prepare(place: layout.Layout, number: int) -> None:
    with ground.usual_umask():
        RUN_DIR.mkdir()
        ground.make_directories(place)
        namespace.bind(ground.SOURCE, place.code)
        ground.write_configuration(place, OPTIONS | {"host": {"id": number, "name": os.uname().nodename}})
        Path("/etc/lvm/lvmlocal.conf").write_text(LVM % (number, place.code / "supervdsm" / "killvg.py"))
        LVMLOCKD_SOCKET.parent.mkdir(exist_ok=True)


def sanlock(place: layout.Layout) -> daemons.Daemon:
    """As on a host of production, which a lab host can do: it is started by root, becomes its own user by itself, and
    keeps a process of root's, which can kill everybody and runs the kill command of volume groups."""
    daemon = daemons.sanlock(place, os.uname().nodename)
    return daemon._replace(argv=daemon.argv[daemon.argv.index("--") + 1 :])


def environment(place: layout.Layout) -> dict[str, str]:
    return {name: value for name, value in daemons.environment(place).items() if name != "SANLOCK_PRIVILEGED"}


def lvmlockd() -> daemons.Daemon:
    argv = ("lvmlockd", "--foreground", "--gl-type", "sanlock", "--sanlock-timeout", str(IO_TIMEOUT_S))
    return daemons.Daemon("lvmlockd", argv, LVMLOCKD_SOCKET, 20)


def supervdsmd(place: layout.Layout) -> daemons.Daemon:
    """With the LUNs, and iSCSI's disks, for volume groups."""
    daemon = daemons.supervdsmd(place)
    patterns = ("--volume-device", "/dev/mapper/lun*", "--volume-device", "/dev/mapper/3*")
    return daemon._replace(argv=(*daemon.argv, *patterns))


def serve(place: layout.Layout, daemon: daemons.Daemon) -> None:
    """Starts it unless it serves already."""
    if daemons.serves(daemon):
        return
    with place.log(daemon.name).open("ab") as log:
        process = subprocess.Popen(
            daemon.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(place),
            cwd="/",
            umask=0o022,
            start_new_session=True,
        )
    deadline = time.monotonic() + PATIENCE * daemon.deadline_s
    while not daemons.serves(daemon):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = place.log(daemon.name).read_text(errors="replace").splitlines()
            sys.exit("\n".join([f"{daemon.name} does not serve:", *lines[-LOG_LINES:]]))
        time.sleep(0.05)


def accept_calls(number: int, port: int, socket_path: Path) -> None:
    """From the network of the tests to a daemon's socket: whoever comes by it is root."""
    there = (f"10.66.0.{number}", port)
    if listens(there):
        return
    listen = f"TCP-LISTEN:{port},bind={there[0]},fork,reuseaddr,backlog=64"
    command = ["socat", listen, f"UNIX-CONNECT:{socket_path}"]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + CARRIER_S
    while not listens(there):
        if time.monotonic() > deadline:
            sys.exit(f"nothing carries calls to {socket_path}")
        time.sleep(0.05)


def listens(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0


if __name__ == "__main__":
    main()
