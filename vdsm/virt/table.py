"""All VMs of this host, and their comparison with libvirt.

libvirt is the truth: a domain with our metadata is one of our VMs, whether this process started it or one before it.
Other domains are somebody else's; they are reported and never touched. Wherever the table was wrong it is corrected,
and the difference is recorded.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from vdsm import errors, hypervisor, logs
from vdsm.virt import differences, domxml, spec, states, vm
from vdsm.virt.states import State

_log = logs.get("virt.table")


class Foreign(NamedTuple):
    """A domain that is somebody else's."""

    name: str
    status: State


class Table:
    """`most` tells how many VMs there may be now: each is registered with sanlock, and so are others (trap 7)."""

    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        publish: vm.Publish,
        recorded: differences.Differences,
        most: Callable[[], int],
    ) -> None:
        self._libvirt = libvirt
        self._publish = publish
        self._differences = recorded
        self._most = most
        self._lock = threading.Lock()
        self._vms: dict[str, vm.Vm] = {}
        self._foreign: dict[str, Foreign] = {}
        self.compared = threading.Event()  # set once the VMs that run here are known
        self._comparing = threading.Lock()

    # -- looking up ---------------------------------------------------------------------------------------------------

    def all(self) -> list[vm.Vm]:
        with self._lock:
            return list(self._vms.values())

    def foreign(self) -> dict[str, Foreign]:
        """Domains that are not ours by id, as of the last comparison."""
        return self._foreign

    def find(self, vm_id: str) -> vm.Vm | None:
        return self._vms.get(vm_id)

    def get(self, vm_id: str) -> vm.Vm:
        """Raises `NoSuchVm`, `ForeignVm`."""
        found = self._vms.get(vm_id.lower())
        if found is None and vm_id.lower() in self._foreign:
            raise errors.ForeignVm(vm_id=vm_id, name=self._foreign[vm_id.lower()].name)
        if found is None:
            raise errors.NoSuchVm(vm_id=vm_id)
        return found

    def holder(self, image_id: str) -> str | None:
        """Which VM uses the image, in words; None when none does. One that is being launched holds nothing yet."""
        for known in self.all():
            if (
                not known.launching
                and known.state != State.DOWN
                and any(disk.image_id == image_id for disk in known.spec.disks)
            ):
                return f"VM {known.spec.name} ({known.id})"
        return None

    # -- coming and going ---------------------------------------------------------------------------------------------

    def reserve(self, wanted: spec.VmSpec) -> vm.Vm:
        """A new VM, waiting for its launch. Raises `VmExists`, `Overloaded`, `HypervisorUnavailable`."""
        if not self.compared.is_set():
            raise errors.HypervisorUnavailable(reason="the VMs that run here are not known yet")
        now = time.time()
        condition = states.Condition(State.WAIT_FOR_LAUNCH, "created", now)
        with self._lock:
            known = self._vms.get(wanted.vm_id)
            if known is not None:
                raise errors.VmExists(vm_id=wanted.vm_id, status=known.state)
            if wanted.vm_id in self._foreign:
                raise errors.VmExists(vm_id=wanted.vm_id, status="not of this agent")
            most = self._most()
            if sum(other.state != State.DOWN for other in self._vms.values()) >= most:
                raise errors.Overloaded(what="VMs", limit=most)
            reserved = vm.Vm(wanted, now, self._publish, condition)
            self._vms[wanted.vm_id] = reserved
            reserved.tell("created", "created")  # before anybody else can find it, and tell more of it
        return reserved

    def forget(self, known: vm.Vm) -> None:
        with self._lock:
            if self._vms.get(known.id) is not known:
                return
            del self._vms[known.id]
            known.tell("forgotten", "forgotten on request")

    def take_ended(self, ended: vm.Vm) -> bool:
        """Lists a VM that ended unseen, Down; False when there is a VM or a domain of that id."""
        with self._lock:
            if ended.id in self._vms or ended.id in self._foreign:
                return False
            self._vms[ended.id] = ended
            return True

    # -- comparing with libvirt ---------------------------------------------------------------------------------------

    def observe(self, known: vm.Vm, reason: str = "") -> bool:
        """Asks libvirt for the VM's state and follows it. False when its domain is gone; then nothing is changed."""
        with known.lock:
            if known.launching or known.state == State.DOWN:
                return True
            try:
                domain = self._libvirt.state(known.id)
            except errors.NoSuchVm:
                return False
            if domain.state in ("shutoff", "crashed"):
                return False  # a transient domain on its way out
            known.apply(domain, reason)
            return True

    def lost(self, reason: str) -> None:
        """libvirt cannot be asked any more: nobody knows what the VMs do, most likely they run on."""
        for known in self.all():
            with known.lock:
                if not known.launching and known.state != State.DOWN:
                    known.move(State.UNKNOWN, f"libvirt is lost: {reason}")

    def compare(self, found: Callable[[vm.Vm], object], gone: Callable[[vm.Vm], object], patience_s: float) -> int:
        """Makes the table agree with libvirt; how many domains and VMs were compared. Raises `HypervisorUnavailable`.

        `found` is called for each of our domains that the table did not have, `gone` for each VM whose domain is not
        there any more; its event, which knows how it ended, is waited for `patience_s` before. VMs that are being
        launched are left alone: their launch knows better.
        """
        with self._comparing:
            # Before libvirt is asked: a VM that is launched meanwhile must not be missed in an older list.
            before = [known for known in self.all() if not known.launching and known.state != State.DOWN]
            domains = self._libvirt.domains()
            self._adopt(domains, found)
            differing = [known for known in before if not _agrees(known, domains.get(known.id))]
            lost = [known for known in differing if not self._correct(known)]
            deadline = time.monotonic() + patience_s
            for known in lost:
                if not known.ended.wait(max(0.0, deadline - time.monotonic())):
                    had = known.state
                    gone(known)
                    self._tell_difference(known, had)
            self.compared.set()
            return len(domains.keys() | {known.id for known in before})

    def _correct(self, known: vm.Vm) -> bool:
        """Whether its domain is still there."""
        had, asked_for = known.state, known.because
        if not self.observe(known):
            return False
        if not asked_for:  # otherwise a verb is at it, and was quicker than its event
            self._tell_difference(known, had)
        return True

    def _tell_difference(self, known: vm.Vm, had: State) -> None:
        now = known.condition
        if now.state != had:
            self._differences.record(known.id, had, now.state, now.reason, "the table was corrected")

    def _adopt(self, domains: dict[str, hypervisor.DomainState], found: Callable[[vm.Vm], object]) -> None:
        foreign = {}
        for vm_id in domains.keys() - {known.id for known in self.all()}:
            try:
                metadata = self._metadata(vm_id)
                if metadata is None:
                    status = vm.follow(State.UNKNOWN, domains[vm_id].state, State.UP)
                    foreign[vm_id] = Foreign(self._libvirt.name(vm_id), status)
                else:
                    rebuilt = self._rebuild(metadata)
                    self._differences.record(rebuilt.id, None, rebuilt.state, "found in libvirt", "taken over")
                    found(rebuilt)
            except errors.NoSuchVm:
                continue  # it ended meanwhile
        before, self._foreign = self._foreign, foreign
        self._report_foreign(before, foreign)

    def _report_foreign(self, before: dict[str, Foreign], now: dict[str, Foreign]) -> None:
        for vm_id in now.keys() - before.keys():
            reason = f"domain {now[vm_id].name} was not started by this agent"
            self._differences.record(vm_id, None, now[vm_id].status, reason, "left alone")
        for vm_id in before.keys() - now.keys():
            reason = f"domain {before[vm_id].name}, which was not ours, is gone"
            self._differences.record(vm_id, before[vm_id].status, None, reason, "nothing")

    def _metadata(self, vm_id: str) -> domxml.Metadata | None:
        """Ours, or None for a foreign domain, which is any domain that we cannot read ours from."""
        text = self._libvirt.metadata(vm_id, domxml.NAMESPACE)
        if text is None:
            return None
        try:
            return domxml.parse_metadata(text)
        except (ValueError, errors.InvalidParameters) as error:
            _log.warning("domain %s is left alone: %s", vm_id, error)
            return None

    def _rebuild(self, metadata: domxml.Metadata) -> vm.Vm:
        """The VM of a domain that an earlier life of this agent started."""
        state = State.UNKNOWN if metadata.launched else State.WAIT_FOR_LAUNCH
        rebuilt = vm.Vm(
            metadata.spec,
            metadata.created,
            self._publish,
            states.Condition(state, "found in libvirt", time.time()),
        )
        rebuilt.leases, rebuilt.lease_repo, rebuilt.disks = metadata.leases, metadata.lease_repo, metadata.disks
        rebuilt.stays_paused = metadata.paused
        if metadata.launched:
            rebuilt.launch_done.set()
            rebuilt.recorded = True
        rebuilt.learn(domxml.parse_live(self._libvirt.xml(metadata.spec.vm_id)))
        rebuilt.find_pid()
        with self._lock:
            self._vms[rebuilt.id] = rebuilt
        self.observe(rebuilt, "found again after a restart of the agent")
        return rebuilt


def _agrees(known: vm.Vm, domain: hypervisor.DomainState | None) -> bool:
    return domain is not None and vm.follow(known.state, domain.state, known.running_state()) == known.state
