"""Proves that this sanlock can kill whoever may hold a lease.

A sanlock that cannot signal a holder goes on trying while the holder goes on writing, and nobody notices until the
lease has passed on. So at each start one process of every user that will hold leases takes one, the lockspace is
removed under it, and it must be dead.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from vdsm.standalone import daemons, ground, layout

HOLDERS = (("root", "root"), (ground.USER, ground.USER), (ground.QEMU_USER, ground.STORAGE_GROUP))
LOCKSPACE = "standalone-proof"
LEASE_BYTES = 1 << 20
# The shortest that sanlock takes: joining takes three times as long.
IO_TIMEOUT_S = 1
DEADLINE_S = 20.0
# sanlock looks at its lockspaces every second.
KILL_S = 5.0


class ProofError(Exception):
    """sanlock does not protect leases here."""


def prove_kill(place: layout.Layout, inside: Callable[[list[str]], list[str]]) -> None:
    """Takes about four seconds, most of it waiting for the lockspace. `inside` moves a command into the stack's
    namespace. Raises `ProofError`."""
    area = place.sanlock / "proof"
    with area.open("wb") as file:
        file.truncate(LEASE_BYTES * (1 + len(HOLDERS)))
    area.chmod(0o660)
    shutil.chown(area, group=ground.STORAGE_GROUP)  # as images are: sanlock reaches them by it
    _sanlock(place, "init", "-s", f"{LOCKSPACE}:0:{area}:0", "-o", str(IO_TIMEOUT_S))
    for number, (user, _) in enumerate(HOLDERS, 1):
        _sanlock(place, "init", "-r", _resource(user, area, number))
    joined = f"{LOCKSPACE}:1:{area}:0"
    _sanlock(place, "add_lockspace", "-s", joined, "-o", str(IO_TIMEOUT_S))
    with contextlib.ExitStack() as probes:
        running = {
            user: probes.enter_context(_holder(place, inside, user, group, _resource(user, area, number)))
            for number, (user, group) in enumerate(HOLDERS, 1)
        }
        probes.enter_context(_removal(place, joined))
        for user, probe in running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(KILL_S)
            if probe.returncode not in (-9, -15):
                raise ProofError(f"sanlock cannot kill processes of user {user}: see {place.log('sanlock')}")


def _resource(user: str, area: Path, number: int) -> str:
    return f"{LOCKSPACE}:{user}:{area}:{number * LEASE_BYTES}"


@contextlib.contextmanager
def _holder(
    place: layout.Layout, inside: Callable[[list[str]], list[str]], user: str, group: str, resource: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of that user that holds the lease, a minute at most."""
    command = ["sanlock", "client", "command", "-r", resource, "-c", "/bin/sh", "-c", "echo held; exec sleep 60"]
    argv = inside(daemons.as_user(user, group, command))
    with subprocess.Popen(
        argv, env=daemons.environment(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
    ) as probe:
        assert probe.stdout is not None
        said = [probe.stdout.readline()]
        while said[-1] and said[-1] != b"held\n":
            said.append(probe.stdout.readline())
        if not said[-1]:
            raise ProofError(f"user {user} cannot take a lease: {b''.join(said).decode().strip()}")
        try:
            yield probe
        finally:
            probe.kill()


@contextlib.contextmanager
def _removal(place: layout.Layout, lockspace: str) -> Iterator[None]:
    """Removes the lockspace, which kills its holders first. Nobody waits for the rest of it, two seconds later."""
    command = ["sanlock", "client", "rem_lockspace", "-s", lockspace]
    with subprocess.Popen(command, env=daemons.environment(place), stdout=subprocess.DEVNULL) as removal:
        try:
            yield
        finally:
            removal.kill()


def _sanlock(place: layout.Layout, action: str, *arguments: str) -> None:
    command = ["sanlock", "client", action, *arguments]
    try:
        done = subprocess.run(
            command, env=daemons.environment(place), capture_output=True, text=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired as error:
        raise ProofError(f"sanlock {action} does not end: see {place.log('sanlock')}") from error
    if done.returncode != 0:
        raise ProofError(f"sanlock {action}: {done.stdout} {done.stderr}")
