"""Who on this host is at an image, in words a caller can act on: the VM on it, the job that reads or fills it.

sanlock knows processes; the agent knows whose they are. Nothing is decided here: leases decide. Methods may be called
from any thread and touch no storage.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

from vdsm import errors, record
from vdsm.jobs import job, registry
from vdsm.storage.rules import models, verdicts

_ACTIVE = (job.Status.PENDING, job.Status.RUNNING, job.Status.ABORTING)

Lookup = Callable[[str], str | None]


class Holders:
    def __init__(self, jobs: registry.Registry, host_id: int) -> None:
        self._jobs = jobs
        self._host_id = host_id
        self._vm_on: Lookup = lambda image_id: None
        self._lock = threading.Lock()
        self._readers: dict[str, frozenset[str]] = {}  # job id: the images that it reads

    def set_lookup(self, vm_on: Lookup) -> None:
        """`vm_on` names the VM of this host that runs on an image, None when there is none."""
        self._vm_on = vm_on

    def add_reader(self, job_id: str, image_ids: Iterable[str]) -> bool:
        """Remembers what a job reads until `forget_reader`; False when it is known already."""
        with self._lock:
            if job_id in self._readers:
                return False
            self._readers[job_id] = frozenset(image_ids)
            return True

    def forget_reader(self, job_id: str) -> None:
        with self._lock:
            self._readers.pop(job_id, None)

    def named(self, error: errors.ImageInUse) -> errors.ImageInUse:
        """The error with the VM or job in place of its process, where this host knows it."""
        image_id = error.facts["image_id"]
        with self._lock:
            readers = ", ".join(f"job {job_id}" for job_id, read in self._readers.items() if image_id in read)
        return errors.ImageInUse(image_id=image_id, holder=self._vm_on(image_id) or readers or error.facts["holder"])

    def of_lease(self, found: dict[str, Any], host_id: int) -> str | None:
        """Who on that host has the lease that `fences.lease` found: its work's job, the VM, jobs that read the image,
        or the process as sanlock knows it. None when only the host itself could tell."""
        known, work = found["record"], found["record"]["work"]
        if models.is_open(known) and work["host_id"] == host_id and self.verdict(found).state in models.OPEN:
            return f"job {work['job_id']}" if work["job_id"] else f"{work['kind']} (a call)"
        if host_id != self._host_id or found["processes"] is None:
            return None
        with self._lock:
            readers = ", ".join(f"job {job_id}" for job_id, read in self._readers.items() if known["id"] in read)
        return self._vm_on(known["id"]) or readers or str(found["processes"])

    def refuse_active(self, image_id: str, repo_ids: Iterable[str]) -> None:
        """Raises `ImageBusy` when a job of this agent is for the image: a queued one holds no lease yet."""
        for info in self._active():
            if info["entity"]["id"] == image_id and info["entity"].get("repo_id") in repo_ids:
                raise errors.ImageBusy(
                    image_id=image_id, job_id=info["id"], state=info["status"], host_id=self._host_id
                )

    def judge(
        self, read: Callable[[], dict[str, Any]], job_id: str | None = None
    ) -> tuple[dict[str, Any], verdicts.Verdict]:
        """What `read` answers, `reading.evidence`, and the fate of the record's work or of the job `job_id`.

        A job of this agent that has ended has written how, perhaps after the record was read: then it is read again.
        """
        evidence = read()
        work = evidence["record"]["work"]
        if models.is_open(evidence["record"]) and self._jobs.standing(work["job_id"]) == registry.ENDED:
            evidence = read()
        return evidence, self.verdict(evidence, job_id)

    def verdict(self, evidence: dict[str, Any], job_id: str | None = None) -> verdicts.Verdict:
        """`judge` of what was read a moment ago."""
        work = evidence["record"]["work"] or {}
        at_it = self._jobs.standing(work.get("job_id")) == registry.ACTIVE
        return verdicts.judge(evidence, verdicts.Here(self._host_id, record.boot_id(), at_it), job_id)

    def users(self, repo_ids: Iterable[str], image_ids: Iterable[str]) -> list[str]:
        """Jobs for the repositories and for these images of theirs, and VMs on them, in words."""
        images = frozenset(image_ids)
        with self._lock:
            reading = {job_id for job_id, read in self._readers.items() if read & images}
        active = self._active()
        jobs = [info["id"] for info in active if info["entity"].get("repo_id") in repo_ids or info["id"] in reading]
        vms = filter(None, (self._vm_on(image_id) for image_id in images))
        return [*(f"job {job_id}" for job_id in jobs), *sorted(set(vms))]

    def _active(self) -> list[job.Info]:
        return [info for info in self._jobs.list() if info["status"] in _ACTIVE]
