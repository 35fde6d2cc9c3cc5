"""Leases: the only importer of sanlock (with `leased_exec`, which imports this file).

A lease is a sanlock resource on storage. It belongs to the process that registered, and to every process that
inherited the registration's descriptor: sanlock frees it when the last copy of the descriptor is closed. All names are
text here; sanlock wants bytes.

Runs in workers, in the children that do repository I/O and in QEMU's launcher. The agent itself joins and leaves
lockspaces and asks questions, but holds nothing. Standard library and sanlock only: the launcher runs without the
agent's dependencies.

Every call can block as long as the storage does. SANLOCK_RUN_DIR in the environment says which daemon is meant.
"""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, Self

import sanlock

from vdsm import errors, leader

LEASE_BYTES = 1 << 20  # sanlock's alignment for 512-byte sectors and 2000 hosts, or 4096-byte sectors and 250 hosts
MAX_HOSTS = 250
NAME_BYTES = 48  # sanlock's limit for lockspace and resource names

# What sanlock answers, by what it means for a caller. Seen with sanlock 3.8.5; 11 and 16 also come for shared acquires
# of many processes at once although nobody holds the lease exclusively.
AGAIN = {11, 16}  # EAGAIN, EBUSY: collided with somebody who is just passing by
# The storage did not answer in sanlock's time (io_timeout), for one read or write: -202 the I/O itself, -210 and -211 a
# paxos block, -220 and -221 the leader. Slow storage is no answer to who holds the lease.
SLOW = {-202, -210, -211, -220, -221}
HELD_HERE = 17  # EEXIST: another process of this host holds it
HELD_ELSEWHERE = {-243, -244, -245}  # another host holds it, or was quicker
NOT_JOINED = 28  # ENOSPC: this host is not in the lockspace (yet)
NO_PLACE = 2  # ENOENT: the file is gone; on release sanlock has dropped the lease all the same
DOES_NOT_EXIST = -223
WRONG_NAME = {-226, -227}
CHANGED_VERSION = -240
IN_PARTS = 22  # EINVAL: the storage has larger sectors

SECTORS_BYTES = (512, 4096)

# How long somebody else's command for a process may keep one from asking what it holds.
INQUIRE_WAIT_S = 5.0


class Lease(NamedTuple):
    """One sanlock resource and the mode in which it is wanted. Sorts in the one order in which all take leases."""

    lockspace: str
    name: str
    path: str
    offset: int
    shared: bool = False

    @property
    def place(self) -> list[tuple[str, int]]:
        return [(self.path, self.offset)]

    def __str__(self) -> str:
        return f"lease {self.name} ({'shared' if self.shared else 'exclusive'})"


class Lockspace(NamedTuple):
    """A repository's lockspace, and the host id under which this host is in it."""

    name: str
    path: str
    offset: int
    host_id: int


def ordered(leases: Iterable[Lease]) -> list[Lease]:
    """Each name once, with its strongest mode, by (lockspace, name): the mode is no part of the order (trap 28)."""
    strongest: dict[tuple[str, str], Lease] = {}
    for lease in leases:
        known = strongest.get((lease.lockspace, lease.name))
        if known is None or (known.shared and not lease.shared):
            strongest[lease.lockspace, lease.name] = lease
    return [strongest[key] for key in sorted(strongest)]


class Host(NamedTuple):
    """A host in a lockspace: free (left it), live, failing (does not renew), dead, or unknown (seen for too short a
    time). Each join has another generation."""

    state: str
    generation: int


HOST_STATES = {
    **{sanlock.HOST_FREE: "free", sanlock.HOST_LIVE: "live", sanlock.HOST_FAIL: "failing"},
    **{sanlock.HOST_DEAD: "dead", sanlock.HOST_UNKNOWN: "unknown"},
}


