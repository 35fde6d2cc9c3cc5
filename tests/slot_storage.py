"""Storage's door for VMs over real slots: real sanlock leases and real records in a directory, without the agent's
processes around them. Disks are raw files; what virt asks of storage is all there is."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.until import until
from vdsm import errors, ids, leases, record, storage

IO_TIMEOUT_S = 1
SIZE_BYTES = 1 << 20


class SlotStorage:
    """One repository, known as `repo`, whose lockspace this host has joined: see `create`."""

    REPO_ID = "repo"

    def __init__(self, directory: Path, name: str, gid: int) -> None:
        self.directory = directory
        self.name = name
        self.gid = gid
        self.connected = True
        # What a test does between the plan and the launch, or instead of a call to the door.
        self.before: dict[str, Callable[[], object]] = {}
        self.lockspace = leases.Lockspace(name, str(directory / "repository"), 0, 1)
        self.session = leases.Session()
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path, gid: int) -> "SlotStorage":
        """Makes the repository and joins its lockspace, which takes 3 s."""
        directory.mkdir()
        os.chown(directory, -1, gid)
        directory.chmod(0o2770)
        made = cls(directory, ids.new(), gid)
        made._file("repository", leases.LEASE_BYTES)
        leases.write_lockspace(made.lockspace, IO_TIMEOUT_S)
        leases.join(made.lockspace)
        until(lambda: leases.state(made.lockspace) == "joined")
        return made

    def most_registrations(self) -> int:
        return 1

    def leave(self) -> None:
        self.session.close()
        leases.leave(self.lockspace)

    # -- what the tests prepare and look at

    def add_disk(self, content: bytes = b"", **fields: Any) -> str:
        image_id = ids.new()
        data_file = self._file(f"{image_id}.data", SIZE_BYTES)
        with data_file.open("r+b") as file:
            file.write(content)
        known = {"id": image_id, "kind": "disk", "status": "optimized", "deleted": False, "base": None, "generation": 1}
        data = {"name": f"{image_id}.data", "format": "raw"}
        self._make(self.slot(image_id), {**known, "data": data, "work": None, **fields})
        return image_id

    def slot(self, name: str) -> record.Slot:
        return record.Slot(self.name, name, str(self.directory / name), 0)

    def change(self, name: str, /, **fields: Any) -> None:
        with self._lock:
            record.update(self.session, self.slot(name), lambda known: {**known, **fields})

    def owners(self, name: str) -> list[dict[str, int]]:
        return leases.owners(self.slot(name).data_lease())

    # -- the door

    def plan_disk(self, image_id: str, repo_id: str | None, writable: bool) -> storage.DiskPlan:
        self.before.get("plan_disk", bool)()
        try:
            found = record.read(self.slot(image_id))
        except (errors.NoRecord, FileNotFoundError) as error:
            raise errors.NoSuchImage(image_id=image_id, where=repo_id or "any repository") from error
        expect = {field: found[field] for field in ("status", "data", "base", "deleted")}
        return storage.DiskPlan(
            self.REPO_ID,
            self.name,
            image_id,
            str(self.directory / found["data"]["name"]),
            found["data"]["format"],
            SIZE_BYTES,
            [],
            [self.slot(image_id).data_lease(shared=not writable)],
            [{"slot": list(self.slot(image_id)), "expect": expect}],
        )

    def keeping(self, plans: Iterable[storage.DiskPlan]) -> contextlib.AbstractContextManager[None]:
        """Files need nothing."""
        return contextlib.nullcontext()

    def repo_name(self, repo_id: str) -> str:
        if repo_id != self.REPO_ID:
            raise errors.NoSuchRepository(repo_id=repo_id)
        return self.name

    def repo_id_of(self, name: str) -> str | None:
        return self.REPO_ID if self.connected and name == self.name else None

    def ensure_vm(self, repo_id: str, vm_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.before.get("ensure_vm", bool)()
        slot = self.slot(vm_id)
        if not Path(slot.path).exists():
            known = {"id": vm_id, "kind": "vm", "status": "optimized", "deleted": False, "generation": 0, "work": None}
            self._make(slot, {**known, **fields})
        return {"slot": list(slot), "record": record.read(slot)}

    def read_vm(self, repo_id: str, vm_id: str) -> record.Record:
        return record.read(self.slot(vm_id))

    def finish_vm(self, repo_id: str, vm_id: str, changes: dict[str, Any]) -> record.Record:
        self.before.get("finish_vm", bool)()
        self.change(vm_id, **changes)
        return record.read(self.slot(vm_id))

    def set_holder_lookup(self, lookup: Callable[[str], str | None]) -> None:
        self.holder = lookup

    def _make(self, slot: record.Slot, fields: dict[str, Any]) -> None:
        self._file(slot.name, record.SLOT_BYTES)
        leases.initialise(slot.data_lease())
        leases.initialise(slot.record_lease())
        record.create(slot, fields)

    def _file(self, name: str, size_bytes: int) -> Path:
        path = self.directory / name
        path.touch()
        os.chown(path, -1, self.gid)
        path.chmod(0o660)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        return path
