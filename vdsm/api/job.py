"""The verbs of host jobs on the wire."""

import asyncio
from typing import Any

import pydantic

from vdsm import errors
from vdsm.api import verb
from vdsm.jobs import job, registry


class JobsParams(verb.Params):
    job_type: str | None = pydantic.Field(None, alias="job_type", description="storage or virt; all when left out")
    job_ids: list[str] | None = pydantic.Field(None, alias="job_ids", description="only these; all when left out")


class JobParams(verb.Params):
    job_id: str = pydantic.Field(description="the job")


class WaitParams(JobParams):
    timeout: float | None = pydantic.Field(None, ge=0, description="seconds; without it, as long as the job takes")


class Entity(verb.Result):
    type: str = pydantic.Field(description="image, vm, or file: of this host, by its path")
    id: str
    repo_id: str = pydantic.Field(description="where its record is; of a file, the repository that it is made from")


class JobInfo(verb.Result):
    """A host job, as this host sees it. Ended jobs stay listed for an hour; the record tells how the work ended."""

    id: str
    kind: str
    status: str = pydantic.Field(description="pending, running, done, failed, aborting or aborted")
    description: str
    job_type: str = pydantic.Field(alias="job_type", description="storage or virt")
    progress: int | None = pydantic.Field(description="percent of the stage; -1: it does not tell; null: not begun")
    stage: int | None
    stages: int | None
    stage_name: str | None
    detail: str | None = pydantic.Field(description="why it does not run yet")
    error: dict[str, Any] | None = pydantic.Field(description="as in a JSON-RPC error")
    entity: Entity = pydantic.Field(description="what is changed")
    created: float = pydantic.Field(description="seconds since 1970")
    started: float | None
    ended: float | None


class JobEvent(JobInfo):
    """A host job is new, moved, began a stage, told how far it is, or was deleted."""

    deleted: bool = pydantic.Field(description="it ended before, and is not listed any more")


class Jobs:
    """Verbs of namespaces Host and Job. They look at this process's own table, so none of them waits for storage."""

    def __init__(self, jobs: registry.Registry) -> None:
        self._jobs = jobs

    @verb.verb(role="monitor", blocking=False)
    def getJobs(self, params: JobsParams) -> dict[str, JobInfo]:
        """Host jobs by id."""
        found = self._jobs.list(params.job_type, params.job_ids)
        return {info["id"]: JobInfo(**info) for info in found}


class Job:
    def __init__(self, jobs: registry.Registry) -> None:
        self._jobs = jobs

    @verb.verb(role="operator", blocking=False, errors=(errors.NoSuchJob, errors.JobNotActive))
    def abort(self, params: JobParams) -> None:
        """Asks a job to end. A pending one is aborted at once, a running one when its worker has undone its work.

        What it was making is removed; to keep that for later, stop the job.
        """
        self._jobs.abort(params.job_id)

    @verb.verb(role="operator", blocking=False, errors=(errors.NoSuchJob, errors.JobNotActive))
    def stop(self, params: JobParams) -> None:
        """Asks a job to end without taking away what it was making: the image stays, broken, and a fix goes on with it.

        Its half made data goes. Jobs on VMs, and others that have nothing to leave, are aborted.
        """
        self._jobs.abort(params.job_id, stop=True)

    @verb.verb(role="operator", blocking=False, errors=(errors.NoSuchJob, errors.JobNotDone))
    def delete(self, params: JobParams) -> None:
        """Forgets an ended job."""
        self._jobs.delete(params.job_id)

    @verb.verb(role="monitor", errors=(errors.NoSuchJob, errors.DeadlinePassed))
    async def wait(self, params: WaitParams) -> JobInfo:
        """Answers when the job has ended, or with its present state when `timeout` is over."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell(info: job.Info) -> None:
            loop.call_soon_threadsafe(ended.set)

        stop = self._jobs.on_end(params.job_id, tell)
        try:
            async with asyncio.timeout(params.timeout):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            stop()
        return JobInfo(**self._jobs.get(params.job_id))
