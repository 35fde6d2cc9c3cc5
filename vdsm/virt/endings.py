"""The end of a VM: it goes Down with a reason, once, and its record learns of it."""

from vdsm import errors
from vdsm.virt import states, table, vm, vmhooks, vmrecord


class Endings:
    """Called by events, launches, verbs and comparisons, whoever sees it first."""

    def __init__(self, vms: table.Table, records: vmrecord.VmRecords, hooks: vmhooks.VmHooks) -> None:
        self._vms = vms
        self._records = records
        self._hooks = hooks

    def end(self, known: vm.Vm, ending: states.Ending, error: errors.VdsmError | None = None) -> None:
        if known.end(ending, error):
            self._records.ended(known)
            self._hooks.ended(known)

    def gone(self, known: vm.Vm) -> None:
        """Its domain is not there, and nobody said why: it ended while libvirt or this agent was away."""
        lost = states.Ending(1, states.ExitReason.LOST_QEMU, "its domain is gone; it ended unseen")
        self.end(known, known.asked or lost)

    def settle(self, known: vm.Vm, reason: str = "") -> None:
        """Follows libvirt's view of the VM now, whatever that is."""
        try:
            if not self._vms.observe(known, reason):
                self.gone(known)
        except errors.HypervisorUnavailable as error:
            with known.lock:
                if known.state != states.State.DOWN:
                    known.move(states.State.UNKNOWN, str(error))
