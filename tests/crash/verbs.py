"""The verbs of the matrix. Each begins in a scene, ends in another, and may stop at any step between."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.crash import hosts, outside, scenes, worlds
from vdsm import errors, ids

Names = dict[str, Any]


class Interrupted(NamedTuple):
    """A scene: what is left when the host dies in the middle of a verb, before `step` of its process, or when that
    step fails with the errno `kind`."""

    verb: str
    process: str
    step: str
    kind: str = "kill"


def _nothing(world: worlds.World, names: Names) -> object:
    """Tells nothing."""


class Verb(NamedTuple):
    """`act` calls the agent and waits for the job, as a caller would. `names` are the scene's, and `new` an id that is
    the same in each run, for what is made. `wound`: the tool whose call kills the worker, so that another one has to
    conclude; `only`: the processes that this verb is in the matrix for.

    `hang`: the tool that does not end by itself, so that its job can be aborted then; `or_else`: the verb whose result
    may be there instead when this one was cut off. `again`: what is left is no fix's, but the same request's.
    `tells`: what is there at once, before anything is fixed: as before the verb, or as after it.
    """

    scene: scenes.Build | Interrupted
    act: Callable[[hosts.Agent, Names], object]
    wound: int | None = None
    only: str = ""
    hang: int | None = None
    or_else: str = ""
    again: bool = False
    tells: Callable[[worlds.World, Names], object] = _nothing


def _options(names: Names, **more: Any) -> dict[str, Any]:
    return {"image_id": names["new"], **more}


def _create(size: int, **options: Any) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> object:
        return agent.storage.create_virtual_disk("main", size, None, {"new": 1}, _options(names, **options))

    return act


def _create_above(agent: hosts.Agent, names: Names) -> object:
    return agent.storage.create_virtual_disk("main", 0, names["high"], {}, _options(names))


def _snapshot(disk: str) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> object:
        return agent.storage.create_snapshot("main", names[disk], {"new": 1}, _options(names))

    return act


def _copy(image: str, target: str = "other", **options: Any) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.ended(_begin_copy(image, target, **options)(agent, names))

    return act


def _begin_copy(image: str, target: str = "other", **options: Any) -> Callable[[hosts.Agent, Names], Any]:
    def begin(agent: hosts.Agent, names: Names) -> Any:
        asked = {"job_id": ids.new(), "participating_repositories": ["main"], **options}
        if image not in ("snapshot", "high", "low"):
            asked["image_id"] = names["new"]
        return agent.storage.copy_image(target, names[image], {"copied": 1}, asked)["job_id"]

    return begin


def _begin_import(agent: hosts.Agent, names: Names) -> str:
    path = agent.world.import_dir / "import.raw"
    path.write_bytes(b"\x21" * 4096 + bytes(200_000) + b"\x22" * 5000)
    return str(agent.storage.import_image("main", str(path), "raw", {}, _options(names, job_id=ids.new()))["job_id"])


def _import(agent: hosts.Agent, names: Names) -> None:
    agent.ended(_begin_import(agent, names))


def _export(name: str, image_format: str, *, overwrite: bool = False) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.ended(_begin_export(name, image_format, overwrite)(agent, names))

    return act


def _begin_export(name: str, image_format: str, overwrite: bool) -> Callable[[hosts.Agent, Names], str]:
    def begin(agent: hosts.Agent, names: Names) -> str:
        path, options = agent.world.export_dir / name, {"job_id": names["job"], "overwrite": overwrite}
        return str(agent.storage.export_image("main", names["top"], str(path), image_format, options)["job_id"])

    return begin


def _remove(image: str, place: str = "main", **options: Any) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.storage.remove_image(place, names[image], options)

    return act


def _set_user_data(agent: hosts.Agent, names: Names) -> None:
    agent.storage.set_image_user_data("main", names["plain"], {"set": "x" * 9000})


def _resize(disk: str) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.storage.resize_virtual_disk("main", names[disk], 3 * scenes.SIZE_BYTES)

    return act


def _copy_difference(base: str) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        asked = _options(names, job_id=ids.new(), participating_repositories=["main"])
        begun = agent.storage.copy_image("other", names["disk"], {}, asked, base_image_id=names[base])
        agent.ended(begun["job_id"])

    return act


def _fix(kind: str, place: str = "main") -> Callable[[hosts.Agent, Names], object]:
    """All fixes of a kind that a check lists."""

    def act(agent: hosts.Agent, names: Names) -> None:
        found = [fix for fix in agent.storage.check_storage_repository(place) if fix["type"] == kind]
        assert found, f"there is nothing to {kind}"
        for fix in found:
            agent.ended(agent.storage.fix_storage_repository(place, fix)["job_id"])

    return act


def _begin_sysprep(agent: hosts.Agent, names: Names) -> str:
    return str(agent.vms.sysprep(names["vm"], "main", {"job_id": ids.new(), "generation": None})["job_id"])


def _sysprep(agent: hosts.Agent, names: Names) -> None:
    agent.ended(_begin_sysprep(agent, names))


def _begin_template(agent: hosts.Agent, names: Names) -> str:
    wanted = {names["first"]: names["new"], names["second"]: names["newer"]}
    options = {"job_id": ids.new(), "generation": None, "image_ids": wanted, "strategy": "space"}
    return str(agent.vms.make_template(names["vm"], "other", "main", {}, options)["job_id"])


def _make_template(agent: hosts.Agent, names: Names) -> None:
    agent.ended(_begin_template(agent, names))


def _aborted(
    begin: Callable[[hosts.Agent, Names], str], *, stop: bool = False, dies: bool = False
) -> Callable[[hosts.Agent, Names], object]:
    """The job's abort while a tool hangs. `dies`: its worker with it, so that another one has to conclude."""

    def act(agent: hosts.Agent, names: Names) -> None:
        agent.aborted(begin(agent, names), stop=stop, dies=dies)

    return act


