"""The storage verbs on the wire: repositories and images. Names and parameters are those of the storage API."""

from collections.abc import Callable
from typing import Any, Literal

import pydantic

from vdsm import errors, ids, storage
from vdsm.api import verb

RepoId = pydantic.constr(pattern=ids.REPO_ID_PATTERN)
_TARGET = "repository in which the image is made"
_REPOSITORY = "repository that holds the image"
_USER_DATA = "the caller's own, stored and returned untouched"
_NO_IMAGE = (errors.NoSuchRepository, errors.NoSuchImage)
_WRITES = (errors.LeaseNotReady, errors.RepositoryStuck, errors.RepositoryFull)
_CHANGES = (errors.ImageNotUsable, errors.ImageInUse, errors.ImageBusy, errors.GenerationMismatch)


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
    repo_format: str = pydantic.Field(description="localfs-1.0")
    connection_parameters: dict[str, Any] = pydantic.Field(description="what the format needs; localfs-1.0: path")
    options: FormatOptions = FormatOptions()


class ConnectParams(verb.Params):
    repo_id: str = pydantic.Field(pattern=ids.REPO_ID_PATTERN, description="handle for this connection, not persisted")
    repo_format: str = pydantic.Field(description="localfs-1.0")
    connection_parameters: dict[str, Any] = pydantic.Field({}, description="what the format needs; localfs-1.0: path")


class DisconnectParams(verb.Params):
    repo_id: str = pydantic.Field(description="as given to connectStorageRepository")


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
    seconds_left: float | None = pydantic.Field(description="estimate until it has joined; null when it has")
    total_bytes: int | None = pydantic.Field(None, description="null: the storage does not answer")
    free_bytes: int | None = None


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


