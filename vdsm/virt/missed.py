"""VMs that ended while nobody watched: the agent was away, or the host. Their records tell of them.

A running VM is known by its domain; one that has ended has none. Its record names the host that ran it last. When a
repository has been joined, each VM that ran here last and is not in the table is looked at: if its lease is free, it
has ended, and the record gets an end if it has none. It is listed, Down, until it is destroyed, which the record
remembers. A VM without a repository for its record is not remembered by anybody.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from vdsm import errors, events, logs, record, storage
from vdsm.virt import differences, spec, states, table, vm

_log = logs.get("virt.missed")

# Repositories looked at at once. One that is stuck holds its thread until its deadline.
_THREADS = 2

UNSEEN = states.Ending(1, states.ExitReason.LOST_QEMU, "ended while the agent was away; nobody saw how")


class Missed:
    def __init__(
        self,
        vms: table.Table,
        service: storage.Storage,
        recorded: differences.Differences,
        publish: vm.Publish,
        host_name: str,
    ) -> None:
        self._table = vms
        self._storage = service
        self._differences = recorded
        self._publish = publish
        self._host_name = host_name
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="vm missed")
        self._lock = threading.Lock()
        self._again: set[str] = set()  # repositories that did not tell of all their VMs
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self, log: events.EventLog) -> None:
        """Looks at each repository when it has been joined."""
        self._unsubscribe = log.subscribe(self._hear)

    def stop(self) -> None:
        self._unsubscribe()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def retry(self) -> None:
        """Looks again, behind the call, at what could not be told before."""
        with self._lock:
            again, self._again = self._again, set()
        for repo_id in again:
            self._pool.submit(self._look, repo_id)

    def _hear(self, event: events.Event) -> None:
        """In the publisher's thread, which must not wait."""
        if event.topic == "repository" and event.params.get("state") == "joined":
            self._pool.submit(self._look, event.subject)

    def _look(self, repo_id: str) -> None:
        try:
            name = self._storage.repo_name(repo_id)
            known = [known.id for known in self._table.all()]
            found = self._storage.end_vms(repo_id, self._host_name, UNSEEN.to_record(), known)
            for ended in found["ended"]:
                self._list(name, ended)
            again = any(self._table.find(vm_id) is None for vm_id in found["held"])
        except errors.NoSuchRepository:
            return
        except errors.VdsmError as error:
            _log.warning("cannot tell which VMs of %s have ended, trying again later: %s", repo_id, error)
            again = True
        except Exception:  # noqa: BLE001 - the border of the thread
            _log.exception("cannot tell which VMs of %s have ended", repo_id)
            return
        if again:
            with self._lock:
                self._again.add(repo_id)

    def _list(self, repo_name: str, found: record.Record) -> None:
        ended = self._rebuild(repo_name, found)
        if self._table.take_ended(ended):
            ended.tell("state", ended.condition.reason)
            self._differences.record(ended.id, None, ended.state, ended.condition.reason, "reported from its record")

    def _rebuild(self, repo_name: str, found: record.Record) -> vm.Vm:
        disks = [{"image_id": disk["image_id"], "repo_id": self._repo_id(disk["repo"])} for disk in found["disks"]]
        known: dict[str, Any] = {"vm_id": found["id"], "name": found["name"], "disks": disks}
        wanted = spec.VmSpec.parse({**known, "lease_repo_id": self._repo_id(repo_name)})
        ending = states.Ending.from_record(found)
        return vm.Vm.ended_before(wanted, found["started"], self._publish, ending, repo_name, tuple(found["disks"]))

    def _repo_id(self, name: str) -> str | None:
        return self._storage.repo_id_of(name)
