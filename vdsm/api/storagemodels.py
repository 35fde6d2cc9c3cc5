"""What the verbs of namespace Storage take and give, as the wire spells it."""

from typing import Any, Literal

import pydantic

from vdsm import ids, storage
from vdsm.api import verb

RepoId = pydantic.constr(pattern=ids.REPO_ID_PATTERN)
_TARGET = "repository in which the image is made"
_REPOSITORY = "repository that holds the image"
_PARAMETERS = (
    "what the format needs; localfs-1.0: path; nfs-3.4: connection (server:/export), protocol_version (3, 4.1, or 4.2 "
    "unless said otherwise; no other is tried); clvm-1.2: vg, and to format one on new disks devices (stable names of "
    "whole disks) and overwrite (those of them that may hold something)"
)
_USER_DATA = "the caller's own, stored and returned untouched"


class Options(verb.Params):
    """Options that the verbs of images share."""

    image_id: str | None = pydantic.Field(None, description="id of the new image; made up when left out")
    job_id: str | None = pydantic.Field(None, description="id of the job; made up when left out")
    generation: int | None = pydantic.Field(None, description="generation that the changed image must have")
    strategy: Literal["space", "performance"] = pydantic.Field("space", description="what to prefer")
    participating_repositories: list[str] | None = pydantic.Field(None, description="look for images only here")
    image_hints: dict[str, str] = pydantic.Field({}, description="{image id: the one repository to look in}")
    auto_fix: bool = pydantic.Field(True, alias="AutoFix", description="false: only note it; a fix does the work")


class FormatOptions(verb.Params):
    """Options of a new repository."""

    io_timeout: int = pydantic.Field(10, description="sanlock's, seconds; a lost host is dead after 8 and a minute")


class FormatParams(verb.Params):
    repo_format: str = pydantic.Field(description=" or ".join(storage.FORMATS))
    connection_parameters: dict[str, Any] = pydantic.Field(description=_PARAMETERS)
    options: FormatOptions = FormatOptions()


class ConnectParams(verb.Params):
    repo_id: str = pydantic.Field(pattern=ids.REPO_ID_PATTERN, description="handle for this connection, not persisted")
    repo_format: str = pydantic.Field(description=" or ".join(storage.FORMATS))
    connection_parameters: dict[str, Any] = pydantic.Field({}, description=_PARAMETERS)


class DisconnectParams(verb.Params):
    repo_id: str = pydantic.Field(description="as given to connectStorageRepository")


class ExtendParams(verb.Params):
    repo_id: str = pydantic.Field(description="as given to connectStorageRepository")
    devices: list[str] = pydantic.Field(description="stable names of whole disks: /dev/mapper/..., /dev/disk/by-id/...")
    overwrite: list[str] = pydantic.Field([], description="those of them that may hold something, which is lost")


class ImportParams(verb.Params):
    target_repo_id: str = pydantic.Field(description=_TARGET)
    path: str = pydantic.Field(description="file on this host, under a configured directory")
    format: Literal["raw", "qcow2"] = pydantic.Field(description="the file's format; never guessed")
    user_data: dict[str, Any] = pydantic.Field({}, description=_USER_DATA)
    options: Options = Options()


class CreateDiskParams(verb.Params):
    target_repo_id: str = pydantic.Field(description=_TARGET)
    size: int = pydantic.Field(ge=0, description="bytes; 0 with a base means the base's size")
    base_snapshot_id: str | None = pydantic.Field(None, description="snapshot whose content the disk starts with")
    user_data: dict[str, Any] = pydantic.Field({}, description=_USER_DATA)
    options: Options = Options()


class SnapshotParams(verb.Params):
    target_repo_id: str = pydantic.Field(description="repository of the disk; the snapshot is made there")
    base_virtual_disk_id: str = pydantic.Field(description="the disk")
    user_data: dict[str, Any] = pydantic.Field({}, description=_USER_DATA)
    options: Options = Options()


class CopyParams(verb.Params):
    target_repo_id: str = pydantic.Field(description=_TARGET)
    image_id: str = pydantic.Field(description="image to copy, looked for in all connected repositories")
    base_image_id: str | None = pydantic.Field(
        None, description="image of the target repository; only the difference to it is stored"
    )
    user_data: dict[str, Any] = pydantic.Field({}, description=_USER_DATA)
    options: Options = Options()


class ImageParams(verb.Params):
    repository_id: str = pydantic.Field(description=_REPOSITORY)
    image_id: str = pydantic.Field(description="the image")