class Storage:
    """Verbs of namespace Storage. Each blocks in its repository's pool."""

    def __init__(self, service: storage.Storage, forget: Callable[[str], None]) -> None:
        """`forget` drops the threads that are kept for a repository's verbs."""
        self._storage = service
        self._forget = forget

    @verb.verb(role="admin", errors=(errors.NotEmpty, errors.UnknownFormat, errors.PathNotAllowed))
    def formatStorageRepository(self, params: FormatParams) -> str:
        """Makes an empty repository. An existing one, and anything else that is there, is never overwritten.

        Answers the repository's persistent name.
        """
        made = self._storage.format_storage_repository(
            repo_format=params.repo_format,
            parameters=params.connection_parameters,
            options=params.options.model_dump(by_alias=True),
        )
        return str(made["name"])

    @verb.verb(
        role="admin",
        pool=lambda params: params.repo_id,
        errors=(errors.NotARepository, errors.RepositoryExists, errors.UnknownFormat, errors.HostIdTaken),
    )
    def connectStorageRepository(self, params: ConnectParams) -> Repository:
        """Connects a repository under a handle of the caller's choice, and answers at once.

        Its lockspace is joined behind the answer. Until then reads work, jobs wait, and verbs that write wait a little
        and then say how long it will take. Events of topic "repository" tell when it has joined.
        """
        return Repository(
            **self._storage.connect_storage_repository(
                repo_id=params.repo_id, repo_format=params.repo_format, parameters=params.connection_parameters
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.repo_id,
        errors=(errors.NoSuchRepository, errors.RepositoryInUse),
    )
    def disconnectStorageRepository(self, params: DisconnectParams) -> None:
        """Forgets the handle, after the host has left the lockspace. Refused while jobs or VMs use the repository."""
        self._storage.disconnect_storage_repository(repo_id=params.repo_id)
        self._forget(params.repo_id)

    @verb.verb(role="monitor")
    def listStorageRepositories(self) -> list[Repository]:
        """What is connected. One whose storage hangs is listed without its space."""
        return [Repository(**found) for found in self._storage.list_storage_repositories()]

    @verb.verb(
        role="admin",
        pool=lambda params: params.target_repo_id,
        errors=(errors.PathNotAllowed, errors.BadImageFile, errors.ImageExists, *_WRITES),
    )
    def importImage(self, params: ImportParams) -> CreatedImage:
        """Copies a file of this host into a new disk, as a job. Its header is checked before any tool sees it."""
        return CreatedImage(
            **self._storage.import_image(
                target_repo_id=params.target_repo_id,
                path=params.path,
                format=params.format,
                user_data=params.user_data,
                options=params.options.model_dump(),
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.target_repo_id,
        errors=(errors.ImageExists, errors.WrongKind, *_NO_IMAGE, *_WRITES),
    )
    def createVirtualDisk(self, params: CreateDiskParams) -> CreatedImage:
        """A new disk: empty, or starting with what a snapshot holds. Complete at return."""
        return CreatedImage(
            **self._storage.create_virtual_disk(
                target_repo_id=params.target_repo_id,
                size=params.size,
                base_snapshot_id=params.base_snapshot_id,
                user_data=params.user_data,
                options=params.options.model_dump(),
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.target_repo_id,
        errors=(errors.ImageExists, errors.WrongKind, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def createSnapshot(self, params: SnapshotParams) -> CreatedImage:
        """An immutable image of what the disk holds now. The disk must not be in use. Complete at return."""
        return CreatedImage(
            **self._storage.create_snapshot(
                target_repo_id=params.target_repo_id,
                base_virtual_disk_id=params.base_virtual_disk_id,
                user_data=params.user_data,
                options=params.options.model_dump(),
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.target_repo_id,
        errors=(errors.ImageExists, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def copyImage(self, params: CopyParams) -> CreatedImage:
        """Copies an image, with all that lies below it, into a new image, as a job. A snapshot keeps its id.

        The new image's record is on storage when this answers; the source may be in any connected repository. The
        difference to a base is found by comparing, so the base may be any image that is not larger. A base that is a
        disk must not be in use now; it may be used, and removed, afterwards. With strategy performance the whole is
        stored, raw, whatever the base.
        """
        return CreatedImage(
            **self._storage.copy_image(
                target_repo_id=params.target_repo_id,
                image_id=params.image_id,
                base_image_id=params.base_image_id,
                user_data=params.user_data,
                options=params.options.model_dump(),
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.repository_id,
        errors=(errors.PathNotAllowed, errors.HostFileExists, errors.HostFileFailed, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def exportImage(self, params: ExportParams) -> StartedExport:
        """Writes what an image shows into a file of this host, as a job. The image must not be in use.

        The file gets its name when it is whole; an abort leaves nothing.
        """
        return StartedExport(
            **self._storage.export_image(
                repository_id=params.repository_id,
                image_id=params.image_id,
                path=params.path,
                format=params.format,
                options=params.options.model_dump(),
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.repository_id,
        errors=(errors.WrongKind, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def resizeVirtualDisk(self, params: ResizeParams) -> None:
        """Grows a disk that nobody uses; it has its new size when this answers. Disks never shrink.

        Cut off by a crash, it is finished when the disk is used next.
        """
        self._storage.resize_virtual_disk(
            repository_id=params.repository_id,
            image_id=params.image_id,
            size=params.size,
            options=params.options.model_dump(),
        )

    @verb.verb(
        role="admin", pool=lambda params: params.repository_id, errors=(*_CHANGES, *_NO_IMAGE, errors.LeaseNotReady)
    )
    def removeImage(self, params: RemoveParams) -> None:
        """Removes an image: its id is gone when this answers. Data that other images are based on stays with them."""
        self._storage.remove_image(
            repository_id=params.repository_id, image_id=params.image_id, options=params.options.model_dump()
        )

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=_NO_IMAGE)
    def getImageStatus(self, params: StatusParams) -> ImageStatus:
        """How an image is and what became of the work on it, from storage: any host may ask, at any time."""
        found = self._storage.get_image_status(
            repository_id=params.repository_id, image_id=params.image_id, job_id=params.job_id
        )
        return ImageStatus(**{**found, "work": Work.of(found["work"])})

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=_NO_IMAGE)
    def getImage(self, params: ImageParams) -> Image:
        """What an image is."""
        return Image(**self._storage.get_image(repository_id=params.repository_id, image_id=params.image_id))

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=(errors.NoSuchRepository,))
    def listImages(self, params: ListParams) -> list[Image]:
        """All images of a repository that are not deleted."""
        return [Image(**found) for found in self._storage.list_images(repository_id=params.repository_id)]

    @verb.verb(role="admin", pool=lambda params: params.repository_id, errors=(*_NO_IMAGE, errors.LeaseNotReady))
    def setImageUserData(self, params: UserDataParams) -> None:
        """Replaces an image's user data. Allowed while a VM runs on it."""
        self._storage.set_image_user_data(
            repository_id=params.repository_id, image_id=params.image_id, user_data=params.user_data
        )

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=(errors.NoSuchRepository,))
    def checkStorageRepository(self, params: CheckParams) -> list[FoundFix]:
        """Reads a whole repository and lists what could be better. Changes nothing, and leaves out what is being done.

        clean frees space, optimize stores an image as its strategy asks, merge joins a deleted image and the one on
        it, mend finishes or takes back what was interrupted. Merging may make more to clean.
        """
        found = self._storage.check_storage_repository(
            repository_id=params.repository_id, options=params.options.model_dump()
        )
        return [FoundFix(**one) for one in found]

    @verb.verb(
        role="admin",
        pool=lambda params: params.repository_id,
        errors=(errors.BadFix, errors.FixOutdated, errors.VmRuns, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def fixStorageRepository(self, params: FixParams) -> StartedFix:
        """Starts the job of a fix that a check has listed, on this host or another. It may be sent again at any time:
        what is done already is not done twice, and one that does not fit any more is refused.
        """
        return StartedFix(
            **self._storage.fix_storage_repository(
                repository_id=params.repository_id,
                fix={"type": params.fix.type, "data": params.fix.data},
                options=params.options.model_dump(),
            )
        )
