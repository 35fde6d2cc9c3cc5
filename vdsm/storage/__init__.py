"""Storage: repositories, images, their records and leases. This file is the room's door; VMs, the api and main use it.

    Storage            the agent's side: the storage verbs, and what VMs need of disks
    open_repository    in a worker: a repository from its description
    overlays           in a worker: hidden overlays on disks
    copying            in a worker: filling an image with a whole copy

What happens where on disk: `formats/filelayout.py`, `models.py`; the steps of each verb: `intents.py`,
`copyintents.py`, `resizing.py`, `removal.py`.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

from supervdsm import client as helper_client
from vdsm import config, errors, events, forkserver, ids, record
from vdsm.jobs import job, registry
from vdsm.storage import (
    connected,
    diskplans,
    fillings,
    formats,
    holders,
    images,
    ioproc,
    leasing,
    repairs,
    repository,
    sysblock,
)
from vdsm.storage.bodies import copying, exporting, fixes, importing, merging, overlays, vmmending

FORMATS = formats.NAMES
DiskPlan = diskplans.DiskPlan
CopyPlan = diskplans.CopyPlan
Repository = repository.Repository
open_repository = formats.open

__all__ = [
    "FORMATS",
    "CopyPlan",
    "DiskPlan",
    "Repository",
    "Storage",
    "copying",
    "open_repository",
    "overlays",
    "preload",
]

_IO_TIMEOUT_S = 10
_IO_TIMEOUTS_S = range(1, 81)  # sanlock multiplies it by up to 14; it accepts what its watchdog can bear


def preload() -> list[str]:
    """Modules that the fork server must have loaded: the children's entries, and the job bodies."""
    bodies = (copying, exporting, importing, fixes, merging, vmmending)
    return [ioproc.__name__, sysblock.__name__, *(module.__name__ for module in bodies)]