def _format(agent: hosts.Agent, names: Names) -> None:
    place = agent.world.connection(scenes.FRESH)
    agent.storage.format_storage_repository(*place, {"ioTimeout": agent.world.io_timeout_s})


def _join_anew(agent: hosts.Agent, names: Names) -> None:
    agent.storage.disconnect_storage_repository("other")
    agent.connect("other")


def _create_lease(agent: hosts.Agent, names: Names) -> None:
    agent.storage.create_lease("main", names["new"])


def _delete_lease(agent: hosts.Agent, names: Names) -> None:
    agent.storage.delete_lease("main", names["vm"])


def _fence(name: str, place: str = "main") -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.storage.fence_lease(place, names[name])

    return act


def _generation(kind: str, name: str, place: str = "main") -> Callable[[worlds.World, Names], object]:
    """How far the record counts, and whether its work is open: what a fence changes."""

    def tell(world: worlds.World, names: Names) -> object:
        return outside.generation(world.place(place), kind, names[name])

    return tell


def _finish(disk: str) -> Callable[[hosts.Agent, Names], object]:
    """What a VM's start does first with a disk on which a verb was cut off."""

    def act(agent: hosts.Agent, names: Names) -> None:
        agent.storage.plan_disk(names[disk], "main", True)

    return act


def _end_vm(agent: hosts.Agent, names: Names) -> None:
    agent.storage.finish_vm("main", names["vm"], {"exit_code": 0, "exit_message": "it was shut down"})


def _end_vms(agent: hosts.Agent, names: Names) -> None:
    found = agent.storage.end_vms("main", agent.world.host_name, {"exit_code": 1}, [])
    if names["vm"] in found["held"]:
        raise errors.LeaseHeld(resource=names["vm"], holder="nobody who can be told")


