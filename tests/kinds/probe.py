"""A job kind that does what a test tells it to, step by step, and keeps a journal of what it did.

The argument: {"slot": [...] or None, "shared": [[lease fields]...], "directory": path, "steps": [[name, value...]...],
"generation": n}. The directory gets `journal`, one word a line, and `made`, which stands for the half made data.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdsm import channels, errors, leases, record
from vdsm.jobs import context, worker


@worker.body("probe")
class Probe(worker.Body):
    stages = ("first", "second")

    def entity(self, argument: worker.Argument) -> record.Slot | None:
        return record.Slot(*argument["slot"]) if argument["slot"] else None

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        slot = self.entity(argument)
        return [leases.Lease(*fields) for fields in argument["shared"]] + ([slot.data_lease()] if slot else [])

    def run(self, ctx: worker.Context) -> None:
        note(ctx, "run")
        made(ctx).write_text("half made")
        for name, *values in ctx.argument["steps"]:
            STEPS[name](ctx, *values)

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        if ["kill_in_commit"] in ctx.argument["steps"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"result": "made"}

    def undo(self, ctx: worker.Context) -> None:
        note(ctx, "undo")
        made(ctx).unlink(missing_ok=True)
        for name, *values in ctx.argument["steps"]:
            if name.startswith("undo_"):
                STEPS[name.removeprefix("undo_")](ctx, *values)

    def aborted(self, ctx: worker.Context, known: record.Record) -> dict[str, Any] | None:
        if ["vanish"] in ctx.argument["steps"]:
            slot = self.entity(ctx.argument)
            assert slot is not None
            record.erase(slot)
            return None
        return {"was": "aborted"}

    def roll_forward(self, ctx: worker.Context) -> None:
        note(ctx, "roll_forward")


@worker.body("resumable")
class Resumable(Probe):
    """Stopped, it leaves its record to whoever goes on."""

    resumable = True


@worker.body("noop")
class Noop(Probe):
    """Nothing but leases and record: what the framework itself costs."""

    stages = ()

    def run(self, ctx: worker.Context) -> None:
        pass

    def undo(self, ctx: worker.Context) -> None:
        pass


def note(ctx: worker.Context, word: str) -> None:
    with Path(ctx.argument["directory"], "journal").open("a") as journal:
        journal.write(f"{word}\n")


def made(ctx: worker.Context) -> Path:
    return Path(ctx.argument["directory"], "made")


def fail(ctx: worker.Context) -> None:
    raise errors.ToolFailed(program="probe", exit_code=9, reason="as told")


def bug(ctx: worker.Context) -> None:
    raise ZeroDivisionError("a secret of the inside")


def die(ctx: worker.Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pause(ctx: worker.Context, name: str) -> None:
    """Tells the test that it is here, and waits until the test says go on; deaf to aborts, as a long call is."""
    note(ctx, name)
    while not Path(ctx.argument["directory"], f"go-{name}").exists():
        time.sleep(0.005)


def loop(ctx: worker.Context) -> None:
    note(ctx, "loop")
    while not ctx.aborted:
        time.sleep(0.005)
    ctx.check()


def die_before_message(ctx: worker.Context) -> None:
    """Dies after the final record and before the message about it: no seam of the worker lies between those two."""
    send = ctx._channel.send

    def send_or_die(message: dict[str, Any]) -> None:
        if "ended" in message:
            os.kill(os.getpid(), signal.SIGKILL)
        send(message)

    ctx._channel.send = send_or_die  # type: ignore[method-assign]  # dies in the middle of it


def adopt(ctx: worker.Context, argv: list[str]) -> None:
    """Offers the leases for adoption, notes where, and runs the tool meanwhile."""
    with ctx.adoption() as environment:
        note(ctx, environment["VDSM_LEASE_SOCKET"])
        ctx.tool(argv, env=environment, on_line=lambda line: note(ctx, line))


def tool(ctx: worker.Context, *argv: str) -> None:
    with contextlib.suppress(errors.DeadlinePassed):
        ctx.tool(argv, on_line=lambda line: note(ctx, line))


def record_every_percent(ctx: worker.Context) -> None:
    """As if five seconds lay between any two percents of this worker."""
    context.RECORD_S = 0.0


STEPS: dict[str, Callable[..., object]] = {
    "stage": lambda ctx, name: ctx.stage(name),
    "progress": lambda ctx, percent: ctx.progress(percent),
    "tool": tool,
    "adopt": adopt,
    "fail": fail,
    "bug": bug,
    "die": die,
    "pause": pause,
    "loop": loop,
    "commit": lambda ctx: ctx.commit(lambda known: {**known, "decided": True}),
    "die_before_message": die_before_message,
    "note": note,
    "record_every_percent": record_every_percent,
    "kill_in_commit": lambda ctx: None,
    "vanish": lambda ctx: None,
    "undo_bug": lambda ctx: None,
}


def nothing(argument: dict[str, Any], channel: channels.Channel) -> None:
    """A child that is no job: what a process costs without the framework."""
