"""The verbs of leases, on the agent's side: a VM's lease and record, who has one, and taking work away (fencing).

Methods block for a child of the repository and may be called from any thread; only a forced fence waits longer. At most
TAKEOVERS run at once on a host, and none asks sanlock for a lease whose owner it could only wait for (trap 8).
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from vdsm import errors, events, logs
from vdsm.storage import connected, holders
from vdsm.storage.rules import verdicts

_log = logs.get("storage.leasing")

Answer = dict[str, Any]

TAKEOVERS = 2
PAUSE_S = 0.5
# A host that stopped renewing is declared dead after 8 x io_timeout, and its watchdog has fired a minute later.
_DEAD, _WATCHDOG_S = 8, 60
# How long a forced fence waits, in io_timeouts: for the request, the kill, and what its owner's agent does then.
_FORCED, _FORCED_S = 8, 10


class Leasing:
    def __init__(
        self, log: events.EventLog, connections: connected.Connections, at_it: holders.Holders, host_id: int
    ) -> None:
        self._events = log
        self._connections = connections
        self._holders = at_it
        self._host_id = host_id
        self._takeovers = threading.BoundedSemaphore(TAKEOVERS)

    def create(self, repo_id: str, vm_id: str) -> Answer:
        """The VM's lease and an empty record; what is there stays as it is, whoever holds it. Answers as `info`."""
        self._connections.write(repo_id, "ensure_vm", {"vm_id": vm_id, "fields": {}})
        return self.info(repo_id, vm_id)

    def delete(self, repo_id: str, vm_id: str) -> None:
        """Removes a VM's lease with its record. Raises `NoSuchLease`, `LeaseHeld`, `VmRuns`."""
        try:
            self._connections.write(repo_id, "remove_vm", {"vm_id": vm_id})
        except errors.LeaseHeld as error:
            raise self._named(error, repo_id, vm_id) from error

    def info(self, repo_id: str, lease_id: str) -> Answer:
        """{repo_id, lease_id, kind, lockspace, path, offset}: where sanlock finds it."""
        found = self._read(repo_id, lease_id)
        lockspace, _, path, offset = found["slot"]
        place = {"lockspace": lockspace, "path": path, "offset": offset}
        return {"repo_id": repo_id, "lease_id": lease_id, "kind": found["kind"], **place}

    def status(self, repo_id: str, lease_id: str, job_id: str | None = None) -> Answer:
        """{owners, holders, version, generation, work, verdict} of a VM or an image.

        owners are host ids; holders tells of each {host_id, host_state, holder}: the VM or job, where it is known.
        """
        found, verdict = self._holders.judge(lambda: self._read(repo_id, lease_id), job_id)
        own = self._holders.verdict(found)
        return {
            **{"repo_id": repo_id, "lease_id": lease_id, "version": found["version"]},
            **{"owners": [owner["host_id"] for owner in found["owners"] or ()]},
            **{"holders": [self._holder(found, owner["host_id"]) for owner in found["owners"] or ()]},
            **{"generation": found["record"]["generation"], "status": found["record"]["status"]},
            **{"work": verdicts.shown(found["record"]["work"], own), "verdict": verdict.told()},
        }

    def fence(
        self, repo_id: str, lease_id: str, generation: int | None, job_id: str | None, *, force: bool, who: str
    ) -> Answer:
        """Takes the open work away from whoever had it, and counts the generation. Answers as `status`.

        Raises `LeaseHeld` while its holder lives; with `force` that is killed. `RecordNotOwned`, unless with `force`.
        `OwnerUndecided` when its host may live; `GenerationMismatch`, `Superseded`, `WorkCommitted`, `NoSuchLease`,
        `Overloaded`.
        """
        argument = {"lease_id": lease_id, "generation": generation, "job_id": job_id, "force": force}
        with self._taking_over():
            if force and self._force(repo_id, lease_id, who):
                self._fence_patiently(repo_id, argument)
            else:
                self._fence(repo_id, argument)
        _log.warning("audit: %s fenced lease %s of %s (force: %s)", who, lease_id, repo_id, force)
        if self._read(repo_id, lease_id)["kind"] == "image":
            self._events.publish("image", lease_id, {"repo_id": repo_id, "change": "fenced"})
        return self.status(repo_id, lease_id, job_id)

    @contextlib.contextmanager
    def _taking_over(self) -> Iterator[None]:
        if not self._takeovers.acquire(blocking=False):
            raise errors.Overloaded(what="takeovers", limit=TAKEOVERS)
        try:
            yield
        finally:
            self._takeovers.release()

    def _fence(self, repo_id: str, argument: dict[str, Any]) -> None:
        lease_id = argument["lease_id"]
        found = self._read(repo_id, lease_id)
        for owner in found["owners"] or ():
            host = self._host(found, owner)
            if host in ("failing", "unknown"):
                raise self._undecided(repo_id, lease_id, owner["host_id"], host)
            if host == "live":
                raise errors.LeaseHeld(resource=f"lease {lease_id}", holder=self._words(found, owner["host_id"]))
        try:
            self._connections.write(repo_id, "fence", argument)
        except errors.LeaseHeld as error:
            raise self._named(error, repo_id, lease_id) from error

    def _force(self, repo_id: str, lease_id: str, who: str) -> bool:
        """Has a living owner killed; False when there is none. Returns before it is dead."""
        found = self._read(repo_id, lease_id)
        living = [owner["host_id"] for owner in found["owners"] or () if self._host(found, owner) == "live"]
        if not living:
            return False
        holder = ", ".join(self._words(found, host_id) for host_id in living)
        _log.warning("audit: %s has the holder of lease %s of %s killed: %s", who, lease_id, repo_id, holder)
        self._connections.write(repo_id, "force", {"lease_id": lease_id})
        return True

    def _fence_patiently(self, repo_id: str, argument: dict[str, Any]) -> None:
        """Until the killed holder is gone, and whoever looked after its end; nothing is waited for inside sanlock."""
        io_timeout_s = self._connections.get(repo_id).header["io_timeout_s"]
        deadline = time.monotonic() + _FORCED * io_timeout_s + _FORCED_S
        while True:
            try:
                return self._fence(repo_id, argument)
            except errors.LeaseHeld as error:
                if time.monotonic() > deadline:
                    raise error.with_state("its holder was to be killed, and is not gone yet") from None
                time.sleep(PAUSE_S)

    def _read(self, repo_id: str, lease_id: str) -> Answer:
        found: Answer = self._connections.read(repo_id, "lease", {"lease_id": lease_id})
        return found

    def _undecided(self, repo_id: str, lease_id: str, host_id: int, state: str) -> errors.OwnerUndecided:
        seconds = _DEAD * self._connections.get(repo_id).header["io_timeout_s"] + _WATCHDOG_S
        resource = f"lease {lease_id}"
        return errors.OwnerUndecided(resource=resource, host_id=host_id, host_state=state, seconds=seconds)

    # -- words -------------------------------------------------------------------------------------------------------

    def _host(self, found: Answer, owner: dict[str, int]) -> str:
        """How the owning host is: live, failing, dead, free, joined anew, or unknown. This host lives: it asks."""
        if owner["host_id"] == self._host_id:
            return "live"
        return verdicts.host_state(owner["host_id"], owner["generation"], found["hosts"])

    def _holder(self, found: Answer, host_id: int) -> Answer:
        owner = next(owner for owner in found["owners"] if owner["host_id"] == host_id)
        name = self._holders.of_lease(found, host_id)
        return {"host_id": host_id, "host_state": self._host(found, owner), "holder": name}

    def _words(self, found: Answer, host_id: int) -> str:
        name = self._holders.of_lease(found, host_id)
        return f"host {host_id}" if name is None else f"{name} on host {host_id}"

    def _named(self, error: errors.LeaseHeld, repo_id: str, lease_id: str) -> errors.LeaseHeld:
        """The error with the VM or job for a holder; who has gone meanwhile is told as sanlock named it."""
        found = self._read(repo_id, lease_id)
        words = ", ".join(self._words(found, owner["host_id"]) for owner in found["owners"] or ())
        return errors.LeaseHeld(resource=f"lease {lease_id}", holder=words or error.facts["holder"])
