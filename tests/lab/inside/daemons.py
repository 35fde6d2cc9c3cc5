"""Starts the project's daemons in a lab host, as the standalone stack does, and returns when they serve.

    python3 -P -m tests.lab.inside.daemons sanlock|agent HOST-ID

Their run directory is RUN_DIR. There is no libvirt: a lab host is for storage, and the agent serves without one.
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
AGENT_PORT = 7001
LOG_LINES = 20
# Such a host has no watchdog. It is reset by the tests.
OPTIONS = {"sanlock": {"unsafe_no_watchdog": True}}
CARRIER_S = 20.0


def main() -> None:
    what, number = sys.argv[1], int(sys.argv[2])
    place = layout.Layout(RUN_DIR)
    if not place.config.exists():
        prepare(place, number)
    serve(place, daemons.sanlock(place, os.uname().nodename))
    if what == "agent":
        serve(place, daemons.supervdsmd(place))
        serve(place, daemons.vdsmd(place))
        accept_calls(place, number)


def prepare(place: layout.Layout, number: int) -> None:
    with ground.usual_umask():
        RUN_DIR.mkdir()
        ground.make_directories(place)
        namespace.bind(ground.SOURCE, place.code)
        ground.write_configuration(place, OPTIONS | {"host": {"id": number, "name": os.uname().nodename}})


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
            env=daemons.environment(place),
            cwd="/",
            umask=0o022,
            start_new_session=True,
        )
    deadline = time.monotonic() + daemon.deadline_s
    while not daemons.serves(daemon):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = place.log(daemon.name).read_text(errors="replace").splitlines()
            sys.exit("\n".join([f"{daemon.name} does not serve:", *lines[-LOG_LINES:]]))
        time.sleep(0.05)


def accept_calls(place: layout.Layout, number: int) -> None:
    """From the network of the tests to the agent's socket: whoever comes by it is a local admin."""
    there = (f"10.66.0.{number}", AGENT_PORT)
    if listens(there):
        return
    listen = f"TCP-LISTEN:{AGENT_PORT},bind={there[0]},fork,reuseaddr,backlog=64"
    command = ["socat", listen, f"UNIX-CONNECT:{place.agent_socket}"]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + CARRIER_S
    while not listens(there):
        if time.monotonic() > deadline:
            sys.exit("nothing carries calls to the agent")
        time.sleep(0.05)


def listens(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0


if __name__ == "__main__":
    main()
