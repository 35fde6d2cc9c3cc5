"""What a VM needs to run on an image, and a worker to copy it. Pure: computed from what a repository's child has read,
which is checked again under the leases."""

from typing import Any, NamedTuple

from vdsm import leases, record
from vdsm.record import Record
from vdsm.storage.repository import Repository
from vdsm.storage.rules import models

# What the launcher compares under the leases: anything else may change while the VM is being started.
_EXPECTED = ("status", "data", "base", "deleted")


class DiskPlan(NamedTuple):
    """Where an image is, what it is made of, what QEMU must hold, and what must still be so then.

    `backing` is the chain below, the nearest first, {"path", "format", "size_bytes"} each. `records` are for the
    launcher: {"slot": [lockspace, name, path, offset], "expect": {field: value}} each. With `is_volume` all of it are
    block devices, there while `Storage.keeping` keeps them, or QEMU has them open; `names` is what the repository calls
    them. With `grows` the first of them has to grow while it is written.
    """

    repo_id: str
    repo_name: str
    image_id: str
    path: str
    format: str
    size_bytes: int
    backing: list[dict[str, Any]]
    leases: list[leases.Lease]
    records: list[dict[str, Any]]
    is_volume: bool = False
    names: tuple[str, ...] = ()
    grows: bool = False


class CopyPlan(NamedTuple):
    """What a worker needs to copy an image: the repository's description, the records of the chain, top first, and the
    leases of the chain, shared."""

    repo_id: str
    description: dict[str, Any]
    layers: list[Record]
    leases: list[leases.Lease]


def plan(repo: Repository, repo_id: str, found: dict[str, Any], *, writable: bool) -> DiskPlan:
    """For the chain that `reading.layers` found. The top is held exclusively when it is `writable`, the rest shared."""
    images: list[Record] = found["images"]
    top, *_ = images
    slots = [record.Slot(*slot) for slot in found["slots"]]
    held = [slot.data_lease(shared=not (writable and slot.name == top["id"])) for slot in slots]
    checks = [{name: image[name] for name in _EXPECTED} for image in images]
    names = tuple(image["data"]["name"] for image in images)
    file, *backing = [
        {"path": repo.data_path(name), "format": image["data"]["format"], "size_bytes": image["size_bytes"]}
        for name, image in zip(names, images, strict=True)
    ]
    return DiskPlan(
        repo_id=repo_id,
        repo_name=repo.name,
        image_id=top["id"],
        path=file["path"],
        format=file["format"],
        size_bytes=top["size_bytes"],
        backing=backing,
        leases=held,
        records=[{"slot": list(slot), "expect": expect} for slot, expect in zip(slots, checks, strict=True)],
        is_volume=not repo.abilities.thin,
        names=names,
        grows=writable and not repo.abilities.thin and file["format"] != models.RAW,
    )
