"""What libvirt tells unasked, turned into moves of VMs.

libvirt's events arrive in its own thread, which must not wait for anything: they are queued and handled by one thread
here, in order. An event only says where to look: the state is asked for again, since a verb may have been quicker.
How a domain ended is in the event alone.
"""

import queue
import threading
from collections.abc import Callable

from vdsm import errors, hypervisor, logs
from vdsm.virt import domxml, endings, growing, states, table, vm
from vdsm.virt.states import State

_log = logs.get("virt.domainevents")

NO_SPACE = "enospc"  # of an event "io_error"


class Watcher:
    """`compare` is called when libvirt is there (again): nobody told what happened meanwhile."""

    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        vms: table.Table,
        ends: endings.Endings,
        growth: growing.Growth,
        compare: Callable[[], object],
    ) -> None:
        self._libvirt = libvirt
        self._vms = vms
        self._ends = ends
        self._growth = growth
        self._compare = compare
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vm events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Handles what is queued, and ends."""
        self._queue.put(None)
        self._thread.join()

    def on_domain(self, event: hypervisor.DomainEvent) -> None:
        """Never blocks."""
        self._queue.put(lambda: self._handle(event))

    def on_connection(self, up: bool, reason: str) -> None:
        """Never blocks."""
        self._queue.put(self._compare if up else lambda: self._vms.lost(reason))

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
            except errors.HypervisorUnavailable as error:
                _log.info("an event is left to the comparison after the reconnect: %s", error)
            except Exception:  # noqa: BLE001 - the border of the thread: later events must still be handled
                _log.exception("cannot handle an event")

    def _handle(self, event: hypervisor.DomainEvent) -> None:
        known = self._vms.find(event.vm_id)
        if known is None or known.launching:
            return  # not ours, or its launch looks itself
        with logs.about(f"vm {known.id}"):
            _log.info("libvirt: %s %s", event.kind, event.detail)
            _HANDLERS.get(event.kind, Watcher._look)(self, known, event)

    def _look(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        self._vms.observe(known)

    def _stopped(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        if not self._vms.observe(known):  # otherwise the event is about an earlier domain of this VM
            self._ends.end(known, states.ending(event.detail, by_guest=known.guest_ended, asked=known.asked))

    def _shutting_down(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        known.guest_ended = event.detail == "guest"
        self._vms.observe(known)

    def _rebooted(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        with known.lock:
            known.boots()
            known.tell("rebooted", "the guest boots again")
            if known.state in states.RUNNING:
                known.move(known.running_state(), "the guest boots again")

    def _agent(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        with known.lock:
            known.agent(event.detail == "connected")
            if known.agent_connected and known.state == State.POWERING_UP:
                known.move(State.UP, "the guest agent is there")

    def _io_error(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        known.pause_code = event.detail.upper()
        disk = domxml.disk_of(known.xml, event.disk)
        self._vms.observe(known, f"{f'disk {disk}' if disk else 'a disk'} failed: {event.detail}")
        if event.detail == NO_SPACE:
            self._growth.watch(known)

    def _threshold(self, known: vm.Vm, event: hypervisor.DomainEvent) -> None:
        self._growth.want(known, event.detail, event.offset)


_HANDLERS = {
    "stopped": Watcher._stopped,
    "shutdown": Watcher._shutting_down,
    "rebooted": Watcher._rebooted,
    "agent": Watcher._agent,
    "io_error": Watcher._io_error,
    "threshold": Watcher._threshold,
}
