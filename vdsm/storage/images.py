"""The verbs of images, on the agent's side: find the image, plan, let a child do it.

Every method blocks for children of the repositories that it names, never longer than their deadlines, and may be
called from any thread. `options` has all of `OPTIONS`. Answers are plain dictionaries in snake_case.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from vdsm import config, errors, events, ids, logs, record
from vdsm.record import Record
from vdsm.storage import connected, diskplans, fillings, holders
from vdsm.storage.rules import chain, models, verdicts

_log = logs.get("storage.images")

Options = dict[str, Any]
Answer = dict[str, Any]

# What callers may ask for beside a verb's own parameters, and what they get when they do not.
OPTIONS: Options = {
    **{"image_id": None, "job_id": None, "generation": None, "strategy": models.SPACE},
    **{"participating_repositories": None, "image_hints": {}, "auto_fix": True},
}
STRATEGIES = (models.SPACE, models.PERFORMANCE)


class Images:
    def __init__(
        self,
        settings: config.Config,
        log: events.EventLog,
        connections: connected.Connections,
        jobs: fillings.Fillings,
        at_it: holders.Holders,
    ) -> None:
        self._import_dirs = list(settings.storage.import_dirs)
        self._export_dirs = list(settings.storage.export_dirs)
        self._events = log
        self._connections = connections
        self._fillings = jobs
        self._holders = at_it

    # -- making ------------------------------------------------------------------------------------------------------

    def create_virtual_disk(
        self, repo_id: str, size_bytes: int, base: str | None, user_data: Any, options: Options
    ) -> Answer:
        models.check_user_data(user_data)
        asked = {"base": base, "strategy": options["strategy"], "user_data": user_data}
        request = {**asked, "size_bytes": 0 if base and not size_bytes else models.size(size_bytes)}
        told = {"image_id": options["image_id"] or ids.new(), "digest": models.digest("createVirtualDisk", request)}
        asked_now = {**request, **told, "auto_fix": options["auto_fix"]}
        made: Answer = self._write(repo_id, "create_virtual_disk", asked_now)
        self._publish(repo_id, made["image_id"], "created")
        return made

    def create_snapshot(self, repo_id: str, disk_id: str, user_data: Any, options: Options) -> Answer:
        models.check_user_data(user_data)
        self._refuse_active(repo_id, disk_id)
        request = {"disk_id": disk_id, "user_data": user_data}
        told = {"image_id": options["image_id"] or ids.new(), "digest": models.digest("createSnapshot", request)}
        argument = {**request, **told, "generation": options["generation"], "auto_fix": options["auto_fix"]}
        made: Answer = self._write(repo_id, "create_snapshot", argument)
        self._publish(repo_id, made["image_id"], "created")
        self._publish(repo_id, disk_id, "snapshot")
        return made

    def copy(self, repo_id: str, source_id: str, base_id: str | None, user_data: Any, options: Options) -> Answer:
        """With `base_id`, an image of the target repository, only the difference to it is stored.

        A base that is a disk must not be in use. For speed the whole is stored all the same, and the base left alone.
        """
        models.check_user_data(user_data)
        among, hints = options["participating_repositories"], options["image_hints"]
        source = self.plan_copy(source_id, self._connections.find(source_id, among, hints), options["generation"])
        top = source.layers[0]
        origin = {"repo": self._connections.get(source.repo_id).name, "image_id": source_id}
        if base_id is not None:
            self._check_base(repo_id, base_id, top, origin)
        order = fillings.Order(
            verb="copyImage",
            intent="begin_copy",
            image_id=_copy_id(top, options["image_id"]),
            wanted={"kind": top["kind"], "size_bytes": top["size_bytes"], "source": origin, "base": base_id},
            argument={"source": source.description, "layers": source.layers},
            request={"source": source_id, "base": base_id, "strategy": options["strategy"], "user_data": user_data},
            reads=tuple(layer["id"] for layer in source.layers),
            from_repos=(source.repo_id,),
        )
        return self._fillings.begin(repo_id, order, options)

    def _check_base(self, repo_id: str, base_id: str, top: Record, origin: dict[str, str]) -> None:
        same = (base_id, self._connections.get(repo_id).name) == (origin["image_id"], origin["repo"])
        if same and top["kind"] == models.DISK:
            raise errors.InvalidParameters(parameter="baseImageId", reason="it is the image that is to be copied")
        self._refuse_active(repo_id, base_id)

    def import_file(self, repo_id: str, path: str, image_format: str, user_data: Any, options: Options) -> Answer:
        models.check_user_data(user_data)
        if image_format not in (models.RAW, models.QCOW2):
            raise errors.InvalidParameters(parameter="format", reason="must be raw or qcow2")
        file = {"path": path, "format": image_format}
        allowed = {**file, "allowed_dirs": self._import_dirs}
        order = fillings.Order(
            verb="importImage",
            intent="begin_import",
            image_id=options["image_id"] or ids.new(),
            wanted=allowed,
            argument=allowed,
            request={**file, "strategy": options["strategy"], "user_data": user_data},
        )
        return self._fillings.begin(repo_id, order, options)

    def export_file(self, repo_id: str, image_id: str, path: str, image_format: str, options: Options) -> Answer:
        """{job_id}. Nothing is committed anywhere: the job only reads, and the file has its name when it is whole."""
        if image_format not in (models.RAW, models.QCOW2):
            raise errors.InvalidParameters(parameter="format", reason="must be raw or qcow2")
        source = self.plan_copy(image_id, repo_id, options["generation"])
        job_id = options["job_id"] or ids.new()
        file = {"path": path, "overwrite": options["overwrite"], "allowed_dirs": self._export_dirs, "job_id": job_id}
        self._connections.read(repo_id, "check_export", file)
        chosen = {**file, "format": image_format}
        self._fillings.begin_export(source, {"source": source.description, "layers": source.layers, **chosen})
        return {"job_id": job_id}

    # -- changing and removing ---------------------------------------------------------------------------------------

    def remove(self, repo_id: str, image_id: str, options: Options) -> None:
        self._refuse_active(repo_id, image_id)
        argument = {"image_id": image_id, "generation": options["generation"], "auto_fix": options["auto_fix"]}
        cleaned = self._write(repo_id, "remove_image", argument)["cleaned"]
        _log.info("image %s of %s removed; gone from storage: %s", image_id, repo_id, ", ".join(cleaned) or "nothing")
        self._publish(repo_id, image_id, "removed")

    def resize(self, repo_id: str, disk_id: str, size_bytes: int, options: Options) -> None:
        self._refuse_active(repo_id, disk_id)
        argument = {"image_id": disk_id, "size_bytes": models.size(size_bytes), "generation": options["generation"]}
        self._write(repo_id, "resize_virtual_disk", argument)
        self._publish(repo_id, disk_id, "resized")

    def set_user_data(self, repo_id: str, image_id: str, user_data: Any, options: Options) -> None:
        models.check_user_data(user_data)
        argument = {"image_id": image_id, "user_data": user_data, "generation": options["generation"]}
        self._write(repo_id, "set_user_data", argument)
        self._publish(repo_id, image_id, "user_data")

    # -- reading -----------------------------------------------------------------------------------------------------

    def get(self, repo_id: str, image_id: str) -> Answer:
        return _shown(repo_id, self._connections.read(repo_id, "image", {"image_id": image_id}))

    def all(self, repo_id: str) -> list[Answer]:
        return [_shown(repo_id, image) for image in self._connections.read(repo_id, "images", {})]

    def status(self, repo_id: str, image_id: str, job_id: str | None) -> Answer:
        """How the image is, and the fate of its last work, or of the job `job_id` (`verdicts.py`)."""
        ask = functools.partial(self._connections.read, repo_id, "status", {"image_id": image_id})
        found, verdict = self._holders.judge(ask, job_id)
        image = found["record"]
        work = verdicts.shown(image["work"], self._holders.verdict(found))
        shown = {name: image[name] for name in ("status", "generation")}
        host_id = (work or image["writer"])["host_id"]
        told = {"work": work, "verdict": verdict.told()}
        return {"image_id": image["id"], **shown, "host_id": host_id, **_progress(work), **told}

    # -- for VMs and their jobs --------------------------------------------------------------------------------------

    def plan_disk(self, image_id: str, repo_id: str | None, *, writable: bool) -> diskplans.DiskPlan:
        """How to run on the image. A snapshot or a new size of it that was left half made is finished first.

        Raises `NoSuchImage`, `ImageNotUsable`, `WrongKind`, `ImageBusy`, `ImageInUse`. The plan may be out of date
        at once: QEMU's launcher checks it again under the leases.
        """
        repo_id = repo_id or self._connections.find(image_id)
        self._refuse_active(repo_id, image_id)
        found = self._connections.read(repo_id, "layers", {"image_id": image_id})
        if chain.is_unfinished(found["images"][0]):
            self._write(repo_id, "roll_forward", {"image_id": image_id})
            self._publish(repo_id, image_id, "mended")
            found = self._connections.read(repo_id, "layers", {"image_id": image_id})
        top = found["images"][0]
        if top["deleted"]:
            raise errors.NoSuchImage(image_id=image_id, where=repo_id)
        models.check_usable(top, models.DISK if writable else None)
        if writable and found["holder"]:
            raise self._holders.named(errors.ImageInUse(image_id=image_id, holder=found["holder"]))
        repo = self._connections.get(repo_id).repository
        return diskplans.plan(repo, repo_id, found, writable=writable)

    @contextlib.contextmanager
    def keeping(self, plans: Iterable[diskplans.DiskPlan]) -> Iterator[None]:
        """QEMU can open what is planned inside the block, with room for what it writes; what it has open then stays
        there as long as it has."""
        with contextlib.ExitStack() as kept:
            for plan in plans:
                if plan.is_volume:
                    kept.enter_context(self._connections.get(plan.repo_id).repository.keeping(plan.names))
                    self._write(plan.repo_id, "show", {"names": list(plan.names)})
                if plan.grows:
                    self._write(plan.repo_id, "make_room", {"image_id": plan.image_id})
            yield

    def grow_disk(self, repo_id: str, image_id: str, written_bytes: int | None) -> int | None:
        """See `Repository.grow`: of a disk that a VM of this host runs on. Raises `RepositoryFull`, `NoSuchImage`."""
        asked = {"image_id": image_id, "written_bytes": written_bytes}
        asks_at: int | None = self._write(repo_id, "grow_disk", asked)
        return asks_at

    def plan_copy(self, image_id: str, repo_id: str, generation: int | None = None) -> diskplans.CopyPlan:
        """What a worker needs to copy the image, which nobody may be writing now.

        Raises `NoSuchImage`, `ImageNotUsable`, `ImageBusy`, `ImageInUse`, `GenerationMismatch`.
        """
        self._refuse_active(repo_id, image_id)
        asked = {"image_id": image_id, "generation": generation}
        found = self._write(repo_id, "plan_copy", asked)
        shared = [record.Slot(*slot).data_lease(shared=True) for slot in found["slots"]]
        return diskplans.CopyPlan(repo_id, self._connections.description(repo_id), found["images"], shared)

    def check_absent(self, repo_id: str, image_id: str) -> None:
        """Raises `ImageExists` when the repository has an image of that id, in whatever state."""
        if self._connections.read(repo_id, "find", {"image_id": image_id}) is not None:
            raise errors.ImageExists(image_id=image_id, repo_id=repo_id)

    # -- shared ------------------------------------------------------------------------------------------------------

    def _write(self, repo_id: str, function: str, argument: dict[str, Any]) -> Any:
        try:
            return self._connections.write(repo_id, function, argument)
        except errors.ImageInUse as error:
            raise self._holders.named(error) from error

    def _refuse_active(self, repo_id: str, image_id: str) -> None:
        self._holders.refuse_active(image_id, self._connections.get(repo_id).repo_ids)

    def _publish(self, repo_id: str, image_id: str, change: str) -> None:
        self._events.publish("image", image_id, {"repo_id": repo_id, "change": change})


def _copy_id(source: Record, wanted: str | None) -> str:
    """A snapshot keeps its id: it is the same image wherever it is."""
    if source["kind"] != models.SNAPSHOT:
        return wanted or ids.new()
    if wanted not in (None, source["id"]):
        raise errors.InvalidParameters(parameter="options.imageId", reason="a snapshot keeps its id when copied")
    return str(source["id"])


def _shown(repo_id: str, image: Record) -> Answer:
    kept = {name: image[name] for name in ("kind", "status", "generation", "user_data", "created")}
    sizes = {"size": image["size_bytes"], "stored_size": image["allocated_bytes"]}
    return {"image_id": image["id"], "repo_id": repo_id, **kept, **sizes}


def _progress(work: dict[str, Any] | None) -> dict[str, Any]:
    """How far the last work got, as the storage API tells it."""
    if work is None:
        return {"stage": None, "percent_complete": -1, "last_error": None}
    stage = f"{work['stage']}/{work['stages']}" if work["stage"] else None
    percent = -1 if work["percent"] is None else work["percent"]
    return {"stage": stage, "percent_complete": percent, "last_error": (work["error"] or {}).get("message")}
