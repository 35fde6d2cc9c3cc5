"""An agent's storage and jobs whose child processes can be traced, killed, and left alone with what they had begun.

Everything below the wire is the product's: `storage.Storage`, the job pool, the fork server, the children. Only where
a process is spawned a tracer may be put on it first.
"""

import concurrent.futures
import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import until
from tests.crash import child, tracing, worlds
from vdsm import errors, events, forkserver, storage
from vdsm.jobs import job, pool, registry
from vdsm.storage import ioproc
from vdsm.virt import sysprep, template, vmjobs

TOOLS = ("qemu-img", "virt-sysprep")
_HERE = Path(__file__).resolve().parent


@dataclass
class Plan:
    """What is traced while a verb runs, and what is injected where.

    `victim` is the one process or tool that gets `effect`, an injection; None: all are traced and nothing is injected.
    `host_dies`: when the victim has died nobody is left to do anything about it. `deadly`: who started a tool dies with
    it. `wound`: the number of a tool that is killed with who started it, besides all else; `hang`: of one that does not
    end when it has done its work.
    """

    victim: str | None = None
    effect: str | None = None
    host_dies: bool = True
    deadly: bool = True
    wound: int | None = None
    hang: int | None = None
    spawned: Counter[str] = field(default_factory=Counter)
    pids: dict[str, int] = field(default_factory=dict)


class Host(forkserver.ForkServer):
    """The fork server, and a directory for traces and tools. `plan` is None as long as nothing is to be traced.

    `names` are those of the repositories' places, for the children that work there.
    """

    def __init__(self, directory: Path, names: dict[str, str], *, real_tools: bool) -> None:
        preload = ["vdsm.jobs.worker", *storage.preload(), sysprep.__name__, template.__name__, child.PRELOADED]
        super().__init__(preload, "WARNING", str(directory / "children.log"))
        self.directory = directory
        self._names = names
        self.job_s = 1200.0 if real_tools else 60.0  # virt-sysprep takes minutes on a busy host without KVM
        self.plan: Plan | None = None
        self._tracers = contextlib.ExitStack()
        self._spawned: list[forkserver.Child] = []
        for where in ("bin", "real"):
            (directory / where).mkdir()
        for name in TOOLS:
            (directory / "bin" / name).symlink_to(_HERE / "tool")
            ours = _HERE / name
            stand_in = ours.exists() and not real_tools
            (directory / "real" / name).symlink_to(ours if stand_in else str(shutil.which(name)))

    def environment(self) -> dict[str, str]:
        """What the fork server has to be started with."""
        return {"CRASH_DIR": str(self.directory), "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}"}

    @contextlib.contextmanager
    def planned(self, plan: Plan) -> Iterator[Plan]:
        """Inside the block children are traced as planned; at its end all traced ones and their tracers are gone."""
        for old in (*self.directory.glob("*.log"), self.directory / "calls", self.directory / "hanging"):
            if old.name != "children.log":
                old.unlink(missing_ok=True)
        (self.directory / "plan").write_text(_tool_plan(plan))
        self.plan = plan
        try:
            yield plan
        finally:
            self.plan = None
            (self.directory / "plan").unlink(missing_ok=True)
            self._tracers.close()

    def hangs(self) -> bool:
        """Whether a tool has done its work and does not end, as planned."""
        return (self.directory / "hanging").exists()

    def log(self, process: str) -> Path:
        return self.directory / f"{process}.log"

    def processes(self) -> list[str]:
        """All that left a trace."""
        return sorted(path.stem for path in self.directory.glob("*.log") if path.name != "children.log")

    def children(self) -> list[str]:
        """Pids of all that the fork server has not buried yet."""
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def close_lines(self) -> None:
        """Closes what an agent that has gone has left open to its children."""
        for spawned in self._spawned:
            if spawned.channel.fileno() != -1:
                spawned.close()
        self._spawned.clear()

    def spawn(self, target: str, argument: dict[str, Any], *, fds: Any = ()) -> forkserver.Child:
        spawned = self._spawn(target, argument, fds)
        self._spawned.append(spawned)
        return spawned

    def _spawn(self, target: str, argument: dict[str, Any], fds: Any) -> forkserver.Child:
        if self.plan is None or target == ioproc.MONITORING:  # which looks whenever it wants to, and changes nothing
            return super().spawn(target, argument, fds=fds)
        role = self._role(target, argument)
        self.plan.spawned[role] += 1
        process = f"{role}-{self.plan.spawned[role]}"
        self._refuse_after_death(self.plan, role)
        if self.plan.victim not in (None, process):
            free = super().spawn(target, argument, fds=fds)
            self.plan.pids[process] = free.pid
            return free
        held = super().spawn(child.TARGET, {"target": target, "argument": argument}, fds=fds)
        self.plan.pids[process] = held.pid
        self._tracers.enter_context(tracing.attached(held.pid, self.log(process), self.plan.effect))
        held.channel.send({"go": True})
        return held

    def _role(self, target: str, argument: dict[str, Any]) -> str:
        if target.startswith(ioproc.__name__):
            return self._names[argument["place"]]
        return f"conclude-{argument['kind']}" if "verdict" in argument else str(argument["kind"])

    @staticmethod
    def _refuse_after_death(plan: Plan, role: str) -> None:
        """A host that has died starts nothing, least of all what would conclude the work of a dead worker."""
        if plan.victim is None or not plan.host_dies:
            return
        dead = any(not until.running(pid) for process, pid in plan.pids.items() if process == plan.victim)
        if dead or (role.startswith("conclude") and not plan.victim.startswith("conclude")):
            raise errors.Unexpected(reason="the host is dead")


