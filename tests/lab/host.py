"""One host of a lab: boot it, run commands in it, cut its cables, kill it, boot it again."""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from supervdsm import client as helper_client
from tests.lab import lun, network
from tests.lab.waiting import until
from vdsm.client import transport

# Boots in 2 to 4 s on an idle machine; two busy cores and a cold page cache make it many times that.
BOOT_S = 90.0
RUN_S = 30.0
# The host kills a command at its deadline and answers; without an answer after so long, the host itself hangs.
ANSWER_S = 10.0
LOOK_S = 0.5
KILL_S = 20.0
CONTROL_PORT, AGENT_PORT, HELPER_PORT = 7000, 7001, 7002
LOG_LINES = 20
AGENT_S = 120.0


class HostError(Exception):
    """The host does not answer, or ended; the text has the last lines of its console."""


class CommandError(Exception):
    """A command failed or was killed at its deadline; the text says which and has its output."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended. `code` as subprocess has it; None: it was killed at its deadline."""

    code: int | None
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the hosts of a lab share: its directory, its network, the size of a host, and what is installed in it."""

    directory: Path
    network: network.Network
    hosts: int
    memory_mib: int
    memory_dir: Path
    luns: tuple[Path, ...]
    code: Path


class Host:
    """Made by `Lab`. `number` is its host id for sanlock and the end of its addresses; its name is `host<number>`.

    For one thread at a time, but for `run`, which any number of threads may call.
    """

    def __init__(self, machine: Machine, number: int) -> None:
        self.number = number
        self.name = f"host{number}"
        self.luns = [lun.Lun(self, index) for index in range(len(machine.luns))]
        self.boot_s = 0.0  # how long the last boot took
        self._machine = machine
        self._kernel: subprocess.Popen[bytes] | None = None
        self._carriers: list[subprocess.Popen[bytes]] = []
        self._cut: set[str] = set()
        self._frozen = False

    def __repr__(self) -> str:
        return self.name

    # -- its life ----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it has power: a host that hangs or is frozen has."""
        return self._kernel is not None and self._kernel.poll() is None

    def start(self) -> None:
        """Power on; `wait` tells when it takes commands."""
        assert not self.running, f"{self} runs already"
        if not self._carriers:
            ports = {"control": CONTROL_PORT, "agent": AGENT_PORT, "helper": HELPER_PORT}
            self._carriers = [self._carry(name, port) for name, port in ports.items()]
        for disk in self.luns:
            disk.forget()
        shutil.rmtree(self._kernel_dir, ignore_errors=True)  # a killed kernel's
        self._config.write_text(json.dumps(self._description()))
        self._began = time.monotonic()
        self._console_start = self._console.stat().st_size if self._console.exists() else 0
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(self._machine.memory_dir)}
        with self._console.open("ab") as log:
            self._kernel = self._machine.network.spawn(self._command(), log, environment)

    def wait(self) -> None:
        """Returns once it takes commands. Raises `HostError`."""
        deadline = self._began + BOOT_S
        while "lab: ready" not in self._console_text():
            if not self.running:
                raise HostError(self._story("ended while it booted"))
            if time.monotonic() > deadline:
                raise HostError(self._story(f"is not ready after {BOOT_S:.0f} s"))
            time.sleep(0.02)
        self.boot_s = time.monotonic() - self._began

    def boot(self) -> None:
        """Power on, and wait. What it had in memory, and all its disks but the LUNs, is gone. Raises `HostError`."""
        self.start()
        self.wait()

    def kill(self) -> None:
        """Power cut: returns when nothing of it runs any more. What it wrote to LUNs is there; nothing else is."""
        if self._kernel is not None:
            network.end(self._kernel, KILL_S)
        self._kernel, self._frozen = None, False

    def freeze(self) -> None:
        """Everything in it stops where it is; it does not notice, but for its clock, once it is thawed."""
        self._signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)
        self._frozen = False

    def mend(self) -> None:
        """Alive, connected, its LUNs sound. A host that is off or hangs is booted."""
        for net in tuple(self._cut):
            self.restore(net)
        if self._frozen and self.running:
            self.thaw()
        if not self.answers():
            self.renew()
        for disk in self.luns:
            disk.heal()

    def renew(self) -> None:
        """Power cut and boot: whatever was in it is gone."""
        self.kill()
        self.boot()

    def answers(self) -> bool:
        """Whether it runs commands."""
        try:
            return self.running and self.run(["true"], check=False).code == 0
        except HostError:
            return False

    def close(self) -> None:
        self.kill()
        for carrier in self._carriers:
            network.end(carrier, KILL_S)
        self._carriers.clear()

    # -- commands ----------------------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float = RUN_S,
        *,
        check: bool = True,
        given: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Result:
        """Runs a command as root in "/"; `given` is its standard input. What it leaves behind keeps running.

        After `timeout_s` it is killed with its process group. Raises `CommandError` unless it ends with 0 (not with
        `check=False`), `HostError` when the host does not answer.
        """
        request = {"argv": list(argv), "environment": dict(environment or {}), "input": given, "deadline_s": timeout_s}
        try:
            result = Result(**self._ask(request, timeout_s + ANSWER_S))
        except (OSError, ValueError) as error:
            raise HostError(self._story(f"does not answer ({error!r})")) from error
        if check and result.code != 0:
            how = f"was killed after {timeout_s} s" if result.code is None else f"ended with {result.code}"
            raise CommandError(f"{self}: {' '.join(argv)} {how}\n{result.out}{result.err}")
        return result

    def sh(self, script: str, timeout_s: float = RUN_S, *, check: bool = True) -> Result:
        """As `run`, for a script; it ends with the first command that fails."""
        return self.run(["/bin/sh", "-ec", script], timeout_s, check=check)

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(timeout_s)
            line.connect(str(self._socket("control")))
            line.sendall(json.dumps(request).encode() + b"\n")
            deadline = time.monotonic() + timeout_s
            while not select.select([line], [], [], LOOK_S)[0]:
                # A dead host says no good-bye.
                if not self.running or time.monotonic() > deadline:
                    raise TimeoutError(f"nothing within {timeout_s} s")
            with line.makefile("rb") as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
                return answer

    # -- its network -------------------------------------------------------------------------------------------------

    def address(self, net: str = "lan") -> str:
        return network.address(net, self.number)

    def cut(self, net: str) -> None:
        """Pulls the cable: nothing arrives, nothing leaves, and no carrier tells the host."""
        assert net != "ctl", "the tests' own network"
        self._machine.network.cut(net, self.number)
        self._cut.add(net)

    def restore(self, net: str) -> None:
        self._machine.network.restore(net, self.number)
        self._cut.discard(net)

    @contextlib.contextmanager
    def slow_network(self, net: str, delay_ms: int, loss_percent: int = 0) -> Iterator[None]:
        """What it sends is late, or lost, inside the block."""
        self.run(["modprobe", "sch_netem"])
        netem = ["netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"]
        self.run(["tc", "qdisc", "replace", "dev", net, "root", *netem])
        try:
            yield
        finally:
            if self.running:
                self.run(["tc", "qdisc", "del", "dev", net, "root"])

    # -- the project in it -------------------------------------------------------------------------------------------

    def start_sanlock(self) -> None:
        """Its own daemon, without watchdog, with its own host name; the host id is the test's to use."""
        self._start_daemons("sanlock")

    def start_helper(self) -> None:
        """sanlock and lvmlockd, unless they run, and supervdsmd. LVM's configuration is as the project wants it."""
        self._start_daemons("helper")

    def helper(self) -> helper_client.Helper:
        """Its root helper; the calls are root's."""
        return helper_client.Helper(str(self._socket("helper")))

    def start_agent(self) -> None:
        """As `start_helper`, and vdsmd; all installed from this source tree. There is no libvirt."""
        self._start_daemons("agent")

    def agent(self, timeout_s: float = 60.0) -> transport.Client:
        """A client of its agent, as a local admin; its calls and the connection have this deadline."""
        return transport.connect(str(self._socket("agent")), timeout_s)

    def _start_daemons(self, what: str) -> None:
        program = ["/usr/bin/python3", "-P", "-m", "tests.lab.inside.daemons", what, str(self.number)]
        self.run(program, AGENT_S)

    # -- how ---------------------------------------------------------------------------------------------------------

    @property
    def _console(self) -> Path:
        return self._machine.directory / f"{self.name}.log"

    @property
    def _config(self) -> Path:
        return self._machine.directory / f"{self.name}.json"

    @property
    def _kernel_dir(self) -> Path:
        return self._machine.directory / f"{self.name}-kernel"

    def _socket(self, name: str) -> Path:
        return self._machine.directory / f"{self.name}-{name}.sock"

    def _description(self) -> dict[str, Any]:
        """What `inside/init.py` reads."""
        return {
            "number": self.number,
            "hosts": self._machine.hosts,
            "networks": network.NETWORKS,
            "luns": len(self._machine.luns),
            "code": str(self._machine.code),
            "environment": {"PYTHONPATH": str(self._machine.code), "SANLOCK_RUN_DIR": "/run/vdsm/sanlock"},
        }

    def _command(self) -> list[str]:
        arguments = [f"mem={self._machine.memory_mib}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"]
        arguments += ["quiet", "init=/usr/bin/python3", f"lab={self._config}"]
        arguments += [f"umid={self.name}", f"uml_dir={self._kernel_dir}", "con=null", "con0=null,fd:2"]
        arguments += ["ssl=null"]
        # c: shared between hosts, not locked.
        arguments += [f"ubd{index}c={path}" for index, path in enumerate(self._machine.luns)]
        for index, net in enumerate(network.NETWORKS):
            mac = f"52:54:00:66:{index:02x}:{self.number:02x}"
            # Without gro the driver drops large frames, and NFS hangs.
            tap = network.tap(net, self.number)
            arguments.append(f"vec{index}:transport=tap,ifname={tap},mac={mac},gro=1,depth=64")
        arguments += ["--", "-IS", f"{self._machine.code}/tests/lab/inside/init.py"]
        # This kernel reboots by executing its own name again: a host that resets itself ends, and the test boots it. A
        # panic ends it by SIGABRT, which the first process of a namespace would not hear; so that one is the shell.
        script = '(ulimit -c 0; exec -a /bin/true linux.uml "$@"); exit 0'
        return ["taskset", "--cpu-list", str(_processor(self.number)), "bash", "-c", script, "linux.uml", *arguments]

    def _carry(self, name: str, port: int) -> subprocess.Popen[bytes]:
        """From a Unix socket, which tests can reach, to a port of the host, which only its network can."""
        path = self._socket(name)
        target = f"TCP:{self.address('ctl')}:{port},connect-timeout=5"
        command = ["socat", f"UNIX-LISTEN:{path},fork,backlog=64", target]
        with (self._machine.directory / f"{self.name}-{name}.log").open("ab") as log:
            carrier = self._machine.network.spawn(command, log, {"PATH": os.environ["PATH"]})
        until(path.exists, network.COMMAND_S)
        return carrier

    def _signal(self, number: int) -> None:
        assert self._kernel is not None, f"{self} has no power"
        (shell,) = network.children(self._kernel.pid)
        (kernel,) = network.children(shell)
        os.kill(kernel, number)

    def _console_text(self) -> str:
        with self._console.open(errors="replace") as log:
            log.seek(self._console_start)
            return log.read()

    def _story(self, what: str) -> str:
        lines = self._console.read_text(errors="replace").splitlines() if self._console.exists() else []
        state = "runs" if self.running else "is off"
        return "\n".join([f"{self} {what}; it {state}. Its console:", *(f"    {line}" for line in lines[-LOG_LINES:])])


def _processor(number: int) -> int:
    """The one that a host keeps to. Each call of a process into its kernel is two switches between processes of this
    machine, which take less than half of the time where neither has to wake another processor. Hosts of a lab get
    different ones, and so do the first hosts of labs side by side."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    usable = sorted(os.sched_getaffinity(0))
    return usable[(number + worker) % len(usable)]
