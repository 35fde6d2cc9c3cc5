"""What is in the repositories before a verb runs: built once through the agent, kept aside, laid out for each case."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import storage_fixture
from tests.crash import hosts, outside, places, worlds
from tests.until import until
from vdsm import ids
from vdsm.tool import guestimage

SIZE_BYTES = 1 << 20
PLACES = ("main", "other")
EXPORT, FRESH = "export", "fresh"  # where files are exported to, and where a repository is going to be made
_DIRECTORIES = (EXPORT, FRESH)


class Scene:
    """A kept state of both repositories. `ids` are what verbs work on, by the names that the builder gave them."""

    def __init__(self, kept: Path, names: dict[str, Any]) -> None:
        self._kept = kept
        self.ids = names
        self.before: dict[str, Any] = {}

    def keep(self, world: worlds.World) -> None:
        world.sweep()
        self._kept.mkdir(parents=True)
        for name in PLACES:
            world.place(name).keep(self._kept / name)
        for name in _DIRECTORIES:
            shutil.copytree(world.directory / name, self._kept / name, copy_function=places.copy_sparse)
        self.before = state(world)

    def lay_out(self, world: worlds.World) -> None:
        _rest(world)
        for name in PLACES:
            world.place(name).lay_out(self._kept / name)
        _empty_directories(world)
        for name in _DIRECTORIES:
            shutil.copytree(self._kept / name, world.directory / name, dirs_exist_ok=True)


def _rest(world: worlds.World) -> None:
    """Returns when no host uses anything."""
    world.sweep()
    until(lambda: not any(world.place(name).busy() for name in PLACES), 90)


def empty(world: worlds.World) -> None:
    _rest(world)
    for name in PLACES:
        world.place(name).empty()
    _empty_directories(world)


def _empty_directories(world: worlds.World) -> None:
    for name in _DIRECTORIES:
        shutil.rmtree(world.directory / name, ignore_errors=True)
        (world.directory / name).mkdir()


def state(world: worlds.World) -> dict[str, Any]:
    """What callers have in both repositories, and beside them."""
    return {
        **{place: outside.shown(world.place(place)) for place in PLACES},
        **{f"VMs of {place}": outside.vms(world.place(place)) for place in PLACES},
        EXPORT: outside.files(world.directory / EXPORT),
        FRESH: outside.repository(world.directory / FRESH),
    }


def strays(world: worlds.World) -> list[str]:
    at = {place: world.place(place) for place in PLACES}
    return [f"{name}: {stray}" for name, place in at.items() for stray in (*outside.strays(place), *place.busy())]


def held(world: worlds.World) -> list[str]:
    return [f"{place}: {lease}" for place in PLACES for lease in outside.held(world.place(place))]


def hidden(world: worlds.World) -> list[str]:
    return [f"{place}: {left}" for place in (EXPORT, FRESH) for left in outside.hidden(world.directory / place)]


def unguarded(world: worlds.World) -> list[str]:
    return [f"{place}: {disk}" for place in PLACES for disk in outside.unguarded(world.place(place))]


class Builder:
    """Short words for what scenes are built of."""

    def __init__(self, agent: hosts.Agent) -> None:
        self.agent = agent
        self.storage = agent.storage
        self.world = agent.world

    def disk(self, pattern: int, repo: str = "main", **options: Any) -> str:
        made = self.storage.create_virtual_disk(repo, SIZE_BYTES, None, {"is": "mine"}, options)["image_id"]
        self.write(made, pattern, repo=repo)
        return str(made)

    def snapshot(self, disk: str, pattern: int, repo: str = "main") -> str:
        """A snapshot, and something new on the disk."""
        made = self.storage.create_snapshot(repo, disk, {})["image_id"]
        self.write(disk, pattern, offset=pattern << 12, repo=repo)
        return str(made)

    def above(self, snapshot: str, pattern: int, repo: str = "main", **options: Any) -> str:
        made = self.storage.create_virtual_disk(repo, 0, snapshot, {}, options)["image_id"]
        self.write(made, pattern, offset=pattern << 12, repo=repo)
        return str(made)

    def remove(self, image_id: str, repo: str = "main") -> None:
        self.storage.remove_image(repo, image_id)

    def vm(self, *disks: str) -> str:
        vm_id = ids.new()
        name = self.storage.repo_name("main")
        fields = {"name": "guest", "disks": [{"repo": name, "image_id": disk} for disk in disks]}
        self.storage.ensure_vm("main", vm_id, fields)
        return vm_id

    def write(self, image_id: str, pattern: int, offset: int = 0, length: int = 65536, repo: str = "main") -> None:
        with self.data(image_id, repo) as (path, data_format):
            storage_fixture.qemu_io(path, data_format, f"write -P {pattern} {offset} {length}")

    @contextlib.contextmanager
    def data(self, image_id: str, repo: str = "main") -> Iterator[tuple[Path, str]]:
        """(where the image's data is inside the block, its format)."""
        images = outside.records(self.world.place(repo), "images")
        chain = [images[image_id]]
        while (base := chain[-1]["base"]) is not None:
            chain.append(images[base])
        name, *below = (image["data"]["name"] for image in chain)
        with self.world.data(repo, name, below) as path:
            yield path, chain[0]["data"]["format"]


def disks(build: Builder) -> dict[str, Any]:
    """A plain disk, a raw one, and a disk on a chain of two snapshots, one of them with another disk on it."""
    plain, raw = build.disk(1), build.disk(2, strategy="performance")
    top = build.disk(3)
    low = build.snapshot(top, 4)
    high = build.snapshot(top, 5)
    beside = build.above(low, 6)
    return {"plain": plain, "raw": raw, "top": top, "high": high, "low": low, "beside": beside}


def nothing(build: Builder) -> dict[str, Any]:
    """Two empty repositories."""
    return {}


def file_there(build: Builder) -> dict[str, Any]:
    """The disks, and a file where one of them is going to be exported to."""
    (build.world.export_dir / "there.raw").write_bytes(b"\x31" * 70_000)
    return disks(build)


def virtual_machine(build: Builder) -> dict[str, Any]:
    """A VM with a plain disk and one on a snapshot."""
    first, second = build.disk(1), build.disk(2)
    snapshot = build.snapshot(second, 3)
    return {"first": first, "second": second, "snapshot": snapshot, "vm": build.vm(first, second)}


def machine_that_ran(build: Builder) -> dict[str, Any]:
    """A VM of which this host does not know yet that it runs no more."""
    names = virtual_machine(build)
    ran = {"last_host": build.world.host_name, "started": 1}
    build.storage.finish_vm("main", names["vm"], ran)
    return names


def real_guest(build: Builder) -> dict[str, Any]:
    """A VM with a disk that virt-sysprep knows what to do with."""
    path = build.world.import_dir / "guest.raw"
    shutil.copyfile(guestimage.build(guestimage.default_cache()).disk_path, path)
    begun = build.storage.import_image("main", str(path), "raw", {}, {"job_id": ids.new()})
    build.agent.ended(begun["job_id"])
    path.unlink()
    return {"first": begun["image_id"], "vm": build.vm(begun["image_id"])}


def deleted_base(build: Builder) -> dict[str, Any]:
    """A disk on two deleted snapshots, the lower one with another disk on it."""
    top = build.disk(1)
    low = build.snapshot(top, 2)
    high = build.snapshot(top, 3)
    beside = build.above(low, 4)
    build.remove(high)
    build.remove(low)
    return {"top": top, "low": low, "high": high, "beside": beside}


def copied_snapshot(build: Builder) -> dict[str, Any]:
    """A snapshot in both repositories, deleted in the other one, where a disk is on it."""
    disk = build.disk(1)
    snapshot = build.snapshot(disk, 2)
    build.agent.ended(build.storage.copy_image("other", snapshot)["job_id"])
    build.above(snapshot, 3, repo="other")
    build.remove(snapshot, repo="other")
    return {"disk": disk, "snapshot": snapshot}


def misled(build: Builder) -> dict[str, Any]:
    """A disk whose header names something else than the snapshot that it is based on."""
    disk = build.disk(1)
    snapshot = build.snapshot(disk, 2)
    with build.data(disk) as (path, _):
        relabelled = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "gone", "-F", "raw", str(path)]
        subprocess.run(relabelled, check=True)
    return {"disk": disk, "snapshot": snapshot}


