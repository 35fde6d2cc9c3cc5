"""What a job's body has in its hands while it runs."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdsm import channels, errors, forkserver, leases, logs, programs, record
from vdsm.jobs import adoption, fate, ledger

_log = logs.get("jobs.worker")

TELL_S = 0.25  # the agent hears of progress at most this often,
RECORD_S = 5.0  # and the record, at whole percents: each write costs a lease cycle and a sync (trap 63)


class Context:
    """One job in its worker's main thread.

    Every method raises `Aborted` once the job is to be aborted, except while it is undone. `argument` is the
    request's; `record` is the entity's record as it was when the work began.
    """

    def __init__(
        self,
        argument: dict[str, Any],
        stages: Sequence[str],
        channel: channels.Channel,
        fate: fate.Fate,
        ledger: ledger.Ledger,
    ) -> None:
        self.argument = argument
        self.record: record.Record = {}
        self.job_id = ledger.job_id
        self._stages = stages
        self._stage = 0
        self._percent: int | None = None
        self._channel = channel
        self._fate = fate
        self._ledger = ledger
        self._told = 0.0
        self._recorded = time.monotonic()

    @property
    def session(self) -> leases.Session:
        """The worker's registration with sanlock: for functions that write records, or hold more than `Body.leases`."""
        return self._ledger.session

    @property
    def aborted(self) -> bool:
        """True once the job is to be aborted: for loops that come by no other method."""
        return self._fate.aborted

    def check(self) -> None:
        """Does nothing but raise `Aborted`."""
        self._fate.check()

    def stage(self, name: str) -> None:
        """Stage `name`, one of the body's `stages`, begins: the record says that those before it are done."""
        self._fate.check()
        number = self._stages.index(name) + 1
        recorded = self._stage == 0 and number == 1  # by the claim
        self._stage, self._percent = number, None
        if not recorded:
            self._record_standing()
        self._tell_standing()

    def progress(self, percent: int) -> None:
        """The stage is done to `percent`; -1: it goes on, but does not tell how far it is. Cheap: call it often."""
        self._fate.check()
        if percent == self._percent:
            return
        self._percent = percent
        now = time.monotonic()
        if now - self._told >= TELL_S or percent == 100:
            self._tell_standing()
        if now - self._recorded >= RECORD_S:
            try:
                self._record_standing()
            except errors.LeaseHeld as error:  # a number for readers is not worth the job
                _log.warning("%s %% not recorded: %s", percent, error)

    def tool(
        self,
        argv: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        limits: programs.Limits | None = None,
    ) -> programs.Completed:
        """Runs a program to its end; `on_line` gets its lines in this thread, the answer holds the last ones.

        It inherits the leases, so that nobody else gets them while it can still write. When this returns or raises,
        the program is gone, with everything that it started. Raises `ToolFailed` for an exit code other than 0,
        `DeadlinePassed`, `Aborted`.
        """
        fds = [*self._ledger.fds, self._channel.liveness_fd]
        running = self._fate.start(lambda: programs.start(argv, on_line=on_line, env=env, pass_fds=fds, limits=limits))
        try:
            completed = running.wait(timeout_s)
        finally:
            self._fate.tool_ended()
            _end_children()
        self._fate.check()
        return programs.check(completed, argv[0])

    def adoption(self) -> contextlib.AbstractContextManager[dict[str, str]]:
        """Environment for a tool that uses libguestfs, whose appliance gets the leases though it closes everything."""
        return adoption.offered([*self._ledger.fds, self._channel.liveness_fd])

    def flush(self, path: str) -> None:
        """Makes the data at `path` durable, and its name. The framework does this for `Body.outputs`."""
        for opened in (Path(path), Path(path).parent):
            fd = os.open(opened, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def update(self, change: ledger.Change) -> record.Record:
        """Writes the entity's record: `change` gets it as it is and returns it as it shall be.

        Raises `Superseded` when the work is not this job's any more: somebody took it over.
        """
        self._fate.check()
        return self._ledger.write(change)

    def commit(self, change: ledger.Change) -> record.Record:
        """The commit point of work over several entities: what follows is rolled forward, never undone.

        `update` with the work's state "committing"; its mark "committed" stays, whoever takes it over. An abort is
        refused from now on, and whoever finds the work unfinished calls `Body.roll_forward`.
        """
        self._fate.commit()
        return self._ledger.write(lambda known: ledger.working(change(known), state="committing", committed=True))

    def begin(self, generation: int | None) -> None:
        """For the framework: claims the entity. Raises `Superseded`, `GenerationMismatch`, `Aborted`."""
        self._fate.check()
        first = {"stage": 1, "stages": len(self._stages), "stage_name": self._stages[0]} if self._stages else {}
        self.record = self._ledger.claim(generation, **first)

    def _standing(self) -> dict[str, Any]:
        name = self._stages[self._stage - 1] if self._stage else None
        stage = self._stage or None
        return {"percent": self._percent, "stage": stage, "stages": len(self._stages) or None, "stage_name": name}

    def _tell_standing(self) -> None:
        self._told = time.monotonic()
        with contextlib.suppress(ConnectionError):  # the control thread sees the agent's end
            self._channel.send({"progress": self._standing()})

    def _record_standing(self) -> None:
        self._recorded = time.monotonic()
        self._ledger.write(lambda known: ledger.working(known, **self._standing()))


def _end_children() -> None:
    """Kills whatever a tool left behind, and returns when it is gone.

    The worker is a subreaper: what lost its parent, in whatever session, is its own child now.
    """
    while children := forkserver.adopted(set()):
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
