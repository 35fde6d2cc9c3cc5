"""Private, real daemons under one run directory: libvirtd, virtlogd, sanlock, supervdsmd and vdsmd.

The stack belongs to the process that started it. When that one dies, however it dies, a watcher ends the stack; when
the watcher dies too, the next start from the same source tree does. `Stack(background=True)` has no owner and runs
until `ending.stop`.
"""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from vdsm import config
from vdsm.standalone import daemons, ending, ground, layout, processes, proof, state

# Room for disks of guests, on a real file system (O_DIRECT), and every user may pass through.
PLACE = "/var/tmp"
LOG_LINES = 15


class StartError(Exception):
    """The stack could not start and nothing of it is left; the text has the last lines of the daemon's log."""


class Stack:
    """One stack. Use it as a context manager, or call `start` and `stop`. Needs root; for one thread.

    run_dir: an absent or empty directory; None makes one.
    agent: False leaves out supervdsmd and vdsmd.
    tcp: True lets vdsmd listen on a free port of the loopback interface.
    overrides: {section: {option: value}} over the standalone defaults of vdsm.toml.
    prepare: puts what the daemons need beside that into the run directory, before they start; gets all paths, returns
    more overrides.
    background: True lets the stack outlive this process.
    """

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        agent: bool = True,
        tcp: bool = False,
        overrides: ground.Overrides | None = None,
        prepare: Callable[[layout.Layout], ground.Overrides] = lambda place: {},
        background: bool = False,
    ) -> None:
        self._wanted_dir = run_dir
        self._with_agent = agent
        self._overrides: dict[str, dict[str, Any]] = {name: dict(values) for name, values in (overrides or {}).items()}
        if tcp:
            self._overrides.setdefault("wire", {}).setdefault("tcp_port", _free_port())
        self._prepare = prepare
        self._background = background
        self._place: layout.Layout | None = None
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._watcher: subprocess.Popen[bytes] | None = None
        self._namespace_fd = -1

    # -- where things are --------------------------------------------------------------------------------------------

    @property
    def place(self) -> layout.Layout:
        """All paths. Valid from `start` to `stop`."""
        if self._place is None:
            raise RuntimeError("the stack is not started")
        return self._place

    @property
    def run_dir(self) -> Path:
        return self.place.run_dir

    @property
    def socket_path(self) -> Path:
        """The agent's JSON-RPC socket."""
        return self.place.agent_socket

    @property
    def import_dir(self) -> Path:
        return self.place.imports

    @property
    def export_dir(self) -> Path:
        return self.place.exports

    @property
    def storage_dir(self) -> Path:
        return self.place.storage

    @property
    def settings(self) -> config.Config:
        """The agent's configuration, as it reads it."""
        return config.load(str(self.place.config))

    @property
    def tcp_port(self) -> int:
        """0: the agent does not listen on TCP."""
        return self.settings.wire.tcp_port

    @property
    def agent_pid(self) -> int:
        return self._running["vdsmd"].pid

    def inside(self, argv: list[str]) -> list[str]:
        """`argv` as a command in the stack's mount namespace, to be run by this user while this process lives."""
        return ["nsenter", f"--mount=/proc/{os.getpid()}/fd/{self._namespace_fd}", "--", *argv]

    # -- start and stop ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Returns when every daemon serves and sanlock was seen to kill. Raises `StartError` or `GroundError`."""
        ground.check_machine()
        ending.stop_abandoned()
        ground.ensure_user()
        self._place = layout.Layout(self._make_run_dir())
        self._save()
        state.register(self._place)
        try:
            with ground.usual_umask():
                ground.make_directories(self._place)
                self._watch()
                ground.write_configuration(self._place, {**self._overrides, **self._prepare(self._place)})
                ground.install_code(self._place)
            self._start_daemons()
        except BaseException as error:
            self.stop()
            if isinstance(error, config.ConfigError | proof.ProofError):
                raise StartError(str(error)) from error
            raise
        return self

    def stop(self) -> None:
        """Ends everything and removes the run directory; nothing when it is not started. Raises `StuckError`."""
        if self._place is None:
            return
        ending.stop(self._place)
        for daemon in self._running.values():
            daemon.wait()
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.close()
            self._watcher.wait()
        if self._namespace_fd >= 0:
            os.close(self._namespace_fd)
        self._running.clear()
        self._place, self._watcher, self._namespace_fd = None, None, -1

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # -- the agent alone ---------------------------------------------------------------------------------------------

    def start_agent(self) -> None:
        """Returns when it serves. Raises `StartError`."""
        self._start(daemons.vdsmd(self.place))

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal that ends it, and waits until it is gone. Guests and leases stay."""
        agent = self._running["vdsmd"]
        agent.send_signal(number)
        agent.wait(ending.AGENT_GRACE_S)

    def restart_agent(self) -> None:
        """A proper stop, when it still runs, and a new start."""
        if self._running["vdsmd"].poll() is None:
            self.kill_agent(signal.SIGTERM)
        self.start_agent()

    # -- how ---------------------------------------------------------------------------------------------------------

    def _make_run_dir(self) -> Path:
        if self._wanted_dir is None:
            return Path(tempfile.mkdtemp(prefix="vdsm-", dir=PLACE)).resolve()
        self._wanted_dir.mkdir(parents=True, exist_ok=True)
        if any(self._wanted_dir.iterdir()):
            raise ground.GroundError(f"{self._wanted_dir} is not empty")
        return self._wanted_dir.resolve()

    def _save(self) -> None:
        supervisor = None if self._background else processes.identify(os.getpid())
        found = {name: processes.identify(daemon.pid) for name, daemon in self._running.items()}
        state.write(self.place, state.State(supervisor, {name: one for name, one in found.items() if one}))

    def _watch(self) -> None:
        """Its standard input ends when this process does."""
        if self._background:
            return
        command = [sys.executable, "-m", "vdsm.standalone", "watch", "--run-dir", str(self.run_dir)]
        with self.place.log("watcher").open("wb") as log:
            self._watcher = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ground.SOURCE, start_new_session=True
            )

    def _start_daemons(self) -> None:
        place = self.place
        self._start(daemons.sanlock(place, self.settings.host.name))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            proved = pool.submit(proof.prove_kill, place, self.inside)
            self._start(daemons.virtlogd(place))
            self._start(daemons.libvirtd(place))
            if self._with_agent:
                self._start(daemons.supervdsmd(place))
            self._ask_libvirt()
            if self._with_agent:
                self.start_agent()
            proved.result()

    def _ask_libvirt(self) -> None:
        """It accepts connections early, and answers when its drivers are up: QEMU was asked what it can do."""
        daemon = daemons.libvirtd(self.place)
        try:
            subprocess.run(
                ["virsh", "-c", self.place.libvirt_uri, "version"],
                env=daemons.environment(self.place),
                capture_output=True,
                timeout=daemon.deadline_s,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise StartError(f"libvirtd does not answer ({error}):\n{self._tail(daemon)}") from error

    def _start(self, daemon: daemons.Daemon) -> None:
        """The first one makes the namespace, the others join it."""
        argv = list(daemon.argv)
        if self._namespace_fd < 0:
            kvm = "kvm" if daemons.qemu_may_use_kvm() else "no-kvm"
            argv = [*daemons.PYTHON, "vdsm.standalone.namespace", str(self.run_dir), kvm, *argv]
        else:
            argv = self.inside(argv)
        with self.place.log(daemon.name).open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=daemons.environment(self.place),
                cwd="/",
                umask=0o022,
                start_new_session=True,
            )
        self._running[daemon.name] = process
        self._save()
        self._await(daemon, process)
        if self._namespace_fd < 0:
            self._namespace_fd = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)

    def _await(self, daemon: daemons.Daemon, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + daemon.deadline_s
        while not daemons.serves(daemon):
            if process.poll() is not None:
                raise StartError(f"{daemon.name} ended with {process.returncode}:\n{self._tail(daemon)}")
            if time.monotonic() > deadline:
                raise StartError(f"{daemon.name} does not serve after {daemon.deadline_s} s:\n{self._tail(daemon)}")
            time.sleep(0.02)

    def _tail(self, daemon: daemons.Daemon) -> str:
        lines = self.place.log(daemon.name).read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
