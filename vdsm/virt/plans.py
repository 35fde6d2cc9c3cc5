"""What a start needs of storage: where disks are, what QEMU must hold, what the records must still say."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vdsm import config, leases, record


class DiskPlan(Protocol):
    """Storage's plan for one disk of a VM; `backing` is its chain, the nearest first."""

    @property
    def repo_name(self) -> str: ...
    @property
    def repo_id(self) -> str: ...
    @property
    def image_id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def backing(self) -> Sequence[dict[str, str]]: ...
    @property
    def leases(self) -> Sequence[leases.Lease]: ...
    @property
    def records(self) -> Sequence[dict[str, Any]]: ...


class Storage(Protocol):
    """The part of storage's door that VMs go through. Calls block, each with storage's own deadline."""

    def plan_disk(self, image_id: str, repo_id: str | None, writable: bool) -> DiskPlan: ...

    def repo_name(self, repo_id: str) -> str: ...

    def repo_id_of(self, name: str) -> str | None: ...

    def ensure_vm(self, repo_id: str, vm_id: str, fields: dict[str, Any]) -> dict[str, Any]: ...

    def read_vm(self, repo_id: str, vm_id: str) -> record.Record: ...

    def finish_vm(self, repo_id: str, vm_id: str, changes: dict[str, Any]) -> record.Record: ...

    def set_holder_lookup(self, lookup: Callable[[str], str | None]) -> None: ...


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


def combine(vm_slot: record.Slot, vm_record: record.Record, disks: Sequence[DiskPlan]) -> LeasePlan:
    """The VM's own lease, exclusive, with those of its disks; each lease once, with its strongest mode."""
    vm_check = {"slot": list(vm_slot), "expect": {"deleted": False, "generation": vm_record["generation"]}}
    wanted = [vm_slot.data_lease(), *(lease for disk in disks for lease in disk.leases)]
    checks = [vm_check, *(check for disk in disks for check in disk.records)]
    unique = {tuple(check["slot"]): check for check in checks}
    return LeasePlan(tuple(leases.ordered(wanted)), tuple(unique.values()))
