"""A root helper that has, besides the real calls, some that misbehave. Started by tests with limits as JSON:

{"hang_s": deadline of Hang, "prepare_s": deadline of PrepareDirectory, "server": {...}, "session": {...}}: limits that
are sized for production would make tests wait for many seconds. "dmi": another directory with the firmware's files,
since a test machine may have none.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from supervdsm import __main__ as program
from supervdsm import calls, contract, hardware, server, session, settings, worker

limits: dict[str, Any] = json.loads(sys.argv.pop(1))
for module in (server, session):
    for name, value in limits.get(module.__name__.removeprefix("supervdsm."), {}).items():
        assert hasattr(module, name)
        setattr(module, name, value)
calls.PrepareDirectory.deadline_s = limits.get("prepare_s", calls.PrepareDirectory.deadline_s)
hardware.DMI = pathlib.Path(limits.get("dmi", hardware.DMI))


@dataclasses.dataclass(frozen=True)
class Nothing:
    done: bool


@dataclasses.dataclass(frozen=True)
class Hang(contract.Call[Nothing], deadline_s=limits.get("hang_s", 0.5)):
    """Writes the ids of its process and of a program it started into a file, and never ends."""

    pid_file: contract.AbsolutePath


@dataclasses.dataclass(frozen=True)
class Finish(contract.Call[Nothing], deadline_s=0.5):
    """Has a program that, told to end, comes to an end of its own, which is that it makes a file."""

    path: contract.AbsolutePath


@dataclasses.dataclass(frozen=True)
class Fail(contract.Call[Nothing], deadline_s=5):
    """Fails in one of several ways."""

    how: str


def hang(call: Hang, context: settings.Settings) -> Nothing:
    child = subprocess.Popen(["sleep", "600"])
    path = pathlib.Path(call.pid_file)
    path.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
    path.with_suffix(".new").rename(path)
    while True:
        signal.pause()


def finish(call: Finish, context: settings.Settings) -> Nothing:
    script = 'trap "sleep 0.3; touch $0; exit" TERM; while :; do sleep 0.02; done'
    subprocess.run(["sh", "-c", script, call.path], check=True)
    return Nothing(done=True)


def fail(call: Fail, context: settings.Settings) -> Any:
    match call.how:
        case "fault":
            raise RuntimeError("the secret of the inside")
        case "os":
            raise PermissionError(13, "Permission denied")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "shape":
            return {"done": True}
        case "member":
            return Nothing(done="yes")  # type: ignore[arg-type]  # the mistake that is tested


worker.ROOMS |= {Hang: hang, Finish: finish, Fail: fail}
sys.exit(program.main())
