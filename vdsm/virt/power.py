"""The verbs that stop, start and end guests. All block while libvirt works, and follow its view when they return."""

import contextlib
from collections.abc import Iterator

from vdsm import errors, hypervisor, logs
from vdsm.hooks import points
from vdsm.virt import endings, guestagent, launch, states, table, vm, vmhooks, vmrecord
from vdsm.virt.states import ExitReason, State

_log = logs.get("virt.power")

# A launch ends by itself at its next step; the longest one is the launcher's wait for leases.
LAUNCH_GRACE_S = 60.0
SHUTDOWN_TIMEOUT_S = 60.0


class Power:
    def __init__(
        self,
        libvirt: hypervisor.Hypervisor,
        vms: table.Table,
        ends: endings.Endings,
        records: vmrecord.VmRecords,
        launcher: launch.Launcher,
        hooks: vmhooks.VmHooks,
    ) -> None:
        self._libvirt = libvirt
        self._vms = vms
        self._ends = ends
        self._records = records
        self._launcher = launcher
        self._hooks = hooks

    def pause(self, vm_id: str) -> vm.Vm:
        """Stops the guest's CPUs. The VM keeps its leases. Raises `HookFailed`: then nothing was changed."""
        known = self._vms.get(vm_id)
        known.require("pause", states.RUNNING)
        self._hooks.before(points.BEFORE_VM_PAUSE, known)
        with self._because(known, "paused on request"):
            self._libvirt.suspend(known.id)
        self._hooks.after(points.AFTER_VM_PAUSE, known)
        return known

    def cont(self, vm_id: str, reason: str = "continued on request") -> vm.Vm:
        """Lets the guest run on. Raises `VmLeaseMismatch`, `HookFailed`: then it stays paused."""
        known = self._vms.get(vm_id)
        known.require("cont", {State.PAUSED})
        self._hooks.before(points.BEFORE_VM_CONT, known)
        known.check_leases()
        known.pause_code = None
        with self._because(known, reason):
            self._libvirt.resume(known.id)
        self._hooks.after(points.AFTER_VM_CONT, known)
        return known

    def reset(self, vm_id: str) -> vm.Vm:
        """The guest boots from its firmware again, unasked."""
        known = self._vms.get(vm_id)
        known.require("reset", states.RUNNING)
        self._libvirt.reset(known.id)
        with known.lock:
            known.boots()
            if known.state in states.RUNNING:
                known.move(known.running_state(), "reset on request")
        return known

    def shutdown(
        self,
        vm_id: str,
        *,
        delay_s: float = 0.0,
        message: str = "",
        reboot: bool = False,
        timeout_s: float = SHUTDOWN_TIMEOUT_S,
        force: bool = False,
    ) -> vm.Vm:
        """Asks the guest to power off or to reboot, and returns; see `guestagent`."""
        known = self._vms.get(vm_id)
        known.require("shutdown", states.RUNNING)
        request = guestagent.Request(
            self._libvirt, known, reboot=reboot, delay_s=delay_s, timeout_s=timeout_s, force=force, message=message
        )
        request.start()
        return known

    def destroy(self, vm_id: str) -> None:
        """Ends the VM, whatever it does, and forgets it, its console log too. Its leases are free at return.

        Raises `HypervisorUnavailable`; then nothing was changed. One that is Down is forgotten without libvirt.
        """
        known = self._vms.get(vm_id)
        if known.state != State.DOWN and not self._libvirt.connected:
            raise errors.HypervisorUnavailable(reason="VMs cannot be destroyed now")
        known.asked = states.Ending(0, ExitReason.ADMIN_SHUTDOWN, "destroyed on request")
        if known.launching:
            self._launcher.give_up(known, LAUNCH_GRACE_S)
        if known.state != State.DOWN:
            self._hooks.before_end(known)
        self._end_domain(known)
        self._ends.end(known, known.asked)
        try:
            self._records.forget(known)
        except errors.VdsmError as error:
            _log.warning("VM %s: its record does not say how it ended: %s", known.id, error)
        self._launcher.remove_console_log(known)
        # Whoever starts the VM again must not have the scripts of this life clean up under it.
        self._hooks.settle(known)
        self._vms.forget(known)

    def kill(self, known: vm.Vm, reason: str) -> None:
        """Ends QEMU for a reason of this host's own; the VM stays listed, Down."""
        _log.error("VM %s is killed: %s", known.id, reason)
        known.asked = states.Ending(1, ExitReason.GENERIC_ERROR, reason)
        self._end_domain(known)
        self._ends.end(known, known.asked)

    @contextlib.contextmanager
    def _because(self, known: vm.Vm, reason: str) -> Iterator[None]:
        """What happens inside the block happens for this reason; afterwards the VM is as libvirt sees it."""
        known.because = reason
        try:
            yield
            self._ends.settle(known)
        finally:
            known.because = ""

    def _end_domain(self, known: vm.Vm) -> None:
        if known.state == State.DOWN:
            return
        if isinstance(known.shutdown, guestagent.Request):
            known.shutdown.cancel()
        known.because = known.asked.message if known.asked is not None else ""
        with contextlib.suppress(errors.NoSuchVm):
            self._libvirt.destroy(known.id)