class Session:
    """One registration with sanlock: what this process holds. Close it only when nothing can write any more."""

    def __init__(self) -> None:
        try:
            self.fd: int = sanlock.register()
        except sanlock.SanlockException as error:
            raise errors.LeaseDaemonDown(reason=str(error)) from error
        os.set_inheritable(self.fd, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def acquire(self, leases: Iterable[Lease], wait_s: float, *, patient: bool = False) -> None:
        """All of `leases` or none, within `wait_s`.

        Collisions, and storage that is too slow for sanlock, are retried with jitter. A lease that somebody holds is
        refused at once with `LeaseHeld`, naming the holder, unless that process has died and the lease is on its way;
        `patient` waits for any holder until the deadline (record leases, which are held for milliseconds). Raises
        `LeaseNotReady` when this host is not in the lockspace, `LeaseFailed` for anything else.
        """
        wanted = ordered(leases)
        deadline = time.monotonic() + wait_s
        pause_s = 0.005
        while True:
            refused, error = self._try(wanted)
            if refused is None:
                return
            passing = error.errno in AGAIN | SLOW or (patient and _is_held(error.errno)) or _is_going(refused, error)
            if not passing or time.monotonic() + pause_s > deadline:
                _refuse(refused, error)
            time.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(pause_s * 1.6, 0.25)

    def _try(self, wanted: list[Lease]) -> tuple[Lease | None, Any]:
        """(None, None), or the lease that was refused and why; nothing of `wanted` is held then."""
        for count, lease in enumerate(wanted):
            try:
                if not _could_succeed(lease):
                    raise sanlock.SanlockException(min(AGAIN), "Owner is failing", "its host does not renew")
                sanlock.acquire(
                    lease.lockspace.encode(), lease.name.encode(), lease.place, slkfd=self.fd, shared=lease.shared
                )
            except sanlock.SanlockException as error:
                self.release(wanted[:count])
                return lease, error
        return None, None

    def release(self, leases: Iterable[Lease]) -> None:
        """Gives back what is held; only when no process that inherited the descriptor relies on it any more.

        A lease whose place is gone, because its slot was freed, has ended with it. All are tried; the first failure
        is raised.
        """
        failures = []
        for lease in leases:
            try:
                sanlock.release(lease.lockspace.encode(), lease.name.encode(), lease.place, slkfd=self.fd)
            except sanlock.SanlockException as error:
                # Slow storage (-202): the daemon has let go, and writes that to storage when it can. The work that
                # the lease guarded is done; failing it now would tell its caller something that is not true.
                let_go = (lease.lockspace, lease.name, lease.shared) not in self.held()
                if error.errno != NO_PLACE and not let_go:
                    failures.append(_failed("release", lease, error))
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def holding(self, leases: Iterable[Lease], wait_s: float, *, patient: bool = False) -> Iterator[None]:
        """Holds `leases` inside the block. Raises what `acquire` raises."""
        wanted = ordered(leases)
        self.acquire(wanted, wait_s, patient=patient)
        try:
            yield
        finally:
            self.release(wanted)

    def held(self) -> set[tuple[str, str, bool]]:
        """(lockspace, name, shared) of all that this registration holds."""
        return _held(sanlock.inquire(slkfd=self.fd))

    def owner(self, lease: Lease) -> leader.Owner:
        """This registration as the owner of a lease that it holds, as the daemon knows; touches no storage.

        Raises `LeaseFailed` when it does not hold it.
        """
        try:
            versions = {
                (found["lockspace"].decode(), found["resource"].decode()): int(found["version"])
                for found in sanlock.inquire(slkfd=self.fd)
            }
            host_ids = {found["lockspace"].decode(): int(found["host_id"]) for found in sanlock.get_lockspaces()}
        except sanlock.SanlockException as error:
            raise _failed("inquire", lease, error) from error
        version, host_id = versions.get((lease.lockspace, lease.name)), host_ids.get(lease.lockspace)
        if version is None or host_id is None:
            raise errors.LeaseFailed(call="inquire", resource=str(lease), reason="it is not held", errno=0)
        known = hosts(lease.lockspace).get(host_id)
        return leader.Owner(host_id, known.generation if known else None, version)


def held_by(pid: int) -> set[tuple[str, str, bool]]:
    """(lockspace, name, shared) of all that the registered process `pid` holds; empty when it is not registered.

    sanlock serves one command for a process at a time: asked twice at once, it refuses one of the two (seen).
    """
    deadline = time.monotonic() + INQUIRE_WAIT_S
    while True:
        try:
            return _held(sanlock.inquire(pid=pid))
        except sanlock.SanlockException as error:
            if error.errno in (-2, 2, 3):  # no such client
                return set()
            if error.errno not in AGAIN or time.monotonic() > deadline:
                raise errors.LeaseDaemonDown(reason=str(error)) from error
            time.sleep(random.uniform(0.5, 1.0) * 0.005)


def _held(resources: list[dict[str, Any]]) -> set[tuple[str, str, bool]]:
    return {
        (found["lockspace"].decode(), found["resource"].decode(), bool(found["flags"] & sanlock.RES_SHARED))
        for found in resources
    }


# -- lockspaces ------------------------------------------------------------------------------------------------------


def write_lockspace(lockspace: Lockspace, io_timeout_s: int, sector_bytes: int = 512) -> None:
    """Formats the lockspace; refuses one that exists (its hosts would lose their leases)."""
    try:
        sanlock.read_lockspace(lockspace.path, lockspace.offset, sector=sector_bytes)
    except sanlock.SanlockException as error:
        if error.errno != DOES_NOT_EXIST:
            raise _failed("read_lockspace", lockspace, error) from error
    else:
        raise errors.NotEmpty(place=lockspace.path, reason="it holds a lockspace")
    try:
        sanlock.write_lockspace(
            lockspace.name.encode(),
            lockspace.path,
            lockspace.offset,
            max_hosts=MAX_HOSTS,
            iotimeout=io_timeout_s,
            sector=sector_bytes,
        )
    except sanlock.SanlockException as error:
        raise _failed("write_lockspace", lockspace, error) from error


def join(lockspace: Lockspace, io_timeout_s: int = 0) -> None:
    """Starts joining and returns; `state` tells when it is done: about 3 x io_timeout, more after a crash.

    `io_timeout_s` is the one that the lockspace was written with, as its repository's header knows it. Left out,
    sanlock renews the host id by its own default (10 s), and every later join takes as long as that says (trap 53).
    Joining again is harmless. Raises `LeaseFailed`.
    """
    try:
        sanlock.add_lockspace(
            lockspace.name.encode(),
            lockspace.host_id,
            lockspace.path,
            lockspace.offset,
            iotimeout=io_timeout_s,
            wait=False,
        )
    except sanlock.SanlockException as error:
        if error.errno not in (17, 115):  # EEXIST, EINPROGRESS: joined, or on the way
            raise _failed("add_lockspace", lockspace, error) from error


def state(lockspace: Lockspace) -> str:
    """ "joined", "changing" (joining or leaving) or "left", as this host's daemon sees it; touches no storage."""
    try:
        answer = sanlock.inq_lockspace(
            lockspace.name.encode(), lockspace.host_id, lockspace.path, lockspace.offset, wait=False
        )
    except sanlock.SanlockException as error:
        raise errors.LeaseDaemonDown(reason=str(error)) from error
    return {True: "joined", None: "changing", False: "left"}[answer]


def leave(lockspace: Lockspace) -> None:
    """Leaves, unless a lease is held: then `LeaseHeld` (a plain remove would kill the holders, trap 13).

    Waits until this host is out (2 x io_timeout).
    """
    try:
        sanlock.rem_lockspace(
            lockspace.name.encode(), lockspace.host_id, lockspace.path, lockspace.offset, wait=True, unused=True
        )
    except sanlock.SanlockException as error:
        if error.errno == 2:  # not in it
            return
        if error.errno == 16:
            raise errors.LeaseHeld(resource=f"lockspace {lockspace.name}", holder="a process of this host") from error
        raise _failed("rem_lockspace", lockspace, error) from error


def hosts(lockspace_name: str) -> dict[int, Host]:
    """The hosts that are or were in the lockspace, as this host's daemon knows; empty while it does not know yet."""
    try:
        found = sanlock.get_hosts(lockspace_name.encode())
    except sanlock.SanlockException:
        return {}  # not joined, or joined a moment ago
    return {host["host_id"]: Host(HOST_STATES[host["flags"]], host["generation"]) for host in found}


# -- resources -------------------------------------------------------------------------------------------------------


def initialise(lease: Lease, sector_bytes: int = 512) -> None:
    """Makes the place a lease of this name. The caller holds the repository lease.

    A lease that exists under its name is left alone: writing over a held lease gives it away (trap 12). A place that
    holds a lease of another name is refused.
    """
    try:
        found = sanlock.read_resource(lease.path, lease.offset, sector=sector_bytes)
    except sanlock.SanlockException as error:
        if error.errno != DOES_NOT_EXIST:
            raise _failed("read_resource", lease, error) from error
    else:
        if (found["lockspace"].decode(), found["resource"].decode()) == (lease.lockspace, lease.name):
            return
        raise errors.NotEmpty(place=f"{lease.path}:{lease.offset}", reason="it holds another lease")
    try:
        sanlock.write_resource(
            lease.lockspace.encode(), lease.name.encode(), lease.place, num_hosts=MAX_HOSTS, sector=sector_bytes
        )
    except sanlock.SanlockException as error:
        raise _failed("write_resource", lease, error) from error


def clear(lease: Lease, sector_bytes: int = 512) -> None:
    """Leaves no lease in its place. The caller holds it exclusively, and the repository lease; giving it back later
    changes nothing there, for sanlock finds no lease of that name."""
    try:
        sanlock.write_resource(
            lease.lockspace.encode(),
            lease.name.encode(),
            lease.place,
            num_hosts=MAX_HOSTS,
            clear=True,
            sector=sector_bytes,
        )
    except sanlock.SanlockException as error:
        raise _failed("write_resource", lease, error) from error


def owners(lease: Lease) -> list[dict[str, int]]:
    """Hosts that own the lease on storage, each {host_id, generation, timestamp, io_timeout, flags}; may be dead."""
    names = lease.lockspace.encode(), lease.name.encode()
    for sector_bytes in SECTORS_BYTES:
        try:
            found: list[dict[str, int]] = sanlock.read_resource_owners(*names, lease.place, sector=sector_bytes)
            return found
        except sanlock.SanlockException as error:
            # A lease does not say what it lies on, and large sectors refuse to be read in parts.
            if error.errno != IN_PARTS or sector_bytes == max(SECTORS_BYTES):
                raise _failed("read_resource_owners", lease, error) from error
    raise AssertionError("unreachable")


def version(lease: Lease, sector_bytes: int = 512) -> int:
    """Counts the lease's owners, from storage: another one means that somebody had it in between."""
    try:
        found = sanlock.read_resource(lease.path, lease.offset, sector=sector_bytes)
    except sanlock.SanlockException as error:
        raise _failed("read_resource", lease, error) from error
    return int(found["version"])


def force(lease: Lease) -> None:
    """Asks the sanlock of the host that owns the lease to kill the holder; returns before that is done.

    Request and kill each wait for a renewal of a host id, so it takes up to 4 x io_timeout. It does not reach owners on
    this host: sanlock never looks for requests of its own (20 s watched).
    """
    try:
        sanlock.request(lease.lockspace.encode(), lease.name.encode(), lease.place, action=sanlock.REQ_FORCE)
    except sanlock.SanlockException as error:
        raise _failed("request", lease, error) from error


def local_pids(lease: Lease) -> list[int]:
    """Registered processes of this host that hold the lease, whatever the mode."""
    listing = subprocess.run(
        ["sanlock", "client", "status", "-o", "p"], capture_output=True, text=True, timeout=10, check=False
    )
    pids, prefix = [], f"r {lease.lockspace}:{lease.name}:"
    for line in listing.stdout.splitlines():
        head, _, pid = line.strip().rpartition(" p ")
        if head.startswith(prefix) and pid.isdigit():
            pids.append(int(pid))
    return pids


def holder(lease: Lease) -> str:
    """Who holds the lease, in words: `process 4711 (qemu-system-x86)` of this host, or `host 3`."""
    pids = local_pids(lease)
    if pids:
        return ", ".join(f"process {pid} ({_command(pid)})" for pid in pids)
    others = ", ".join(f"host {owner['host_id']}" for owner in owners(lease))
    return others or "somebody who has just gone"


def _command(pid: int) -> str:
    """What runs as `pid`: the VM's uuid for a QEMU, the program's name otherwise."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as source:  # noqa: PTH123 (pathlib costs QEMU's launcher start-up)
            words = source.read().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    if "-uuid" in words[:-1]:
        return f"VM {words[words.index('-uuid') + 1]}"
    return os.path.basename(words[0]) or "kernel"  # noqa: PTH119


# -- answers ---------------------------------------------------------------------------------------------------------


def _could_succeed(lease: Lease) -> bool:
    """False while an owner's host is failing: acquire would then sit in one of sanlock's threads for a minute.

    Costs nothing while all other hosts of the lockspace are well: only then are the owners read (trap 8).
    """
    waiting = {host_id for host_id, host in hosts(lease.lockspace).items() if host.state in ("failing", "unknown")}
    return not waiting or not any(owner["host_id"] in waiting for owner in owners(lease))


def _is_held(errno: int) -> bool:
    return errno == HELD_HERE or errno in HELD_ELSEWHERE


def _is_going(lease: Lease, error: Any) -> bool:
    """Whether no process of this host lives that could hold it: its holder died, and sanlock is writing that down, or
    a tool that inherited the descriptor is about to die too."""
    return error.errno == HELD_HERE and not any(_lives(pid) for pid in local_pids(lease))


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as source:  # noqa: PTH123 (pathlib costs QEMU's launcher start-up)
            return source.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def _refuse(lease: Lease, error: Any) -> NoReturn:
    if error.errno == NOT_JOINED:
        raise errors.LeaseNotReady(
            repo_id=lease.lockspace, reason="this host is not in the lockspace", seconds_left="?"
        ) from error
    if _is_held(error.errno) or error.errno in AGAIN:
        raise errors.LeaseHeld(resource=str(lease), holder=holder(lease)) from error
    raise _failed("acquire", lease, error) from error


def _failed(call: str, what: object, error: Any) -> errors.LeaseFailed:
    return errors.LeaseFailed(call=call, resource=str(what), reason=error.args[-1], errno=error.errno)
