"""The verbs of the matrix. Each begins in a scene, ends in another, and may stop at any step between."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.crash import hosts, scenes
from vdsm import ids

Names = dict[str, Any]


class Interrupted(NamedTuple):
    """A scene: what is left when the host dies in the middle of a verb, before `step` of its process."""

    verb: str
    process: str
    step: str


class Verb(NamedTuple):
    """`act` calls the agent and waits for the job, as a caller would. `names` are the scene's, and `new` an id that is
    the same in each run, for what is made. `wound`: the tool whose call kills the worker, so that another one has to
    conclude; `only`: the processes that this verb is in the matrix for."""

    scene: scenes.Build | Interrupted
    act: Callable[[hosts.Agent, Names], object]
    wound: int | None = None
    only: str = ""


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
        asked = {"job_id": ids.new(), "participating_repositories": ["main"], **options}
        if image not in ("snapshot", "high", "low"):
            asked["image_id"] = names["new"]
        agent.ended(agent.storage.copy_image(target, names[image], {"copied": 1}, asked)["job_id"])

    return act


def _import(agent: hosts.Agent, names: Names) -> None:
    path = agent.world.import_dir / "import.raw"
    path.write_bytes(b"\x21" * 4096 + bytes(200_000) + b"\x22" * 5000)
    agent.ended(agent.storage.import_image("main", str(path), "raw", {}, _options(names, job_id=ids.new()))["job_id"])


def _remove(image: str) -> Callable[[hosts.Agent, Names], object]:
    def act(agent: hosts.Agent, names: Names) -> None:
        agent.storage.remove_image("main", names[image])

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


def _sysprep(agent: hosts.Agent, names: Names) -> None:
    agent.ended(agent.vms.sysprep(names["vm"], "main", {"job_id": ids.new(), "generation": None})["job_id"])


def _make_template(agent: hosts.Agent, names: Names) -> None:
    wanted = {names["first"]: names["new"], names["second"]: names["newer"]}
    options = {"job_id": ids.new(), "generation": None, "image_ids": wanted, "strategy": "space"}
    agent.ended(agent.vms.make_template(names["vm"], "other", "main", {}, options)["job_id"])


# What the repositories' children do within a call.
CALLS: dict[str, Verb] = {
    "createVirtualDisk": Verb(scenes.disks, _create(scenes.SIZE_BYTES)),
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
    "sysprep": Verb(scenes.virtual_machine, _sysprep),
    "makeTemplate": Verb(scenes.virtual_machine, _make_template),
    "copyImage-concluded": Verb(scenes.disks, _copy("top"), wound=2, only="conclude"),
    "sysprep-concluded": Verb(scenes.virtual_machine, _sysprep, wound=4, only="conclude"),
    "makeTemplate-concluded": Verb(scenes.virtual_machine, _make_template, wound=4, only="conclude"),
}
# What the jobs of fixes do.
FIXES: dict[str, Verb] = {
    "merge-push": Verb(scenes.pushed, _fix("merge")),
    "merge-pull": Verb(scenes.pulled, _fix("merge")),
    "optimize": Verb(scenes.degraded, _fix("optimize")),
    "clean": Verb(Interrupted("removeImage", "main-1", "unlink#1"), _fix("clean")),
    "clean-slot-begun": Verb(Interrupted("createVirtualDisk", "main-1", "fallocate#1"), _fix("clean")),
    "clean-slot": Verb(Interrupted("createVirtualDisk", "main-1", "pwritev2#1"), _fix("clean")),
    "mend-createVirtualDisk": Verb(Interrupted("createVirtualDisk-base", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-createSnapshot": Verb(Interrupted("createSnapshot-chain", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-resize": Verb(Interrupted("resizeVirtualDisk", "tool-1", "pwrite64#1"), _fix("mend")),
    "mend-copyImage": Verb(Interrupted("copyImage", "tool-2", "pwrite64#1"), _fix("mend", "other")),
    "mend-importImage": Verb(Interrupted("importImage", "tool-2", "pwrite64#1"), _fix("mend")),
    "mend-sysprep": Verb(Interrupted("sysprep", "tool-4", "pwrite64#1"), _fix("mend")),
    "mend-makeTemplate": Verb(Interrupted("makeTemplate", "tool-4", "pwrite64#1"), _fix("mend")),
}
MATRIX = {**CALLS, **JOBS, **FIXES}
VERBS = {**MATRIX, "sysprep-real": Verb(scenes.real_guest, _sysprep)}