class StatusParams(ImageParams):
    job_id: str | None = pydantic.Field(None, description="job whose fate is asked for; the last one when left out")


class RemoveParams(ImageParams):
    options: Options = Options()


class ResizeParams(ImageParams):
    size: int = pydantic.Field(gt=0, description="bytes, rounded up to 4096; not less than now")
    options: Options = Options()


class ExportOptions(verb.Params):
    """Options of an export."""

    job_id: str | None = pydantic.Field(None, description="id of the job; made up when left out")
    generation: int | None = pydantic.Field(None, description="generation that the image must have")
    overwrite: bool = pydantic.Field(False, description="replace a plain file that is there")


class ExportParams(ImageParams):
    path: str = pydantic.Field(description="file to be made on this host, under a configured directory")
    format: Literal["raw", "qcow2"] = pydantic.Field(description="the file's format; raw files are sparse")
    options: ExportOptions = ExportOptions()


class ListParams(verb.Params):
    repository_id: str = pydantic.Field(description="the repository")


class UserDataParams(ImageParams):
    user_data: dict[str, Any] = pydantic.Field(description=_USER_DATA)


class CheckOptions(verb.Params):
    """Options of checkStorageRepository."""

    takeover: bool = pydantic.Field(False, description="count what waits in another host's queue as nobody's")


class FixOptions(CheckOptions):
    """Options of fixStorageRepository."""

    job_id: str | None = pydantic.Field(None, description="id of the job; made up when left out")


class CheckParams(verb.Params):
    repository_id: str = pydantic.Field(description="the repository")
    options: CheckOptions = CheckOptions()


class Fix(verb.Params):
    """Something in a repository that a job can make better."""

    type: Literal["clean", "optimize", "merge", "mend"] = pydantic.Field(description="what kind of work it is")
    image_id: str | None = pydantic.Field(None, description="the image; of a merge, the deleted one")
    vm_id: str | None = pydantic.Field(None, description="the VM, when it is about a VM's record")
    description: str = pydantic.Field("", description="what is going to be done, for people")
    freed_bytes: int | None = pydantic.Field(None, alias="bytes", description="space that it frees; null: not known")
    obstacle: str | None = pydantic.Field(None, description="why it cannot be done; null: it can")
    data: dict[str, Any] = pydantic.Field(description="opaque: to be sent back as it came")


class FixParams(verb.Params):
    repository_id: str = pydantic.Field(description="the repository that was checked, on whichever host")
    fix: Fix = pydantic.Field(description="as checkStorageRepository answered it")
    options: FixOptions = FixOptions()


class FoundFix(verb.Result):
    """Something in a repository that a job can make better."""

    type: Literal["clean", "optimize", "merge", "mend"] = pydantic.Field(description="what kind of work it is")
    image_id: str | None = pydantic.Field(description="the image; of a merge, the deleted one; null: it is about a VM")
    vm_id: str | None = pydantic.Field(description="the VM, when it is about a VM's record")
    description: str = pydantic.Field(description="what is going to be done, for people")
    freed_bytes: int | None = pydantic.Field(alias="bytes", description="space that it frees; null: not known")
    obstacle: str | None = pydantic.Field(
        description="why it cannot be done as things are; null: it can. Removing the broken image is always possible"
    )
    data: dict[str, Any] = pydantic.Field(description="opaque: to be sent back as it came")


class StartedFix(verb.Result):
    job_id: str | None = pydantic.Field(description="job that does it; null: nothing is left to do")


class CreatedImage(verb.Result):
    image_id: str = pydantic.Field(description="the new image")
    job_id: str | None = pydantic.Field(description="job that fills it; null: it is complete")


class StartedExport(verb.Result):
    job_id: str = pydantic.Field(description="job that writes the file")


