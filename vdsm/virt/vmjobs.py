"""Jobs on whole VMs, on the agent's side: who may be worked on, what the worker needs, the claim, the registration.

    plan (records and chains of the disks) --> VM record: work queued --> job registered --> ids answered

The VM must run nowhere. On this host the table knows; elsewhere its lease does, which the claim takes for a moment and
the worker for good.
"""

from collections.abc import Callable
from typing import Any

from vdsm import config, errors, ids, storage
from vdsm.jobs import job, registry
from vdsm.virt import domaintype, states, sysprep, table, template

Options = dict[str, Any]
Answer = dict[str, Any]

# Takes an image's id and what happened to it: the params of an event of topic "image".
TellImage = Callable[[str, dict[str, Any]], object]


class VmJobs:
    """Methods block for children of the repositories that the VM uses, and may be called from any thread."""

    def __init__(
        self,
        settings: config.Config,
        vms: table.Table,
        service: storage.Storage,
        jobs: registry.Registry,
        domain_type: domaintype.DomainType,
        tell_image: TellImage,
    ) -> None:
        self._settings = settings
        self._tell_image = tell_image
        self._table = vms
        self._storage = service
        self._jobs = jobs
        self._domain_type = domain_type

    def sysprep(self, vm_id: str, lease_repo_id: str | None, options: Options) -> Answer:
        """Cleans all disks of the VM, as one job: {job_id}.

        Raises `VmRuns` naming who holds the VM, `NoSuchVm`, `ImageBusy`, `ImageInUse`, `ImageNotUsable`,
        `GenerationMismatch`, `JobExists`, `Overloaded`; then nothing has happened.
        """
        repo_id, disks = self._idle_vm(vm_id, lease_repo_id)
        plans = [self._storage.plan_disk(image_id, disk_repo, writable=True) for disk_repo, image_id in disks]
        work = [
            {
                "repository": self._storage.description(plan.repo_id),
                "image_id": plan.image_id,
                "change": storage.overlays.plan(plan.image_id),
            }
            for plan in plans
        ]
        argument = {"disks": work, "leases": [list(lease) for plan in plans for lease in plan.leases]}
        repos = [repo_id, *(plan.repo_id for plan in plans)]
        begun = self._begin(sysprep.KIND, vm_id, repos, argument, sysprep.names(work), options)
        self._tell_when_done(begun["job_id"], "changed", {plan.image_id: plan.repo_id for plan in plans})
        return begun

    def make_template(
        self, vm_id: str, target_repo_id: str | None, lease_repo_id: str | None, user_data: Any, options: Options
    ) -> Answer:
        """Sysprepped snapshots of copies of all disks, as one job: {job_id, images: [{source_id, image_id}...]}.

        Raises as `sysprep`, and `ImageExists` for an id that is taken.
        """
        repo_id, disks = self._idle_vm(vm_id, lease_repo_id)
        target_id = target_repo_id or repo_id
        copies: list[dict[str, Any]] = []
        held: list[list[Any]] = []
        repos = [repo_id, target_id]
        for disk_repo, image_id in disks:
            source = self._storage.plan_copy(image_id, disk_repo)
            wanted = {"id": options["image_ids"].get(image_id) or ids.new(), "user_data": user_data}
            fields = storage.copying.snapshot_fields(source.layers[0], wanted, options["strategy"])
            self._storage.check_absent(target_id, fields["id"])
            target = self._storage.description(target_id)
            copies.append({"target": target, "source": source.description, "layers": source.layers, "fields": fields})
            held += [list(lease) for lease in source.leases]
            repos.append(source.repo_id)
        argument = {"copies": copies, "leases": held}
        images = [{"source_id": copy["layers"][0]["id"], "image_id": copy["fields"]["id"]} for copy in copies]
        begun = self._begin(template.KIND, vm_id, repos, argument, template.names(copies), options)
        self._tell_when_done(begun["job_id"], "created", {image["image_id"]: target_id for image in images})
        return {**begun, "images": images}

    def _tell_when_done(self, job_id: str, change: str, images: dict[str, str]) -> None:
        """Publishes `change` of `images`, {image: its repository}, once the job is done; a job that fails changes none.

        Runs under the registry's lock then.
        """

        def ended(info: job.Info) -> None:
            for image_id, repo_id in images.items() if info["status"] == job.Status.DONE else ():
                self._tell_image(image_id, {"repo_id": repo_id, "change": change, "job_id": job_id})

        self._jobs.on_end(job_id, ended)

    def _idle_vm(self, vm_id: str, lease_repo_id: str | None) -> tuple[str, list[tuple[str, str]]]:
        """The repository of the VM's record, and (repository, image) of its disks. Raises `VmRuns`, `NoSuchVm`."""
        known = self._table.find(vm_id)
        if known is not None and known.state != states.State.DOWN:
            raise errors.VmRuns(vm_id=vm_id, holder=f"VM {known.spec.name} ({vm_id}) on this host: {known.state}")
        repo_id = self._storage.find_vm(vm_id, lease_repo_id)
        record = self._storage.read_vm(repo_id, vm_id)
        if not record["disks"]:
            raise errors.InvalidParameters(parameter="vmID", reason="the VM has no disks")
        return repo_id, [(self._connected(disk["repo"]), disk["image_id"]) for disk in record["disks"]]

    def _connected(self, repo_name: str) -> str:
        repo_id = self._storage.repo_id_of(repo_name)
        if repo_id is None:
            raise errors.NoSuchRepository(repo_id=repo_name)
        return repo_id

    def _begin(
        self, kind: str, vm_id: str, repos: list[str], argument: Options, names: dict[str, Any], options: Options
    ) -> Answer:
        """Claims the VM and registers the job. Raises what either raises; then the VM is not claimed."""
        job_id = options["job_id"] or ids.new()
        with self._jobs.expecting(job_id):
            self._claim(kind, vm_id, repos, argument, names, {**options, "job_id": job_id})
        return {"job_id": job_id}

    def _claim(
        self, kind: str, vm_id: str, repos: list[str], argument: Options, names: dict[str, Any], options: Options
    ) -> None:
        repo_id, job_id = repos[0], options["job_id"]
        slot = self._storage.claim_vm(
            repo_id, vm_id, job_id=job_id, kind=kind, generation=options["generation"], names=names
        )
        tools = {
            "accelerated": self._domain_type.get() == "kvm",
            "scratch_dir": self._settings.paths.tmp_dir,
        }
        request = job.JobRequest(
            kind=kind,
            job_id=job_id,
            job_type="virt",
            description=f"{kind}: VM {vm_id}",
            entity={"type": "vm", "id": vm_id, "repo_id": repo_id},
            argument={"vm_slot": slot, **argument, **tools, "generation": options["generation"]},
            gate=self._storage.gate(sorted(set(repos))),
            identity=[vm_id, options["generation"]],
        )
        try:
            self._jobs.add(request)
        except errors.VdsmError:
            self._storage.unclaim_vm(repo_id, vm_id, job_id)
            raise
