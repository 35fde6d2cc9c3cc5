"""Asking a guest to end or to boot again: its agent first, then the power button, then, if wanted, by force.

Each step gets its time. The agent knows best how to end a guest; a guest without one has ACPI; one that does not
listen to either runs on, unless force was asked for.
"""

import threading
import time

from vdsm import errors, hypervisor, logs
from vdsm.virt import states, vm
from vdsm.virt.states import State

_log = logs.get("virt.guestagent")


class Request:
    """One request to one VM, worked off by a thread of its own. A later request to the same VM takes its place."""

    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        known: vm.Vm,
        *,
        reboot: bool,
        delay_s: float,
        timeout_s: float,
        force: bool,
        message: str,
    ) -> None:
        self._libvirt = libvirt
        self._vm = known
        self._reboot = reboot
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._force = force
        self._message = message or "asked to shut down"
        self._replaced = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vm shutdown", daemon=True)

    def start(self) -> None:
        """Replaces an earlier request to this VM. A request without a delay shows in the VM's state at return."""
        with self._vm.lock:
            if isinstance(self._vm.shutdown, Request):
                self._vm.shutdown.cancel()
            self._vm.shutdown = self
            if self._delay_s <= 0:
                self._begin()
        self._thread.start()

    def cancel(self) -> None:
        """Nothing more is done for it."""
        self._replaced.set()
        self._vm.turned.set()

    def _begin(self) -> None:
        known = self._vm
        known.turned.clear()
        known.asked = None if self._reboot else _asked(self._message)
        known.move(State.REBOOT_IN_PROGRESS if self._reboot else State.POWERING_DOWN, self._message)

    def _run(self) -> None:
        with logs.about(f"vm {self._vm.id}"):
            try:
                self._work()
            except (errors.NoSuchVm, errors.HypervisorUnavailable) as error:
                _log.info("the request to the guest ends: %s", error)
            except errors.VdsmError as error:
                _log.warning("the request to the guest failed: %s", error)
                self._give_up(str(error))

    def _work(self) -> None:
        if self._delay_s > 0:
            if self._replaced.wait(self._delay_s):
                return
            with self._vm.lock:
                if self._vm.state not in states.RUNNING:
                    return
                self._begin()
        if self._asks(by_agent=True) or self._asks(by_agent=False) or self._replaced.is_set():
            return
        if self._force:
            _log.warning("the guest did not listen: by force now")
            (self._libvirt.reset if self._reboot else self._libvirt.destroy)(self._vm.id)
        else:
            self._give_up(f"the guest did not listen within {self._timeout_s:g} s")

    def _asks(self, *, by_agent: bool) -> bool:
        """Whether the guest did as it was asked in this way, or nobody wants it to any more."""
        deadline = time.monotonic() + self._timeout_s
        try:
            (self._libvirt.reboot if self._reboot else self._libvirt.shutdown)(self._vm.id, by_agent=by_agent)
        except (errors.GuestAgentSilent, errors.HypervisorFailed) as error:
            _log.info("%s: %s", "agent" if by_agent else "ACPI", error)
            return self._replaced.is_set()
        return self._obeys(deadline)

    def _obeys(self, deadline: float) -> bool:
        """Waits for the guest to do what it was asked. One that was to end and boots again goes on being waited for:
        it may have been reset a moment before."""
        while self._vm.turned.wait(max(0.0, deadline - time.monotonic())):
            self._vm.turned.clear()
            if self._reboot or self._replaced.is_set() or self._vm.state == State.DOWN:
                return True
        return False

    def _give_up(self, reason: str) -> None:
        with self._vm.lock:
            if self._replaced.is_set():
                return
            self._vm.asked = None
            if self._vm.state in (State.POWERING_DOWN, State.REBOOT_IN_PROGRESS):
                self._vm.move(self._vm.running_state(), reason)


def _asked(message: str) -> states.Ending:
    return states.Ending(0, states.ExitReason.ADMIN_SHUTDOWN, message)
