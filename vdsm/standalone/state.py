"""What runs where: one file in each run directory, and a list of run directories in the source tree's `build`.

`RUN/state.json`: {"boot": boot id, "supervisor": [pid, start] or null, "daemons": {name: [pid, start]}}. It is the
first file made there and goes with the directory. `build/stacks/NAME` holds the path of a run directory, so that a
new start finds what a killed one left; `build/standalone.json` names the one that `make up` left running.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vdsm.standalone import ground, layout, processes

STACKS = ground.BUILD / "stacks"


class State(NamedTuple):
    """`supervisor` is the process that ends the stack; None for one that runs in the background."""

    supervisor: processes.Identity | None
    daemons: dict[str, processes.Identity]


def write(place: layout.Layout, state: State) -> None:
    document = {"boot": _boot_id(), "supervisor": state.supervisor, "daemons": state.daemons}
    fresh = place.state.with_suffix(".new")
    fresh.write_text(json.dumps(document))
    fresh.rename(place.state)


def read(place: layout.Layout) -> State | None:
    """None when there is no stack. Processes of an earlier boot are no processes."""
    try:
        document = json.loads(place.state.read_text())
    except FileNotFoundError:
        return None
    if document["boot"] != _boot_id():
        return State(None, {})
    supervisor = document["supervisor"] and processes.Identity(*document["supervisor"])
    return State(supervisor, {name: processes.Identity(*found) for name, found in document["daemons"].items()})


@contextlib.contextmanager
def ending(place: layout.Layout) -> Iterator[bool]:
    """Held by whoever ends the stack. False: somebody else has done it meanwhile, or there was none."""
    try:
        fd = os.open(place.run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield place.state.exists()
    finally:
        os.close(fd)


def register(place: layout.Layout) -> None:
    STACKS.mkdir(parents=True, exist_ok=True)
    (STACKS / place.run_dir.name).write_text(str(place.run_dir))


def forget(place: layout.Layout) -> None:
    (STACKS / place.run_dir.name).unlink(missing_ok=True)


def abandoned() -> list[layout.Layout]:
    """Run directories of this source tree that nobody looks after: their supervisor, or all in them, is dead."""
    found = []
    for entry in STACKS.glob("*"):
        place = layout.Layout(Path(entry.read_text()))
        state = read(place)
        if state is None:
            entry.unlink(missing_ok=True)
        elif not processes.alive(state.supervisor) if state.supervisor else not processes.inside(place.run_dir):
            found.append(place)
    return found


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
