"""Ends a stack, from whatever state it is in, in the order that keeps every lease true.

Needs nothing of the process that started it: the run directory tells what runs, and the mount namespace what else
does. The order: guests, the agent, what the agent left, the root helper and libvirt, sanlock last, since a lease must
not go before the last process that relies on it.
"""

import contextlib
import shutil
import signal
import subprocess

from vdsm.standalone import daemons, layout, processes, state

# The agent stops its jobs and waits for their workers; libvirt saves nothing of transient domains.
AGENT_GRACE_S = 20.0
DAEMON_GRACE_S = 10.0
# Workers and tools end by themselves when the agent has gone.
WORKER_GRACE_S = 5.0


class StuckError(Exception):
    """Some processes do not die; the run directory and sanlock are left."""


def stop(place: layout.Layout) -> None:
    """Returns when nothing of the stack is left, also when somebody else ended it or there was none.
    Raises `StuckError`."""
    with state.ending(place) as ours:
        if ours:
            _stop(place)
            shutil.rmtree(place.run_dir)
    state.forget(place)


def stop_abandoned() -> None:
    for place in state.abandoned():
        stop(place)


def _stop(place: layout.Layout) -> None:
    found = state.read(place)
    known = found.daemons if found else {}
    _destroy_domains(place)
    processes.end(_named(known, "vdsmd"), AGENT_GRACE_S)
    _end_others(place, known, WORKER_GRACE_S)
    processes.end(_named(known, "supervdsmd", "libvirtd", "virtlogd"), DAEMON_GRACE_S)
    _end_others(place, {name: one for name, one in known.items() if name == "sanlock"}, 0)
    _stop_sanlock(place, known)
    left = processes.inside(place.run_dir)
    if left:
        raise StuckError(f"processes {[one.pid for one in left]} of {place.run_dir} do not die")


def _named(known: dict[str, processes.Identity], *names: str) -> list[processes.Identity]:
    return [known[name] for name in names if name in known]


def _end_others(place: layout.Layout, known: dict[str, processes.Identity], grace_s: float) -> None:
    """Kills what is none of the daemons nor a child of one."""
    family = {one.pid for one in known.values() if processes.alive(one)}
    others = [
        one for one in processes.inside(place.run_dir) if one.pid not in family and processes.parent(one) not in family
    ]
    for one in processes.wait_gone(others, grace_s):
        processes.send(one, signal.SIGKILL)
    left = processes.wait_gone(others, 5)
    if left:
        raise StuckError(f"processes {[one.pid for one in left]} do not die; sanlock goes on for their leases")


def _destroy_domains(place: layout.Layout) -> None:
    """By libvirt, which tidies up after them. What it cannot do in time is done by signal afterwards."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        numbers = _virsh(place, "list --id", 10).split()
        if numbers:
            _virsh(place, "; ".join(f"destroy {number}" for number in numbers), 60)


def _virsh(place: layout.Layout, commands: str, timeout_s: float) -> str:
    argv = ["virsh", "-c", place.libvirt_uri, commands]
    return subprocess.run(
        argv, env=daemons.environment(place), capture_output=True, text=True, timeout=timeout_s, cwd="/"
    ).stdout


def _stop_sanlock(place: layout.Layout, known: dict[str, processes.Identity]) -> None:
    """Asked first, so that it gives its host ids back and the next join of the same storage is quick."""
    daemon = _named(known, "sanlock")
    if any(processes.alive(one) for one in daemon):
        command = ["sanlock", "client", "shutdown", "-f", "1", "-w", "1"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=daemons.environment(place), capture_output=True, timeout=15)
        processes.end(daemon, 5)
    _end_others(place, {}, 1)
