"""checkStorageRepository and fixStorageRepository, on the agent's side.

What a check answers goes to the caller and comes back from anybody: it names what to do and what must still be so, and
everything else is read again when it comes back. Methods block for children of the repositories that they name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vdsm import config, errors, events, ids, undo
from vdsm.jobs import job, registry
from vdsm.record import Record
from vdsm.storage import connected, holders, images
from vdsm.storage.rules import chain, findings

if TYPE_CHECKING:
    from vdsm.storage import fixtoken

    _Token = fixtoken.Token

Answer = dict[str, Any]

# `takeover`: work in the queue of another host that lives counts as nobody's (trap 24).
OPTIONS: dict[str, Any] = {"job_id": None, "takeover": False}


class Repairs:
    def __init__(
        self,
        settings: config.Config,
        log: events.EventLog,
        connections: connected.Connections,
        jobs: registry.Registry,
        at_it: holders.Holders,
        made: images.Images,
    ) -> None:
        self._import_dirs = list(settings.storage.import_dirs)
        self._events = log
        self._connections = connections
        self._jobs = jobs
        self._holders = at_it
        self._images = made

    # -- check -------------------------------------------------------------------------------------------------------

    def check(self, repo_id: str, options: dict[str, Any]) -> list[Answer]:
        """What could be better: {type, image_id, vm_id, description, freed_bytes, obstacle, data} each. Only reads."""
        asked = {"active": self._jobs.active(), "takeover": options["takeover"]}
        found: list[Answer] = self._connections.read(repo_id, "check", asked)
        name = self._connections.get(repo_id).name
        free = [findings.Finding(**one) for one in found if self._is_free(one)]
        return [_shown(name, self._judged(repo_id, one)) for one in free]

    def _is_free(self, finding: Answer) -> bool:
        """False for work that was committed here while the repository was read; and while a VM's record in another
        repository speaks of the image, or cannot be asked."""
        if self._jobs.standing(finding["guard"].get("job_id")) == registry.ACTIVE:
            return False
        where = finding["guard"].get("vm")
        try:
            return where is None or self._is_forgotten(where, finding["entity"])
        except errors.VdsmError:
            return False

    def _is_forgotten(self, where: dict[str, str], entity: str) -> bool:
        """Whether the VM's record does not speak of the image any more. Then it never will again."""
        vm: Record | None = self._connections.read(self._connected(where["repo"]), "vm", {"vm_id": where["id"]})
        return vm is None or not chain.counts(vm) or where.get("made", entity) not in findings.made_for_vm(vm)

    def _judged(self, repo_id: str, found: findings.Finding) -> findings.Finding:
        """A copy's source may be in another repository, which a child of this one does not know."""
        if found.fix != findings.COPY_IMAGE:
            return found
        try:
            obstacle, advice = self._obstacle(repo_id, found.entity), "; removeImage takes it away"
        except errors.VdsmError as error:
            obstacle, advice = f"its source cannot be looked at: {error}", ""
        if obstacle is None:
            return found
        description = f"{found.description}. That cannot be done now: {obstacle}{advice}"
        return found._replace(obstacle=obstacle, description=description)

    def _obstacle(self, repo_id: str, image_id: str) -> str | None:
        """Why a broken copy can never be finished; None: it can, or is no broken copy any more. Raises when the
        repository of its source does not answer, or is not connected."""
        image = self._unfinished(repo_id, image_id)
        origin = image["work"]["names"].get("source") if image is not None else None
        if image is None or not origin:
            return None
        source: Record | None = self._connections.read(
            self._connected(origin["repo"]), "find", {"image_id": origin["image_id"]}
        )
        if source is None or source["deleted"]:
            return f"its source, image {origin['image_id']}, was removed"
        if source["size_bytes"] != image["size_bytes"]:
            now = f"has {source['size_bytes']} bytes now, and had {image['size_bytes']}"
            return f"its source, image {origin['image_id']}, {now}"
        return None

    # -- fix ---------------------------------------------------------------------------------------------------------

    def fix(self, repo_id: str, fix: Answer, options: dict[str, Any]) -> Answer:
        """Starts the fix's job: {job_id}, None when nothing is left to do.

        Raises `BadFix`, `FixOutdated`, `CannotMend`, `ImageBusy`, `ImageInUse`, `VmRuns`; then nothing has happened.
        """
        token = self._token(repo_id, fix)
        job_id = options["job_id"] or ids.new()
        given, reads, repos = self._given(repo_id, token)
        asked = {"fix": token.fix, "entity": token.entity, "guard": token.guard, "job_id": job_id}
        wanted = {**asked, "active": self._jobs.active(), "takeover": options["takeover"]}
        with self._jobs.expecting(job_id):
            begun = self._begin(repo_id, wanted)
            if begun is None:
                return {"job_id": None}
            if "begun" not in begun:
                self._register(repo_id, token, job_id, {**given, **begun}, reads, repos)
        return {"job_id": job_id}

    def _begin(self, repo_id: str, wanted: Answer) -> Answer | None:
        try:
            begun: Answer | None = self._connections.write(repo_id, "begin_fix", wanted)
        except errors.ImageInUse as error:
            raise self._holders.named(error) from error
        return begun

    def _token(self, repo_id: str, fix: Answer) -> _Token:
        from vdsm.storage import fixtoken

        token = fixtoken.read(fix["data"])
        if token.fix not in findings.TYPE_OF:
            raise errors.BadFix(reason=f"there is no fix {token.fix}")
        if token.repo != self._connections.get(repo_id).name:
            raise errors.BadFix(reason=f"it is for the repository {token.repo}")
        if fix["type"] != findings.TYPE_OF[token.fix]:
            raise errors.BadFix(reason=f"its type is not {fix['type']}")
        return token

    def _given(self, repo_id: str, token: _Token) -> tuple[Answer, tuple[str, ...], list[str]]:
        """(what the worker needs beyond the repository, images that it reads elsewhere, the repositories of both)."""
        if token.fix == findings.COPY_IMAGE:
            return self._source(repo_id, token)
        if token.fix == "importImage":
            file = self._names(repo_id, token).get("source", {})
            return {**file, "allowed_dirs": self._import_dirs}, (), [repo_id]
        if token.fix == findings.MEND_VM:
            return self._parts_of_vm(repo_id, token)
        vm = token.guard.get("vm")
        if isinstance(vm, dict):
            if token.fix == findings.END_WORK and not self._is_forgotten(vm, token.entity):
                raise errors.FixOutdated(fix=token.fix, entity=token.entity, reason="it belongs to a job on a VM")
            elsewhere = self._connected(vm["repo"])
            return {"vm": self._connections.description(elsewhere)}, (), [repo_id, elsewhere]
        return {}, (), [repo_id]

    def _source(self, repo_id: str, token: _Token) -> tuple[Answer, tuple[str, ...], list[str]]:
        origin = self._names(repo_id, token).get("source")
        if not origin:
            return {}, (), [repo_id]  # not a copy any more: the claim says how it is
        obstacle = self._obstacle(repo_id, token.entity)
        if obstacle is not None:
            raise errors.CannotMend(image_id=token.entity, reason=obstacle)
        plan = self._images.plan_copy(origin["image_id"], self._connected(origin["repo"]))
        reads = tuple(layer["id"] for layer in plan.layers)
        return {"source": plan.description, "layers": plan.layers}, reads, [repo_id, plan.repo_id]

    def _names(self, repo_id: str, token: _Token) -> dict[str, Any]:
        """What the work in the image's record names."""
        image = self._unfinished(repo_id, token.entity)
        return image["work"]["names"] if image is not None else {}

    def _unfinished(self, repo_id: str, image_id: str) -> Record | None:
        """The image's record, if what its work names is still to be made."""
        image: Record | None = self._connections.read(repo_id, "find", {"image_id": image_id})
        return image if image is not None and chain.counts(image) else None

    def _parts_of_vm(self, repo_id: str, token: _Token) -> tuple[Answer, tuple[str, ...], list[str]]:
        vm: Record | None = self._connections.read(repo_id, "vm", {"vm_id": token.entity})
        work = (vm or {}).get("work") or {}
        names = work.get("names") or {}
        disks = [
            {"repository": self._description(names["repos"][image_id]), "image_id": image_id, "change": change}
            for image_id, change in names.get("disks", {}).items()
        ]
        made = [
            {"repository": self._description(names["repo"]), "image_id": image_id}
            for image_id in names.get("images", {})
        ]
        repos = sorted({repo_id, *(part["repository"]["repo_id"] for part in [*disks, *made])})
        return {"disks": disks, "images": made}, (), repos

    def _description(self, repo_name: str) -> dict[str, Any]:
        return self._connections.description(self._connected(repo_name))

    def _connected(self, repo_name: str) -> str:
        repo_id = self._connections.id_of(repo_name)
        if repo_id is None:
            raise errors.NoSuchRepository(repo_id=repo_name)
        return repo_id

    # -- the job -----------------------------------------------------------------------------------------------------

    def _register(
        self, repo_id: str, token: _Token, job_id: str, argument: Answer, reads: tuple[str, ...], repos: list[str]
    ) -> None:
        is_vm = token.fix in findings.OF_VMS
        entity = {"type": "vm" if is_vm else "image", "id": argument["entity"], "repo_id": repo_id}
        request = job.JobRequest(
            kind=token.fix,
            job_id=job_id,
            job_type="virt" if token.fix == findings.MEND_VM else "storage",
            description=f"{findings.TYPE_OF[token.fix]}: {token.fix} of {entity['type']} {token.entity} in {repo_id}",
            entity=entity,
            argument={**argument, "target": self._connections.description(repo_id)},
            gate=self._connections.gate(repos),
            identity=[token.fix, token.entity, token.guard],
        )
        with undo.Stack() as steps:
            if "before" in argument:
                claim = {"entity": argument["entity"], "is_vm": is_vm, "job_id": job_id, "before": argument["before"]}
                steps.push("withdraw the fix", lambda: self._connections.write(repo_id, "withdraw_fix", claim))
            self._holders.add_reader(job_id, reads)
            steps.push("forget what it reads", lambda: self._holders.forget_reader(job_id))
            self._jobs.add(request)
        self._publish(entity, token, job_id, "begun")
        self._jobs.on_end(job_id, lambda info: self._ended(entity, token, info))

    def _ended(self, entity: dict[str, str], token: _Token, info: job.Info) -> None:
        """Runs under the registry's lock."""
        self._holders.forget_reader(info["id"])
        self._publish(entity, token, info["id"], info["status"])

    def _publish(self, entity: dict[str, str], token: _Token, job_id: str, change: str) -> None:
        if entity["type"] == "image":
            told = {"repo_id": entity["repo_id"], "change": change, "job_id": job_id, "fix": token.fix}
            self._events.publish("image", entity["id"], told)


def _shown(repo_name: str, found: findings.Finding) -> Answer:
    data = {"repo": repo_name, "fix": found.fix, "entity": found.entity, "guard": found.guard}
    where = {"image_id": None if found.is_vm else found.entity, "vm_id": found.entity if found.is_vm else None}
    return {
        **{"type": found.type, **where, "description": found.description},
        **{"freed_bytes": found.freed_bytes, "obstacle": found.obstacle, "data": data},
    }