def _tool_plan(plan: Plan) -> str:
    """What `tool` reads."""
    number = plan.victim.removeprefix("tool-") if plan.victim and plan.victim.startswith("tool-") else 0
    told = {
        "victim": "all" if plan.victim is None else number,
        "effect": f"-e {plan.effect}" if plan.effect else "",
        "tracer": " ".join(tracing.options()),
        "deadly": int(plan.deadly),
        "wound": plan.wound or 0,
        "hang": plan.hang or 0,
    }
    return "".join(f"{name}='{value}'\n" for name, value in told.items())


class _NoVms:
    """This host runs none."""

    def find(self, vm_id: str) -> None:
        return None


class _Emulated:
    def get(self) -> str:
        return "qemu"


class Agent:
    """A host's agent from its start: the two repositories of `world` connected, no job known."""

    def __init__(self, world: worlds.World, host: Host) -> None:
        self.host = host
        self.world = world
        settings = world.settings(host.directory)
        log = events.EventLog()
        self.pool = pool.Pool(host, workers=2, lease_wait_s=2.0)
        self.jobs = registry.Registry(self.pool, log)
        self.storage = storage.Storage(settings, log, host, self.jobs, world.helper())
        self.vms = vmjobs.VmJobs(
            settings,
            _NoVms(),  # type: ignore[arg-type]  # what little of it is asked here
            self.storage,
            self.jobs,
            _Emulated(),  # type: ignore[arg-type]  # what little of it is asked here
            lambda *_: None,
        )

    @contextlib.contextmanager
    def running(self, within_s: float = 30) -> Iterator["Agent"]:
        """`within_s`: how long it may take to join the repositories."""
        self.storage.start()
        self.pool.start()
        try:
            with concurrent.futures.ThreadPoolExecutor() as at_once:
                list(at_once.map(lambda name: self.connect(name, within_s), ("main", "other")))
            yield self
        finally:
            assert self.pool.stop(30)
            self.storage.stop()

    def connect(self, name: str, within_s: float = 30) -> None:
        """Returns when the repository is joined."""
        self.storage.connect_storage_repository(name, *self.world.connection(name))
        until.until(
            lambda: self.storage.gate([name])() is None, within_s
        )  # asks no child: the verb's are the first ones

    def ended(self, job_id: str | None) -> None:
        """Waits for the job; raises `Failed` when it has not done its work."""
        if job_id is None:
            return
        info: job.Info = self.jobs.wait(job_id, self.host.job_s)
        assert info["ended"], info
        if info["status"] != "done":
            raise Failed(info)

    def later(self) -> None:
        """As `recovery.Mender` has it."""
        self.world.sweep()

    def aborted(self, job_id: str, *, stop: bool = False, dies: bool = False) -> None:
        """Aborts the job when a tool of it hangs; raises `Failed` when that has not taken its work away.

        `dies`: its worker never hears of it, so that another one has to conclude.
        """
        until.until(lambda: self.host.hangs() or self.jobs.wait(job_id, 0)["ended"], 30)
        pids = self.host.plan.pids if self.host.plan is not None and dies else {}
        workers = [pid for process, pid in pids.items() if process.rpartition("-")[0] not in ("main", "other")]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in workers:
                os.kill(pid, number)
            if number == signal.SIGSTOP:
                self.jobs.abort(job_id, stop=stop)
        info: job.Info = self.jobs.wait(job_id, self.host.job_s)
        ended = Failed(info)
        if info["status"] != "aborted" or ended.key != (errors.Stopped.key if stop else None):
            raise ended

    def settle(self) -> None:
        """Returns when no job is under way."""
        for info in self.jobs.list():
            self.jobs.wait(info["id"], self.host.job_s)


class Failed(Exception):
    """A job that has ended otherwise than done."""

    @property
    def key(self) -> str | None:
        """Which error the job's caller is shown; None for an abort."""
        error = self.args[0]["error"]
        return error and error["data"]["key"] if error else None
