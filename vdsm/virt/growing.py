"""Disks that grow while their VM writes them: grown in time, and a VM that was quicker goes on.

Storage grows them, and says at which end of what is written to ask again; libvirt tells when a write has passed that,
its threshold. A disk is looked at

    when its VM was launched, or found by a new agent       the threshold is set
    when a write has passed its threshold                   it grows, and the threshold is set anew
    when its VM was stopped because a disk was full         likewise, and the VM goes on
    when a sample shows no threshold, or one that is passed, or a VM that is stopped so: an event was lost

A look that fails is tried again, ever more seldom, as long as its VM runs: what a full repository lacks may come.
Threads: one starts the looks that are due; each repository has some of its own for them, for one that hangs must not
keep the disks of another from growing.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vdsm import errors, hypervisor, logs, periodic, storage
from vdsm.virt import domxml, table, vm
from vdsm.virt.states import State

_log = logs.get("virt.growing")

# Looks at disks of one repository at once. One that is stuck holds its thread until storage's deadline.
_THREADS = 2
# How long (seconds) a look that failed waits for the next one: at first, and at most. A VM that stands still goes on so
# long after its repository was extended.
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 10.0
_IDLE_S = 3600.0
_STOP_GRACE_S = 5.0


class Disk(NamedTuple):
    """A disk of a VM, by the name that libvirt has for it."""

    vm_id: str
    name: str


@dataclasses.dataclass
class _Look:
    """When (monotonic seconds) it is due, how often it has failed, and how far was written as far as is known."""

    due: float
    failures: int = 0
    written_bytes: int = 0


class Growth:
    """`cont(known, reason)` lets a VM that is paused run on."""

    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        vms: table.Table,
        service: storage.Storage,
        cont: Callable[[vm.Vm, str], object],
    ) -> None:
        self._libvirt = libvirt
        self._vms = vms
        self._storage = service
        self._cont = cont
        self._lock = threading.Lock()
        self._looks: dict[Disk, _Look] = {}
        self._busy: set[Disk] = set()
        self._pools: dict[str, concurrent.futures.ThreadPoolExecutor] = {}  # by the repository's persistent name
        self._keeper = periodic.Periodic("vm disks", self._pause_s, self._start_due)

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        self._keeper.stop(_STOP_GRACE_S)
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    # -- what is to be looked at --------------------------------------------------------------------------------------

    def watch(self, known: vm.Vm) -> None:
        """Looks at all disks of the VM that grow. Never blocks, as all of these."""
        for name in known.growing:
            self.want(known, name)

    def want(self, known: vm.Vm, name: str, written_bytes: int = 0) -> None:
        """Looks at one disk now; at one that cannot grow when its pause is over."""
        if name not in known.growing:
            return
        with self._lock:
            look = self._looks.setdefault(Disk(known.id, name), _Look(time.monotonic()))
            look.written_bytes = max(look.written_bytes, written_bytes)
        self._keeper.poke()

    def sampled(self, known: vm.Vm, fields: dict[str, Any]) -> None:
        """From libvirt's fields of a sample: looks where an event was lost."""
        stopped = hypervisor.state_in(fields) == _STOPPED
        for at in range(fields.get("block.count", 0)):
            name, written_bytes = fields.get(f"block.{at}.name", ""), fields.get(f"block.{at}.allocation")
            threshold = fields.get(f"block.{at}.threshold", 0)
            if stopped or (written_bytes is not None and written_bytes >= threshold):
                self.want(known, name)

    # -- looking ------------------------------------------------------------------------------------------------------

    def _pause_s(self) -> float:
        with self._lock:
            due = [look.due for disk, look in self._looks.items() if disk not in self._busy]
        return max(0.0, min(due) - time.monotonic()) if due else _IDLE_S

    def _start_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = {disk: look for disk, look in self._looks.items() if look.due <= now and disk not in self._busy}
            for disk, look in due.items():
                del self._looks[disk]
                known = self._vms.find(disk.vm_id)
                if known is not None and known.state != State.DOWN:
                    self._busy.add(disk)
                    self._pool(_repository(known, disk.name)).submit(self._run, known, disk, look)

    def _pool(self, repo_name: str) -> concurrent.futures.ThreadPoolExecutor:
        if repo_name not in self._pools:
            self._pools[repo_name] = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="vm disks")
        return self._pools[repo_name]

    def _run(self, known: vm.Vm, disk: Disk, look: _Look) -> None:
        with logs.about(f"vm {known.id}"):
            try:
                self._look(known, disk.name, look)
            except errors.NoSuchVm:
                pass
            except errors.VdsmError as error:
                self._again(known, disk, look, error)
            except Exception as error:  # noqa: BLE001 - the border of the thread: the disk must go on being looked at
                _log.exception("cannot look at disk %s", disk.name)
                self._again(known, disk, look, errors.Unexpected(reason=type(error).__name__))
        with self._lock:
            self._busy.discard(disk)
        self._keeper.poke()

    def _again(self, known: vm.Vm, disk: Disk, look: _Look, error: errors.VdsmError) -> None:
        pause_s = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2**look.failures)
        with self._lock:
            newer = self._looks.get(disk, look)
            written_bytes = max(look.written_bytes, newer.written_bytes)
            self._looks[disk] = _Look(time.monotonic() + pause_s, look.failures + 1, written_bytes)
        reason = f"disk {disk.name} cannot grow: {error}"
        _log.warning("%s; trying again in %s s", reason, pause_s)
        if look.failures == 0:
            known.tell("disk", reason, disk=disk.name, image_id=_image(known, disk.name), error=error.to_wire())
        if known.pause_code == _NO_SPACE:
            known.restate(State.PAUSED, reason)

    def _look(self, known: vm.Vm, name: str, look: _Look) -> None:
        repo_name = _repository(known, name)
        repo_id = self._storage.repo_id_of(repo_name)
        if repo_id is None:  # after a restart of the agent, until somebody connects it
            raise errors.NoSuchRepository(repo_id=repo_name)
        known.check_leases()
        full = self._is_full(known, name)
        if full:
            known.pause_code = _NO_SPACE  # a new agent has not seen the event
        written_bytes = max(look.written_bytes, self._libvirt.written_bytes(known.id, name))
        asks_at = self._storage.grow_disk(repo_id, _image(known, name), None if full else written_bytes)
        if asks_at is None:
            return
        self._libvirt.set_threshold(known.id, name, asks_at)
        _log.info("disk %s: %s bytes are written, asking again at %s", name, written_bytes, asks_at)
        if full:
            self._cont(known, f"disk {name} has room again")

    def _is_full(self, known: vm.Vm, name: str) -> bool:
        """Whether the VM stands still for want of room, in this disk too, and for nothing else."""
        if self._libvirt.state(known.id) != _STOPPED:
            return False
        failed = self._libvirt.disk_errors(known.id)
        return name in failed and set(failed.values()) == {"no_space"}


_STOPPED = hypervisor.DomainState("paused", "ioerror")
_NO_SPACE = "ENOSPC"  # a VM's `pause_code`


def _repository(known: vm.Vm, name: str) -> str:
    """The persistent name of the repository with the disk."""
    return known.disks[domxml.targets(known.spec).index(name)]["repo"]


def _image(known: vm.Vm, name: str) -> str:
    return known.disks[domxml.targets(known.spec).index(name)]["image_id"]
