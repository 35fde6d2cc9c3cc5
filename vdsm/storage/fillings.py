"""Images that a job fills, on the agent's side: the request is committed in the record, then the job is registered.

    record written (broken, work queued) --> job registered --> ids answered

The agent dies between the first two: the record says queued by a job that nobody has; the same request again registers
it, a removal takes it away.
"""

from dataclasses import dataclass
from typing import Any

from vdsm import errors, events, ids, undo
from vdsm.jobs import job, registry
from vdsm.storage import connected, diskplans, holders
from vdsm.storage.rules import models

Answer = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """`intent` is the child's function that commits, `wanted` its argument but for what all have; `argument` is the
    job's own. `request` is what makes two calls the same. The job reads `reads` in the repositories `from_repos`."""

    verb: str
    intent: str
    image_id: str
    wanted: dict[str, Any]
    argument: dict[str, Any]
    request: dict[str, Any]
    reads: tuple[str, ...] = ()
    from_repos: tuple[str, ...] = ()


class Fillings:
    """Methods block for a child of the target's repository, and may be called from any thread."""

    def __init__(
        self,
        log: events.EventLog,
        connections: connected.Connections,
        jobs: registry.Registry,
        at_it: holders.Holders,
    ) -> None:
        self._events = log
        self._connections = connections
        self._jobs = jobs
        self._holders = at_it

    def begin(self, repo_id: str, order: Order, options: dict[str, Any]) -> Answer:
        """{image_id, job_id}; job_id None when the image is there already, was tried before and failed, or
        is left to a later fix.

        Raises what the intent raises, `JobExists` and `Overloaded`; then nothing is left.
        """
        job_id = options["job_id"] or ids.new()
        digest = models.digest(order.verb, order.request)
        told = {"verb": order.verb, "image_id": order.image_id, "job_id": job_id, "digest": digest}
        told["auto_fix"] = options["auto_fix"]
        asked = {name: order.request[name] for name in ("strategy", "user_data")}
        with self._jobs.expecting(job_id):
            begun = self._commit(repo_id, order.intent, {**order.wanted, **told, **asked})
            if begun["job_id"] == job_id:
                self._register(self._job(repo_id, order, job_id, digest), order.reads)
        if begun.pop("undeleted", False):
            self._events.publish("image", order.image_id, {"repo_id": repo_id, "change": "undeleted"})
        return begun

    def begin_export(self, source: diskplans.CopyPlan, argument: dict[str, Any]) -> None:
        """Registers the job that writes a file of this host. Raises `JobExists`, `Overloaded`."""
        top, *_ = source.layers
        new = job.JobRequest(
            kind="exportImage",
            job_id=argument["job_id"],
            job_type="storage",
            description=f"exportImage: image {top['id']} in {source.repo_id} to {argument['path']}",
            entity={"type": "file", "id": argument["path"], "repo_id": source.repo_id},
            argument=argument,
            gate=self._connections.gate([source.repo_id]),
            identity=[top["id"], argument["path"], argument["format"], argument["overwrite"]],
        )
        with undo.Stack() as steps:
            first = self._holders.add_reader(new.job_id, [layer["id"] for layer in source.layers])
            if first:
                steps.push("forget what it reads", lambda: self._holders.forget_reader(new.job_id))
            self._jobs.add(new)
        if first:
            self._jobs.on_end(new.job_id, lambda info: self._holders.forget_reader(info["id"]))

    def _commit(self, repo_id: str, intent: str, argument: dict[str, Any]) -> Answer:
        try:
            begun: Answer = self._connections.write(repo_id, intent, argument)
        except errors.ImageInUse as error:
            raise self._holders.named(error) from error
        return begun

    def _job(self, repo_id: str, order: Order, job_id: str, digest: str) -> job.JobRequest:
        target = self._connections.description(repo_id)
        return job.JobRequest(
            kind=order.verb,
            job_id=job_id,
            job_type="storage",
            description=f"{order.verb}: image {order.image_id} in {repo_id}",
            entity={"type": "image", "id": order.image_id, "repo_id": repo_id},
            argument={**order.argument, "target": target, "image_id": order.image_id},
            gate=self._connections.gate([repo_id, *order.from_repos]),
            identity=[order.image_id, digest],
        )

    def _register(self, new: job.JobRequest, reads: tuple[str, ...]) -> None:
        repo_id, image_id = new.entity["repo_id"], new.entity["id"]
        first = self._holders.add_reader(new.job_id, reads)
        with undo.Stack() as steps:
            if first:
                steps.push("forget what it reads", lambda: self._holders.forget_reader(new.job_id))
            withdrawn = {"image_id": image_id, "job_id": new.job_id}
            steps.push("withdraw the request", lambda: self._connections.write(repo_id, "withdraw_copy", withdrawn))
            self._jobs.add(new)  # the same request again is answered with its job
        if first:
            told = {"repo_id": repo_id, "change": "begun", "job_id": new.job_id}
            self._events.publish("image", image_id, told)
            self._jobs.on_end(new.job_id, lambda info: self._ended(repo_id, image_id, info))

    def _ended(self, repo_id: str, image_id: str, info: job.Info) -> None:
        """Runs under the registry's lock."""
        self._holders.forget_reader(info["id"])
        told = {"repo_id": repo_id, "change": info["status"], "job_id": info["id"]}
        self._events.publish("image", image_id, told)