def pushed(build: Builder) -> dict[str, Any]:
    """A disk with little of its own on a deleted snapshot with much, and a raw snapshot below."""
    top = build.disk(1, strategy="performance")
    build.snapshot(top, 2)
    build.write(top, 3, 0, SIZE_BYTES // 2)
    deleted = build.snapshot(top, 4)
    build.remove(deleted)
    return {"top": top, "deleted": deleted}


def pulled(build: Builder) -> dict[str, Any]:
    """A disk with much of its own on a deleted snapshot with little, on a snapshot that stays."""
    top = build.disk(1)
    build.snapshot(top, 2)
    deleted = build.snapshot(top, 3)
    build.write(top, 4, 0, SIZE_BYTES // 2)
    build.remove(deleted)
    return {"top": top, "deleted": deleted}


def degraded(build: Builder) -> dict[str, Any]:
    """A disk that should be fast, on a deleted snapshot that another disk needs too."""
    disk = build.disk(1)
    snapshot = build.snapshot(disk, 2)
    slow = build.above(snapshot, 3, strategy="performance")
    return {"disk": disk, "snapshot": snapshot, "slow": slow}


def backed_up(build: Builder) -> dict[str, Any]:
    """A snapshot that both repositories have, the disk that goes on from it, and a whole copy of that disk."""
    disk = build.disk(1)
    snapshot = build.snapshot(disk, 2)
    build.agent.ended(build.storage.copy_image("other", snapshot)["job_id"])
    copied = build.storage.copy_image("other", disk)
    build.agent.ended(copied["job_id"])
    build.write(disk, 5, SIZE_BYTES // 2)
    return {"disk": disk, "snapshot": snapshot, "copied": copied["image_id"]}


Build = Callable[[Builder], dict[str, Any]]