class Storage:
    """The storage service of the agent. Methods block for children, each with a deadline; any thread may call them.

    Verbs take the wire's parameters in snake_case, `options` as in `images.OPTIONS`, and return plain dictionaries.
    Besides what each names, verbs raise `NoSuchRepository`, `RepositoryStuck`, `WorkerDied`, `StorageFailed`; those
    that change something also `LeaseNotReady`, `HostIdTaken`, `LeaseDaemonDown`.
    """

    def __init__(
        self,
        settings: config.Config,
        log: events.EventLog,
        server: forkserver.ForkServer,
        jobs: registry.Registry,
        helper: helper_client.Helper,
    ) -> None:
        self._connections = connected.Connections(settings, log, server, helper)
        self._holders = holders.Holders(jobs, settings.host.id)
        begun = fillings.Fillings(log, self._connections, jobs, self._holders)
        self._leasing = leasing.Leasing(log, self._connections, self._holders, settings.host.id)
        self._images = images.Images(settings, log, self._connections, begun, self._holders)
        self._repairs = repairs.Repairs(settings, log, self._connections, jobs, self._holders, self._images)

    def start(self) -> None:
        """Starts the threads that watch lockspaces and repositories. Nothing is connected yet: the caller says what."""
        self._connections.start()

    def stop(self) -> None:
        """Forgets all repositories; their lockspaces stay joined, since VMs run on."""
        self._connections.stop()

    def set_holder_lookup(self, lookup: holders.Lookup) -> None:
        """`lookup(image_id)` names the VM of this host that runs on the image, or None; answers from memory."""
        self._holders.set_lookup(lookup)

    # -- repositories ------------------------------------------------------------------------------------------------

    def format_storage_repository(
        self, repo_format: str, parameters: dict[str, Any], options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Makes an empty repository; answers its header: name, format, io_timeout_s, sector_bytes, created, ...

        options: ioTimeout, sanlock's, in seconds. Raises `NotEmpty` when there is anything at the place.
        """
        io_timeout_s = _io_timeout(options or {})
        return self._connections.format(repo_format, parameters, io_timeout_s)

    def connect_storage_repository(self, repo_id: str, repo_format: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Connects and answers; the lockspace joins behind the answer. Answers as `list_storage_repositories`."""
        return self._connections.connect(repo_id, repo_format, parameters)

    def disconnect_storage_repository(self, repo_id: str) -> None:
        """Raises `RepositoryInUse`, naming the jobs and VMs that use it."""
        self._connections.disconnect(repo_id, self._users)

    def extend_storage_repository(self, repo_id: str, devices: list[str], overwrite: list[str]) -> None:
        """Adds disks, by their stable names, to the repository's volume group; those of `overwrite` may hold something.

        Raises `InvalidParameters` for a format that is not made of disks, `HelperFailed` with the reason of root.
        """
        self._connections.extend(repo_id, devices, overwrite)

    def list_storage_repositories(self) -> list[dict[str, Any]]:
        """{repo_id, repo_format, name, place, state, state_since, seconds_left} of each, and what the monitor knows of
        it: `monitor.Watch.info`. From memory."""
        return self._connections.infos()

    def _users(self, connection: connected.Connection) -> list[str]:
        found = connection.children.call("images", {}, connection.repo_ids[0])
        return self._holders.users(connection.repo_ids, (image["id"] for image in found))

    # -- images ------------------------------------------------------------------------------------------------------

    def import_image(
        self,
        target_repo_id: str,
        path: str,
        format: str,
        user_data: Any = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A disk with the content of a host's file: {image_id, job_id}. Raises `BadImageFile`, `PathNotAllowed`."""
        return self._images.import_file(target_repo_id, path, format, user_data or {}, _options(options))

    def create_virtual_disk(
        self,
        target_repo_id: str,
        size: int,
        base_snapshot_id: str | None = None,
        user_data: Any = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A new disk, complete: {image_id, job_id: None}. `size` is in bytes, rounded up to 4096; 0: the base's."""
        base = None if base_snapshot_id is None else ids.check_uuid(base_snapshot_id, "baseSnapshotId")
        return self._images.create_virtual_disk(target_repo_id, size, base, user_data or {}, _options(options))

    def create_snapshot(
        self,
        target_repo_id: str,
        base_virtual_disk_id: str,
        user_data: Any = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A snapshot of a disk that no VM runs on, complete: {image_id, job_id: None}."""
        disk_id = ids.check_uuid(base_virtual_disk_id, "baseVirtualDiskId")
        return self._images.create_snapshot(target_repo_id, disk_id, user_data or {}, _options(options))

    def copy_image(
        self,
        target_repo_id: str,
        image_id: str,
        user_data: Any = None,
        options: dict[str, Any] | None = None,
        *,
        base_image_id: str | None = None,
    ) -> dict[str, Any]:
        """A copy: {image_id, job_id}; job_id None when the snapshot is there already. A snapshot keeps its id.

        With a base, which the target repository has, only the difference to it is stored.
        """
        base = None if base_image_id is None else ids.check_uuid(base_image_id, "baseImageId")
        return self._images.copy(target_repo_id, _id(image_id), base, user_data or {}, _options(options))

    def export_image(
        self, repository_id: str, image_id: str, path: str, format: str, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A file of this host with what the image shows: {job_id}. options: job_id, generation, overwrite."""
        asked = {"job_id": None, "generation": None, "overwrite": False, **(options or {})}
        if asked["job_id"] is not None:
            asked["job_id"] = ids.check_uuid(asked["job_id"], "options.jobId")
        return self._images.export_file(repository_id, _id(image_id), path, format, asked)

    def resize_virtual_disk(
        self, repository_id: str, image_id: str, size: int, options: dict[str, Any] | None = None
    ) -> None:
        """Grows a disk that nobody uses, to `size` bytes rounded up to 4096. Complete at return."""
        self._images.resize(repository_id, _id(image_id), size, _options(options))

    def remove_image(self, repository_id: str, image_id: str, options: dict[str, Any] | None = None) -> None:
        """The id is gone at return; what other images are based on stays with them."""
        self._images.remove(repository_id, _id(image_id), _options(options))

    def get_image_status(self, repository_id: str, image_id: str, job_id: str | None = None) -> dict[str, Any]:
        """{image_id, status, generation, host_id, stage "X/Y", percent_complete, last_error, work, verdict}.

        verdict: {state, final, reason}, the fate of the last work or of the job `job_id`; `verdicts.py` has them.
        """
        return self._images.status(repository_id, _id(image_id), job_id)

    def get_image(self, repository_id: str, image_id: str) -> dict[str, Any]:
        """{image_id, repo_id, kind, status, size, stored_size, generation, user_data, created}; sizes in bytes."""
        return self._images.get(repository_id, _id(image_id))

    def list_images(self, repository_id: str) -> list[dict[str, Any]]:
        """All images that are not deleted, as `get_image`, in the order in which they were made."""
        return self._images.all(repository_id)

    def set_image_user_data(
        self, repository_id: str, image_id: str, user_data: Any, options: dict[str, Any] | None = None
    ) -> None:
        """Replaces the image's userData; also while a VM runs on it."""
        self._images.set_user_data(repository_id, _id(image_id), user_data, _options(options))

    # -- fixes -------------------------------------------------------------------------------------------------------

    def check_storage_repository(
        self, repository_id: str, options: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """What could be better: {type, image_id, vm_id, description, freed_bytes, obstacle, data} each; see `findings`.
        Reads."""
        return self._repairs.check(repository_id, _fix_options(options))

    def fix_storage_repository(
        self, repository_id: str, fix: dict[str, Any], options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Starts what a check has answered: {job_id}, None when nothing is left to do. `fix`: type and data of it."""
        return self._repairs.fix(repository_id, fix, _fix_options(options))

    # -- leases ------------------------------------------------------------------------------------------------------

    def create_lease(self, repo_id: str, lease_id: str) -> dict[str, Any]:
        """See `leasing.Leasing.create`, as for the others."""
        return self._leasing.create(repo_id, ids.check_uuid(lease_id, "leaseId"))

    def delete_lease(self, repo_id: str, lease_id: str) -> None:
        self._leasing.delete(repo_id, ids.check_uuid(lease_id, "leaseId"))

    def lease_info(self, repo_id: str, lease_id: str) -> dict[str, Any]:
        return self._leasing.info(repo_id, ids.check_uuid(lease_id, "leaseId"))

    def lease_status(self, repo_id: str, lease_id: str, job_id: str | None = None) -> dict[str, Any]:
        return self._leasing.status(repo_id, ids.check_uuid(lease_id, "leaseId"), job_id)

    def fence_lease(
        self,
        repo_id: str,
        lease_id: str,
        generation: int | None = None,
        job_id: str | None = None,
        *,
        force: bool = False,
        who: str = "the agent",
    ) -> dict[str, Any]:
        """`who` asked, for the log."""
        checked = ids.check_uuid(lease_id, "leaseId")
        return self._leasing.fence(repo_id, checked, generation, job_id, force=force, who=who)

    # -- for VMs -----------------------------------------------------------------------------------------------------

    def plan_disk(self, image_id: str, repo_id: str | None, writable: bool) -> DiskPlan:
        """See `images.Images.plan_disk`; without `repo_id` the image is looked for in all repositories."""
        return self._images.plan_disk(_id(image_id), repo_id, writable=writable)

    def keeping(self, plans: Iterable[DiskPlan]) -> contextlib.AbstractContextManager[None]:
        """See `images.Images.keeping`."""
        return self._images.keeping(plans)

    def grow_disk(self, repo_id: str, image_id: str, written_bytes: int | None) -> int | None:
        """Room for what a VM of this host writes, behind the end of what it has written; None: all is full. Answers the
        end of what is written at which to ask again, None: never. The VM's QEMU holds the disk's lease. Raises
        `RepositoryFull`; then nothing was changed."""
        return self._images.grow_disk(repo_id, image_id, written_bytes)

    def plan_copy(self, image_id: str, repo_id: str) -> CopyPlan:
        """See `images.Images.plan_copy`."""
        return self._images.plan_copy(image_id, repo_id)

    def most_registrations(self) -> int:
        """How many of its children may be registered with sanlock at once, for the repositories connected now."""
        return self._connections.most_registrations()

    def check_absent(self, repo_id: str, image_id: str) -> None:
        """Raises `ImageExists` when the repository has an image of that id, in whatever state."""
        self._images.check_absent(repo_id, image_id)

    def repo_name(self, repo_id: str) -> str:
        """The persistent name of a connected repository."""
        return self._connections.get(repo_id).name

    def repo_id_of(self, name: str) -> str | None:
        """An id under which the repository of that persistent name is connected, if it is."""
        return self._connections.id_of(name)

    def description(self, repo_id: str) -> dict[str, Any]:
        """What `open_repository` makes the repository of, in any process; JSON."""
        return self._connections.description(repo_id)

    def gate(self, repo_ids: list[str]) -> job.Gate:
        """For jobs: why they cannot start yet."""
        return self._connections.gate(repo_ids)

    def ensure_vm(self, repo_id: str, vm_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        """{"slot": [lockspace, name, path, offset], "record"}: made with `fields` if there is none, else left alone."""
        made: dict[str, Any] = self._connections.write(repo_id, "ensure_vm", {"vm_id": vm_id, "fields": fields})
        return made

    def read_vm(self, repo_id: str, vm_id: str) -> record.Record:
        """The VM's record. Raises `NoRecord`."""
        found: record.Record | None = self._connections.read(repo_id, "vm", {"vm_id": vm_id})
        if found is None:
            raise errors.NoRecord(path=vm_id, reason=f"no such VM in {repo_id}")
        return found

    def finish_vm(self, repo_id: str, vm_id: str, changes: dict[str, Any]) -> record.Record:
        """Changes the VM's record, under its record lease alone; returns it. Raises `NoRecord`."""
        argument = {"vm_id": vm_id, "changes": changes}
        changed: record.Record = self._connections.write(repo_id, "change_vm", argument)
        return changed

    def end_vms(self, repo_id: str, host_name: str, ending: dict[str, Any], skip: list[str]) -> dict[str, Any]:
        """VMs of the repository that ran last on this host and have ended: see `vmrecords.end_vms`."""
        argument = {"host_name": host_name, "ending": ending, "skip": skip}
        found: dict[str, Any] = self._connections.write(repo_id, "end_vms", argument)
        return found

    def find_vm(self, vm_id: str, repo_id: str | None) -> str:
        """The id of the repository with the VM's record: `repo_id`, or one of the connected. Raises `NoSuchVm`."""
        return self._connections.find_vm(vm_id, repo_id)

    def claim_vm(
        self, repo_id: str, vm_id: str, *, job_id: str, kind: str, generation: int | None, names: dict[str, Any]
    ) -> list[Any]:
        """Commits a job on the VM in its record, queued; answers the record's slot. Raises `VmRuns`, `NoSuchVm`,
        `GenerationMismatch`."""
        argument = {"vm_id": vm_id, "job_id": job_id, "kind": kind, "generation": generation, "names": names}
        slot: list[Any] = self._connections.write(repo_id, "claim_vm", argument)["slot"]
        return slot

    def unclaim_vm(self, repo_id: str, vm_id: str, job_id: str) -> None:
        """Takes back the claim of a job that was refused."""
        self._connections.write(repo_id, "unclaim_vm", {"vm_id": vm_id, "job_id": job_id})


def _id(image_id: str) -> str:
    """Ids become names of files: nothing but a UUID goes further."""
    return ids.check_uuid(image_id, "imageId")


def _options(given: dict[str, Any] | None) -> images.Options:
    asked = {**images.OPTIONS, **(given or {})}
    for name in asked.keys() - images.OPTIONS.keys():
        raise errors.InvalidParameters(parameter=f"options.{name}", reason="unknown")
    for name, wire in (("image_id", "options.imageId"), ("job_id", "options.jobId")):
        if asked[name] is not None:
            asked[name] = ids.check_uuid(asked[name], wire)
    if asked["strategy"] not in images.STRATEGIES:
        raise errors.InvalidParameters(parameter="options.strategy", reason="must be space or performance")
    return asked


def _fix_options(given: dict[str, Any] | None) -> dict[str, Any]:
    asked = {**repairs.OPTIONS, **(given or {})}
    for name in asked.keys() - repairs.OPTIONS.keys():
        raise errors.InvalidParameters(parameter=f"options.{name}", reason="unknown")
    if asked["job_id"] is not None:
        asked["job_id"] = ids.check_uuid(asked["job_id"], "options.jobId")
    return asked


def _io_timeout(options: dict[str, Any]) -> int:
    for name in options.keys() - {"ioTimeout"}:
        raise errors.InvalidParameters(parameter=f"options.{name}", reason="unknown")
    found = options.get("ioTimeout", _IO_TIMEOUT_S)
    if type(found) is not int or found not in _IO_TIMEOUTS_S:
        raise errors.InvalidParameters(parameter="options.ioTimeout", reason="must be 1 to 80 seconds")
    return found