class Repository(verb.Result):
    repo_id: str
    repo_format: str
    name: str = pydantic.Field(description="persistent name, the same on every host")
    place: str
    state: str = pydantic.Field(description="joining or joined; reads work in both")
    state_since: float = pydantic.Field(description="when that began, in seconds since 1970")
    seconds_left: float | None = pydantic.Field(description="estimate until it has joined; null when it has")
    reachability: Literal["unknown", "reachable", "unreachable"] = pydantic.Field(
        description="whether its storage answered the last look; unknown: not looked at yet, or the look itself failed"
    )
    reachability_reason: str | None = pydantic.Field(description="why it is not reachable")
    reachability_code: int = pydantic.Field(description="the same as the number of an error; 0: none")
    reachability_since: float = pydantic.Field(description="when that began, in seconds since 1970")
    last_check: float | None = pydantic.Field(description="seconds since the last look; null: none yet")
    read_latency: float | None = pydantic.Field(description="seconds that the look took to read; null: not reachable")
    total_bytes: int | None = pydantic.Field(description="null: not reachable")
    free_bytes: int | None
    space_low: bool | None = pydantic.Field(description="by storage.space_low_percent, as last seen; null: never seen")
    renewal_age: float | None = pydantic.Field(
        description="seconds since this host's id was renewed in the lockspace, at the last look; null: not joined"
    )
    renewal_late: bool = pydantic.Field(
        description="two renewals in a row have failed; after 8 io_timeouts without one, holders of leases are ended"
    )


class RepoStatsParams(verb.Params):
    domains: list[str] = pydantic.Field([], description="ids of connected repositories; all when left out")


class RepoStats(verb.Result):
    """How a repository is, in the words that upstream's engines know."""

    code: int = pydantic.Field(description="0, or the number of the error with which the last look ended")
    last_check: str = pydantic.Field(description="seconds since the last look")
    delay: str = pydantic.Field(description="seconds that the look took to read; 0 when it could not")
    valid: bool = pydantic.Field(description="the last look did not fail")
    version: int = pydantic.Field(description="major number of the format")
    acquired: bool = pydantic.Field(description="the lockspace is joined")
    actual: bool = pydantic.Field(description="it was looked at; false: the rest are mere defaults")

    @classmethod
    def of(cls, found: dict[str, Any]) -> "RepoStats":
        """From what makes a `Repository`."""
        return cls(
            code=found["reachability_code"],
            last_check=f"{found['last_check'] or 0:.1f}",
            delay=f"{found['read_latency'] or 0:.9f}",
            valid=found["reachability_code"] == 0,
            version=int(found["repo_format"].rpartition("-")[2].partition(".")[0]),
            acquired=found["state"] == "joined",
            actual=found["last_check"] is not None,
        )


class Image(verb.Result):
    image_id: str
    repo_id: str
    kind: Literal["disk", "snapshot"]
    status: Literal["optimized", "degraded", "broken"]
    size: int = pydantic.Field(description="bytes, as a guest sees it")
    stored_size: int | None = pydantic.Field(description="bytes that its own data takes; null: none yet")
    generation: int = pydantic.Field(description="counts finished and fenced jobs")
    user_data: dict[str, Any]
    created: int = pydantic.Field(description="seconds since 1970")


class Work(verb.Result):
    """What was done to an image last, as its record says; any host may have written it."""

    job_id: str | None = pydantic.Field(description="null: done within a call")
    kind: str
    host_id: int = pydantic.Field(alias="hostID")
    state: str = pydantic.Field(
        description="queued, running, committing, done, failed, aborted, interrupted, fenced or wanted (AutoFix was "
        "false): as the verdict has it, or, when that is unknown, as written last"
    )
    stage: int | None
    stages: int | None
    stage_name: str | None
    percent: int | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, work: dict[str, Any] | None) -> "Work | None":
        return None if work is None else cls(**{name: work[name] for name in cls.model_fields})


class Verdict(verb.Result):
    """The fate of a job, told from the record, the owners of the data lease and the states of their hosts."""

    state: str = pydantic.Field(
        description="queued, running, committing, done, failed, aborted, interrupted (nobody is at it any more), "
        "fenced, wanted (only a fix begins it), superseded (other work is there now), absent (there is no such work), "
        "or unknown (a host's state is not known yet)"
    )
    final: bool = pydantic.Field(description="false: it may change by itself, ask again")
    reason: str | None = pydantic.Field(description="in words, where the state does not say it all")


class ImageStatus(verb.Result):
    """How an image is, and how far the work on it got, as last written to storage."""

    image_id: str
    status: Literal["optimized", "degraded", "broken"]
    generation: int
    host_id: int | None = pydantic.Field(alias="hostID", description="last host that worked on it")
    stage: str | None = pydantic.Field(description="X/Y")
    percent_complete: int = pydantic.Field(alias="percent_complete", description="0 to 100 of the stage; -1: not known")
    last_error: str | None = pydantic.Field(alias="last_error", description="why the last work ended without a result")
    work: Work | None = pydantic.Field(description="the last work; null: none yet")
    verdict: Verdict = pydantic.Field(description="the fate of the last work, or of the job that was asked for")
