"""The storage verbs on the wire: repositories and images. Names and parameters are those of the storage API."""

from collections.abc import Callable

from vdsm import errors, storage
from vdsm.api import storagemodels as models
from vdsm.api import verb

_NO_IMAGE = (errors.NoSuchRepository, errors.NoSuchImage)
_WRITES = (errors.LeaseNotReady, errors.RepositoryStuck, errors.RepositoryFull)
_CHANGES = (
    *(errors.ImageNotUsable, errors.ImageInUse, errors.ImageBusy, errors.GenerationMismatch),
    errors.RecordNotOwned,
)
# What storage on a network may answer before there is a repository.
_SERVERS = (errors.ServerUnreachable, errors.NoSuchExport, errors.StorageDenied, errors.UnsafeMount)


class Storage:
    """Verbs of namespace Storage. Each blocks in its repository's pool."""

    def __init__(self, service: storage.Storage, forget: Callable[[str], None]) -> None:
        """`forget` drops the threads that are kept for a repository's verbs."""
        self._storage = service
        self._forget = forget

    @verb.verb(
        role="admin",
        pool=lambda params: f"(format {params.repo_format})",  # waits for servers that are dead, too
        errors=(
            *(errors.NotEmpty, errors.UnknownFormat, errors.PathNotAllowed, errors.RepositoryInUse),
            *_SERVERS,
        ),
    )
    def formatStorageRepository(self, params: models.FormatParams) -> str:
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
        errors=(
            *(errors.NotARepository, errors.RepositoryExists, errors.UnknownFormat, errors.HostIdTaken),
            *(errors.NoWatchdog, errors.RepositoryInUse, *_SERVERS),
        ),
    )
    def connectStorageRepository(self, params: models.ConnectParams) -> models.Repository:
        """Connects a repository under a handle of the caller's choice, and answers at once.

        Its lockspace is joined behind the answer. Until then reads work, jobs wait, and verbs that write wait a little
        and then say how long it will take. Events of topic "repository" tell when it has joined.
        """
        return models.Repository(
            **self._storage.connect_storage_repository(
                repo_id=params.repo_id, repo_format=params.repo_format, parameters=params.connection_parameters
            )
        )

    @verb.verb(
        role="admin",
        pool=lambda params: params.repo_id,
        errors=(errors.NoSuchRepository, errors.RepositoryInUse),
    )
    def disconnectStorageRepository(self, params: models.DisconnectParams) -> None:
        """Forgets the handle, after the host has left the lockspace. Refused while jobs or VMs use the repository."""
        self._storage.disconnect_storage_repository(repo_id=params.repo_id)
        self._forget(params.repo_id)

    @verb.verb(
        role="admin",
        pool=lambda params: params.repo_id,
        errors=(errors.NoSuchRepository, errors.RepositoryInUse, errors.HelperFailed),
    )
    def extendStorageRepository(self, params: models.ExtendParams) -> None:
        """Adds disks to the volume group of a repository. All hosts that use it must see them. May be repeated."""
        self._storage.extend_storage_repository(params.repo_id, params.devices, params.overwrite)

    @verb.verb(role="monitor", blocking=False)
    def listStorageRepositories(self) -> list[models.Repository]:
        """What is connected, and how it was at the last look. Waits for no storage."""
        return [models.Repository(**found) for found in self._storage.list_storage_repositories()]

    @verb.verb(
        role="admin",
        pool=lambda params: params.target_repo_id,
        errors=(errors.PathNotAllowed, errors.BadImageFile, errors.ImageExists, errors.IdTaken, *_WRITES),
    )
    def importImage(self, params: models.ImportParams) -> models.CreatedImage:
        """Copies a file of this host into a new disk, as a job. Its header is checked before any tool sees it."""
        return models.CreatedImage(
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
        errors=(errors.ImageExists, errors.IdTaken, errors.WrongKind, *_NO_IMAGE, *_WRITES),
    )
    def createVirtualDisk(self, params: models.CreateDiskParams) -> models.CreatedImage:
        """A new disk: empty, or starting with what a snapshot holds. Complete at return."""
        return models.CreatedImage(
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
        errors=(errors.ImageExists, errors.IdTaken, errors.WrongKind, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def createSnapshot(self, params: models.SnapshotParams) -> models.CreatedImage:
        """An immutable image of what the disk holds now. The disk must not be in use. Complete at return."""
        return models.CreatedImage(
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
        errors=(errors.ImageExists, errors.IdTaken, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def copyImage(self, params: models.CopyParams) -> models.CreatedImage:
        """Copies an image, with all that lies below it, into a new image, as a job. A snapshot keeps its id.

        The new image's record is on storage when this answers; the source may be in any connected repository. The
        difference to a base is found by comparing, so the base may be any image that is not larger. A base that is a
        disk must not be in use now; it may be used, and removed, afterwards. With strategy performance the whole is
        stored, raw, whatever the base.
        """
        return models.CreatedImage(
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
    def exportImage(self, params: models.ExportParams) -> models.StartedExport:
        """Writes what an image shows into a file of this host, as a job. The image must not be in use.

        The file gets its name when it is whole; an abort leaves nothing.
        """
        return models.StartedExport(
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
    def resizeVirtualDisk(self, params: models.ResizeParams) -> None:
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
    def removeImage(self, params: models.RemoveParams) -> None:
        """Removes an image: its id is gone when this answers. Data that other images are based on stays with them."""
        self._storage.remove_image(
            repository_id=params.repository_id, image_id=params.image_id, options=params.options.model_dump()
        )

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=_NO_IMAGE)
    def getImageStatus(self, params: models.StatusParams) -> models.ImageStatus:
        """How an image is and what became of the work on it, from storage: any host may ask, at any time."""
        found = self._storage.get_image_status(
            repository_id=params.repository_id, image_id=params.image_id, job_id=params.job_id
        )
        return models.ImageStatus(**{**found, "work": models.Work.of(found["work"])})

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=_NO_IMAGE)
    def getImage(self, params: models.ImageParams) -> models.Image:
        """What an image is."""
        return models.Image(**self._storage.get_image(repository_id=params.repository_id, image_id=params.image_id))

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=(errors.NoSuchRepository,))
    def listImages(self, params: models.ListParams) -> list[models.Image]:
        """All images of a repository that are not deleted."""
        return [models.Image(**found) for found in self._storage.list_images(repository_id=params.repository_id)]

    @verb.verb(role="admin", pool=lambda params: params.repository_id, errors=(*_NO_IMAGE, errors.LeaseNotReady))
    def setImageUserData(self, params: models.UserDataParams) -> None:
        """Replaces an image's user data. Allowed while a VM runs on it."""
        self._storage.set_image_user_data(
            repository_id=params.repository_id, image_id=params.image_id, user_data=params.user_data
        )

    @verb.verb(role="monitor", pool=lambda params: params.repository_id, errors=(errors.NoSuchRepository,))
    def checkStorageRepository(self, params: models.CheckParams) -> list[models.FoundFix]:
        """Reads a whole repository and lists what could be better. Changes nothing, and leaves out what is being done.

        clean frees space, optimize stores an image as its strategy asks, merge joins a deleted image and the one on
        it, mend finishes or takes back what was interrupted. Merging may make more to clean.
        """
        found = self._storage.check_storage_repository(
            repository_id=params.repository_id, options=params.options.model_dump()
        )
        return [models.FoundFix(**one) for one in found]

    @verb.verb(
        role="admin",
        pool=lambda params: params.repository_id,
        errors=(errors.BadFix, errors.FixOutdated, errors.CannotMend, errors.VmRuns, *_CHANGES, *_NO_IMAGE, *_WRITES),
    )
    def fixStorageRepository(self, params: models.FixParams) -> models.StartedFix:
        """Starts the job of a fix that a check has listed, on this host or another. It may be sent again at any time:
        what is done already is not done twice, and one that does not fit any more is refused.
        """
        return models.StartedFix(
            **self._storage.fix_storage_repository(
                repository_id=params.repository_id,
                fix={"type": params.fix.type, "data": params.fix.data},
                options=params.options.model_dump(),
            )
        )


class RepoStats:
    """What namespace Host tells of repositories, from memory."""

    def __init__(self, service: storage.Storage) -> None:
        self._storage = service

    @verb.verb(role="monitor", blocking=False)
    def getStorageRepoStats(self, params: models.RepoStatsParams) -> dict[str, models.RepoStats]:
        """How connected repositories were at the last look, by their ids. Those that are not connected are left out.

        `Storage.listStorageRepositories` tells more.
        """
        found = {info["repo_id"]: info for info in self._storage.list_storage_repositories()}
        wanted = params.domains or found
        return {repo_id: models.RepoStats.of(info) for repo_id, info in found.items() if repo_id in wanted}
