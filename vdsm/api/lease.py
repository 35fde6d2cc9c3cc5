"""The verbs of leases on the wire: a VM's lease and record, who has a lease, and taking work away from a lost host."""

from typing import Any

import pydantic

from vdsm import errors, storage
from vdsm.api import caller, storagemodels, verb

_OLDER = {"sd_id": "repoId", "lease_id": "leaseId"}
_NO_LEASE = (errors.NoSuchRepository, errors.NoSuchLease)
_TAKES = (errors.LeaseHeld, errors.LeaseNotReady, errors.RepositoryStuck)


class Lease(verb.Params):
    """A lease by name. Upstream's spelling, sd_id and lease_id, is understood too."""

    repo_id: str = pydantic.Field(description="repository that holds it")
    lease_id: str = pydantic.Field(description="id of its VM or image")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _older_names(cls, given: Any) -> Any:
        return {_OLDER.get(name, name): value for name, value in given.items()} if isinstance(given, dict) else given


class LeaseParams(verb.Params):
    lease: Lease


class StatusParams(LeaseParams):
    job_id: str | None = pydantic.Field(None, description="job whose fate is asked for; the last one when left out")


class FenceParams(LeaseParams):
    generation: int | None = pydantic.Field(None, description="generation that the record must have")
    job_id: str | None = pydantic.Field(None, description="job that the open work must be")
    force: bool = pydantic.Field(
        False,
        description="kill the holder if it lives, on whatever host; accept a record that no owner of its lease wrote",
    )


class LeaseInfo(verb.Result):
    """Where sanlock finds the lease."""

    repo_id: str
    lease_id: str
    kind: str = pydantic.Field(description="vm or image")
    lockspace: str = pydantic.Field(description="the repository's persistent name")
    path: str
    offset: int = pydantic.Field(description="bytes")


class Holder(verb.Result):
    host_id: int = pydantic.Field(alias="hostID")
    host_state: str = pydantic.Field(description="live, failing, dead, free, joined anew, or unknown")
    holder: str | None = pydantic.Field(description="the VM or job, in words; null: only its host can tell")


class LeaseStatus(verb.Result):
    """Who has the lease, and the fate of the last work under it. Read from storage: any host may ask."""

    repo_id: str
    lease_id: str
    owners: list[int] = pydantic.Field(description="host ids; several when it is shared")
    holders: list[Holder] = pydantic.Field(description="what is known of each owner")
    version: int = pydantic.Field(description="counts the lease's owners")
    generation: int = pydantic.Field(description="counts finished and fenced jobs")
    status: str = pydantic.Field(description="of the image or VM: optimized, degraded or broken")
    work: storagemodels.Work | None = pydantic.Field(description="the last work; null: none yet")
    verdict: storagemodels.Verdict = pydantic.Field(description="its fate, or that of the job that was asked for")


def _status(found: dict[str, Any]) -> LeaseStatus:
    work = storagemodels.Work.of(found["work"])
    verdict = storagemodels.Verdict(**found["verdict"])
    holders = [Holder(**holder) for holder in found["holders"]]
    return LeaseStatus(**{**found, "work": work, "verdict": verdict, "holders": holders})


class Leases:
    """Verbs of namespace Lease. Each blocks in its repository's pool."""

    def __init__(self, service: storage.Storage) -> None:
        self._storage = service

    @verb.verb(
        role="admin",
        pool=lambda params: params.lease.repo_id,
        errors=(errors.NoSuchRepository, errors.IdTaken, errors.RepositoryFull, *_TAKES),
    )
    def create(self, params: LeaseParams) -> LeaseInfo:
        """A lease and an empty record for the VM of that id. One that exists stays as it is, also while it is held."""
        return LeaseInfo(**self._storage.create_lease(params.lease.repo_id, params.lease.lease_id))

    @verb.verb(
        role="admin",
        pool=lambda params: params.lease.repo_id,
        errors=(*_NO_LEASE, errors.VmRuns, errors.RecordNotOwned, *_TAKES),
    )
    def delete(self, params: LeaseParams) -> None:
        """Removes a VM's lease with its record. Refused while somebody holds it or work on the VM is open."""
        self._storage.delete_lease(params.lease.repo_id, params.lease.lease_id)

    @verb.verb(role="monitor", pool=lambda params: params.lease.repo_id, errors=_NO_LEASE)
    def info(self, params: LeaseParams) -> LeaseInfo:
        """Where the lease of a VM or an image is."""
        return LeaseInfo(**self._storage.lease_info(params.lease.repo_id, params.lease.lease_id))

    @verb.verb(role="monitor", pool=lambda params: params.lease.repo_id, errors=_NO_LEASE)
    def status(self, params: StatusParams) -> LeaseStatus:
        """Who has the lease of a VM or an image, and the fate of its last work, or of a job."""
        return _status(self._storage.lease_status(params.lease.repo_id, params.lease.lease_id, params.job_id))

    @verb.verb(
        role="admin",
        pool=lambda params: f"{params.lease.repo_id} (fencing)",  # may wait for a holder's end: in threads of its own
        errors=(
            *_NO_LEASE,
            *(errors.OwnerUndecided, errors.GenerationMismatch, errors.Superseded, errors.WorkCommitted),
            *(errors.RecordNotOwned, errors.Overloaded, *_TAKES),
        ),
    )
    def fence(self, params: FenceParams, asked_by: caller.Caller) -> LeaseStatus:
        """Takes the open work on a VM or an image away from its host, for good, and counts the generation.

        Refused while the holder lives, unless `force` has it killed, which takes a while: up to 8 times the
        repository's I/O timeout and 10 seconds. Refused too while the holder's host may live. `force` also accepts, as
        it is, a record that no owner of its lease wrote. The answer tells the owners of that moment: whoever concludes
        for a killed worker holds the lease for an instant.
        """
        return _status(
            self._storage.fence_lease(
                params.lease.repo_id,
                params.lease.lease_id,
                params.generation,
                params.job_id,
                force=params.force,
                who=asked_by.name,
            )
        )