# What the repositories' children do within a call.
CALLS: dict[str, Verb] = {
    "createVirtualDisk": Verb(scenes.disks, _create(scenes.SIZE_BYTES)),
    "createVirtualDisk-first": Verb(scenes.nothing, _create(scenes.SIZE_BYTES)),
    "createVirtualDisk-raw": Verb(scenes.disks, _create(scenes.SIZE_BYTES, strategy="performance")),
    "createVirtualDisk-base": Verb(scenes.disks, _create_above),
    "createSnapshot": Verb(scenes.disks, _snapshot("plain")),
    "createSnapshot-raw": Verb(scenes.disks, _snapshot("raw")),
    "createSnapshot-chain": Verb(scenes.disks, _snapshot("top")),
    "copyImage-undelete": Verb(scenes.copied_snapshot, _copy("snapshot")),
    "removeImage": Verb(scenes.disks, _remove("plain")),
    "removeImage-needed": Verb(scenes.disks, _remove("low")),
    "removeImage-cascade": Verb(scenes.deleted_base, _remove("top")),
    "setImageUserData": Verb(scenes.disks, _set_user_data),
    "resizeVirtualDisk": Verb(scenes.disks, _resize("top")),
    "resizeVirtualDisk-raw": Verb(scenes.disks, _resize("raw")),
    "createVirtualDisk-later": Verb(scenes.disks, _create(scenes.SIZE_BYTES, auto_fix=False)),
    "removeImage-later": Verb(scenes.disks, _remove("plain", auto_fix=False)),
    "removeImage-aborted": Verb(
        Interrupted("copyImage-aborted", "copyImage-1", "unlink#1", "EIO"), _remove("new", "other")
    ),
    "removeImage-stopped": Verb(Interrupted("copyImage-stopped", "copyImage-1", "unlink#1"), _remove("new", "other")),
    "removeImage-interrupted": Verb(Interrupted("importImage", "tool-2", "pwrite64#1"), _remove("new")),
    "VM.create-finishes-createSnapshot": Verb(
        Interrupted("createSnapshot-chain", "tool-1", "pwrite64#1"), _finish("top")
    ),
    "VM.create-finishes-resize": Verb(Interrupted("resizeVirtualDisk", "tool-1", "pwrite64#1"), _finish("top")),
    "VM.create-ended": Verb(scenes.virtual_machine, _end_vm),
    "Host.reconcile": Verb(scenes.machine_that_ran, _end_vms),
    "Lease.create": Verb(scenes.virtual_machine, _create_lease),
    "Lease.delete": Verb(scenes.virtual_machine, _delete_lease),
    "Lease.fence": Verb(scenes.virtual_machine, _fence("vm"), tells=_generation("vms", "vm")),
    "Lease.fence-image": Verb(scenes.disks, _fence("plain"), tells=_generation("images", "plain")),
    "Lease.fence-copyImage": Verb(
        Interrupted("copyImage", "tool-2", "pwrite64#1"),
        _fence("new", "other"),
        tells=_generation("images", "new", "other"),
    ),
    "Lease.fence-sysprep": Verb(
        Interrupted("sysprep", "tool-4", "pwrite64#1"), _fence("vm"), tells=_generation("vms", "vm")
    ),
    "formatStorageRepository": Verb(scenes.nothing, _format, again=True),
    "disconnectStorageRepository": Verb(scenes.nothing, _join_anew),
}
# What a worker does.
JOBS: dict[str, Verb] = {
    "copyImage": Verb(scenes.disks, _copy("plain")),
    "copyImage-raw": Verb(scenes.disks, _copy("top", strategy="performance")),
    "copyImage-here": Verb(scenes.disks, _copy("top", "main")),
    "copyImage-snapshot": Verb(scenes.disks, _copy("high")),
    "copyImage-base": Verb(scenes.backed_up, _copy_difference("snapshot")),
    "copyImage-base-disk": Verb(scenes.backed_up, _copy_difference("copied")),
    "importImage": Verb(scenes.disks, _import),
    "exportImage-raw": Verb(scenes.disks, _export("top.raw", "raw"), again=True),
    "exportImage-qcow2": Verb(scenes.disks, _export("top.qcow2", "qcow2"), again=True),
    "exportImage-overwrite": Verb(scenes.file_there, _export("there.raw", "raw", overwrite=True), again=True),
    "sysprep": Verb(scenes.virtual_machine, _sysprep),
    "makeTemplate": Verb(scenes.virtual_machine, _make_template),
    "copyImage-concluded": Verb(scenes.disks, _copy("top"), wound=2, only="conclude"),
    "sysprep-concluded": Verb(scenes.virtual_machine, _sysprep, wound=4, only="conclude"),
    "makeTemplate-concluded": Verb(scenes.virtual_machine, _make_template, wound=4, only="conclude"),
}
# What a worker does when its job is aborted or stopped, and another one when it cannot.
ABORTS: dict[str, Verb] = {
    "copyImage-aborted": Verb(scenes.disks, _aborted(_begin_copy("top")), only="copy", hang=2, or_else="copyImage-top"),
    "copyImage-stopped": Verb(scenes.disks, _aborted(_begin_copy("top"), stop=True), only="copy", hang=2),
    "importImage-aborted": Verb(scenes.disks, _aborted(_begin_import), only="import", hang=2, or_else="importImage"),
    "exportImage-aborted": Verb(scenes.disks, _aborted(_begin_export("top.raw", "raw", False)), only="export", hang=2),
    "sysprep-aborted": Verb(scenes.virtual_machine, _aborted(_begin_sysprep), only="sysprep", hang=4),
    "makeTemplate-aborted": Verb(scenes.virtual_machine, _aborted(_begin_template), only="makeTemplate", hang=4),
    "copyImage-aborted-concluded": Verb(
        scenes.disks, _aborted(_begin_copy("top"), dies=True), only="conclude", hang=2, or_else="copyImage-top"
    ),
    "copyImage-stopped-concluded": Verb(
        scenes.disks, _aborted(_begin_copy("top"), stop=True, dies=True), only="conclude", hang=2
    ),
    "exportImage-aborted-concluded": Verb(
        scenes.disks, _aborted(_begin_export("top.raw", "raw", False), dies=True), only="conclude", hang=2
    ),
    "sysprep-aborted-concluded": Verb(
        scenes.virtual_machine, _aborted(_begin_sysprep, dies=True), only="conclude", hang=4
    ),
}
# What the jobs of fixes do.
FIXES: dict[str, Verb] = {
    "merge-push": Verb(scenes.pushed, _fix("merge")),
    "merge-pull": Verb(scenes.pulled, _fix("merge")),
    "optimize": Verb(scenes.degraded, _fix("optimize")),
    "clean": Verb(Interrupted("removeImage", "main-1", "unlink#1"), _fix("clean")),
    "clean-slot-begun": Verb(Interrupted("createVirtualDisk", "main-1", "fallocate#1"), _fix("clean")),
    "clean-slot": Verb(Interrupted("createVirtualDisk", "main-1", "pwritev2#1"), _fix("clean")),
    "clean-slot-of-VM": Verb(Interrupted("Lease.create", "main-1", "pwritev2#1"), _fix("clean")),
    "mend-relinkImage": Verb(scenes.misled, _fix("mend")),
    "mend-endWork": Verb(Interrupted("mend-relinkImage", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-createVirtualDisk": Verb(Interrupted("createVirtualDisk-base", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-createSnapshot": Verb(Interrupted("createSnapshot-chain", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-resize": Verb(Interrupted("resizeVirtualDisk", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-copyImage": Verb(Interrupted("copyImage", "tool-2", "pwrite64#1"), _fix("mend", "other")),
    "mend-importImage": Verb(Interrupted("importImage", "tool-2", "pwrite64#1"), _fix("mend")),
    "mend-sysprep": Verb(Interrupted("sysprep", "tool-4", "pwrite64#1"), _fix("mend")),
    "mend-makeTemplate": Verb(Interrupted("makeTemplate", "tool-4", "pwrite64#1"), _fix("mend")),
}
MATRIX = {**CALLS, **JOBS, **ABORTS, **FIXES}
# What is run on volumes so far, where each case takes minutes.
ON_VOLUMES = (
    "createVirtualDisk-first",
    "createVirtualDisk",
    "createSnapshot",
    "removeImage",
    "importImage",
    "copyImage",
)
VERBS = {
    **MATRIX,
    "sysprep-real": Verb(scenes.real_guest, _sysprep),
    "copyImage-top": Verb(scenes.disks, _copy("top")),
}
