"""What a VM's record says of its life: with which disks it was started, where, and how it ended.

The record lives in the VM's lease repository, so that a VM that runs nowhere is still known. Only the host whose QEMU
holds the VM's lease writes how it started, and only that host writes how it ended: a start that was refused leaves no
trace, and a late word about an old run never hides a newer one. Beside storage's own fields it holds

    name, disks     [{"repo": persistent name of the repository, "image_id"}]
    last_host       name of the host that ran it last
    started         when VM.create was called there, seconds since 1970
    exit_code, exit_reason, exit_message    None while it runs, or when nobody saw its end yet
    forgotten       it ended and was destroyed on request since
"""

import concurrent.futures
from collections.abc import Iterable

from vdsm import errors, logs, record, storage
from vdsm.virt import vm

_log = logs.get("virt.vmrecord")
WRITERS = 2


class VmRecords:
    """Writes go through storage and block with its deadline; those about ends happen in threads of their own."""

    def __init__(self, service: storage.Storage, host_name: str) -> None:
        self._storage = service
        self._host_name = host_name
        self._pool = concurrent.futures.ThreadPoolExecutor(WRITERS, thread_name_prefix="vm record")

    def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ensure(self, known: vm.Vm, repo_id: str) -> tuple[record.Slot, record.Record]:
        """The VM's slot and record, made if there is none. An existing one is left as it is."""
        found = self._storage.ensure_vm(repo_id, known.id, {"name": known.spec.name, "disks": list(known.disks)})
        return record.Slot(*found["slot"]), found["record"]

    def started(self, known: vm.Vm) -> None:
        """Its QEMU holds the leases. Raises when the record cannot be written now."""
        if known.lease_repo is None:
            return
        known.record_due = {
            "name": known.spec.name,
            "disks": list(known.disks),
            **{"last_host": self._host_name, "started": known.created},
            **{"exit_code": None, "exit_reason": None, "exit_message": None, "forgotten": False},
        }
        known.recorded = True
        self.flush(known)

    def try_started(self, known: vm.Vm) -> None:
        """As `started`, but what cannot be written now is tried again by `retry`: after a restart of the agent the
        repository may not be connected yet."""
        try:
            self.started(known)
        except errors.VdsmError as error:
            _log.warning("cannot record the start, trying again later: %s", error)

    def ended(self, known: vm.Vm) -> None:
        """Its QEMU is gone. Returns at once; what cannot be written now is tried again by `retry`."""
        ending = known.ending
        if known.lease_repo is None or not known.recorded or ending is None:
            return
        known.record_due = {**known.record_due, **ending.to_record()}
        self._pool.submit(self._try, known)

    def forget(self, known: vm.Vm) -> None:
        """It was destroyed on request: after a restart nobody wants to hear of it. Raises when the record cannot be
        written now."""
        if known.recorded and known.lease_repo is not None:
            known.record_due = {**known.record_due, "forgotten": True}
            self.flush(known)

    def retry(self, all_vms: Iterable[vm.Vm]) -> None:
        for known in all_vms:
            if known.record_due:
                self._pool.submit(self._try, known)

    def flush(self, known: vm.Vm) -> None:
        """Writes what the record lacks. Raises when that is not possible now."""
        with known.record_lock:
            due = known.record_due
            if not due:
                return
            assert known.lease_repo is not None
            repo_id = self._storage.repo_id_of(known.lease_repo)
            if repo_id is None:
                raise errors.NoSuchRepository(repo_id=known.lease_repo)
            if (self._storage.read_vm(repo_id, known.id).get("started") or 0) > known.created:
                _log.warning("VM %s was started elsewhere since; not recording how this run went", known.id)
            else:
                self._storage.finish_vm(repo_id, known.id, due)
            known.record_due = {name: value for name, value in known.record_due.items() if due.get(name) != value}

    def _try(self, known: vm.Vm) -> None:
        with logs.about(f"vm {known.id}"):
            try:
                self.flush(known)
            except errors.VdsmError as error:
                _log.warning("cannot record how the VM goes, trying again later: %s", error)
            except Exception:  # noqa: BLE001 - the border of the thread
                _log.exception("cannot record how the VM goes")
