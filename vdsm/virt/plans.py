"""What QEMU must hold, and what the records must still say when it does."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vdsm import config, leases, record, storage


@dataclasses.dataclass(frozen=True)
class LeasePlan:
    """What the launcher takes and checks before it becomes QEMU."""

    leases: tuple[leases.Lease, ...]
    records: tuple[dict[str, Any], ...]

    def to_launcher(self, settings: config.Config) -> dict[str, Any]:
        """As `leased_exec` reads it."""
        return {
            "sanlock_run_dir": settings.sanlock.run_dir,
            "wait_s": settings.storage.lease_wait_s,
            "leases": [list(lease) for lease in self.leases],
            "records": list(self.records),
        }


def combine(vm_slot: record.Slot, vm_record: record.Record, disks: Sequence[storage.DiskPlan]) -> LeasePlan:
    """The VM's own lease, exclusive, with those of its disks; each lease once, with its strongest mode."""
    vm_check = {"slot": list(vm_slot), "expect": {"deleted": False, "generation": vm_record["generation"]}}
    wanted = [vm_slot.data_lease(), *(lease for disk in disks for lease in disk.leases)]
    checks = [vm_check, *(check for disk in disks for check in disk.records)]
    unique = {tuple(check["slot"]): check for check in checks}
    return LeasePlan(tuple(leases.ordered(wanted)), tuple(unique.values()))
