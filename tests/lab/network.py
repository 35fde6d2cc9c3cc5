"""The lab's networks: one network namespace with a bridge for each of NETWORKS, and a tap on each for each host.

`ctl` carries the tests' own commands and is never cut. `lan` and `san` are the hosts': two of them, so that storage can
have two paths. The machine's network is not touched, and the namespace goes with its last process.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.lab.waiting import until

NETWORKS = ("ctl", "lan", "san")
COMMAND_S = 20.0


def address(net: str, number: int) -> str:
    """The IP address of the host `number`."""
    return f"10.66.{NETWORKS.index(net)}.{number}"


class Network:
    """Made once for a lab; all its processes end with this one (with the thread that called `start`)."""

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None

    def start(self, hosts: int) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "cat"]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        until(lambda: not Path(self._namespace).samefile("/proc/self/ns/net"), COMMAND_S)
        lines = ["link set lo up"]
        for net in NETWORKS:
            lines += [f"link add {_bridge(net)} type bridge forward_delay 0", f"link set {_bridge(net)} up"]
            for number in range(1, hosts + 1):
                lines += [f"tuntap add {tap(net, number)} mode tap"]
                lines += [f"link set {tap(net, number)} master {_bridge(net)} up"]
        lines += [f"addr add {address('ctl', 254)}/24 dev {_bridge('ctl')}"]
        self._ip(["-batch", "-"], "\n".join(lines))

    def stop(self) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()
            self._holder = None

    def spawn(self, argv: Sequence[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts a program in the namespace. `end` ends it with all that it has started; so does this process's end."""
        command = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={self._namespace}"]
        command += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *argv]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def cut(self, net: str, number: int) -> None:
        """Pulls the cable out of the switch. (A tap that is down instead makes the host's driver spin for ever.)"""
        self._ip(["link", "set", tap(net, number), "nomaster"])

    def restore(self, net: str, number: int) -> None:
        self._ip(["link", "set", tap(net, number), "master", _bridge(net)])

    @property
    def _namespace(self) -> str:
        assert self._holder is not None, "the network is not started"
        return f"/proc/{self._holder.pid}/ns/net"

    def _ip(self, arguments: list[str], given: str = "") -> None:
        command = ["nsenter", f"--net={self._namespace}", "ip", *arguments]
        subprocess.run(command, input=given.encode(), check=True, timeout=COMMAND_S)


def tap(net: str, number: int) -> str:
    return f"{net}{number}"


def _bridge(net: str) -> str:
    return f"br-{net}"


def end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Kills what `spawn` started, and returns when nothing of it is left.

    It is the first process of a PID namespace: the kernel kills all others in there with it, and only then is it gone.
    """
    for pid in children(process.pid) or [process.pid]:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout_s)


def children(pid: int) -> list[int]:
    """Of the process's first thread; none when it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
