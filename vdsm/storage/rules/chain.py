"""How images depend on each other, decided from their records alone. Pure: no storage is touched here.

Records rule (trap 42): what a qcow2 header says about its backing is never asked.
"""

from collections.abc import Callable, Iterable
from typing import Any

from vdsm import errors
from vdsm.record import Record
from vdsm.storage.rules import models


def down(image_id: str, find: Callable[[str], Record | None]) -> list[Record]:
    """The image and all it is based on, top first, each asked of `find`.

    Raises `ImageNotUsable` when one is missing, or when they go round in a ring.
    """
    found: list[Record] = []
    wanted: str | None = image_id
    while wanted is not None:
        image = find(wanted)
        if image is None or image in found:
            raise errors.ImageNotUsable(image_id=image_id, status=f"without its base {wanted}")
        found.append(image)
        wanted = image["base"]
    return found


def needs(entity: Record) -> set[str]:
    """The images that `entity`, an image or a VM, cannot do without: its base, and what its open work puts there."""
    found = {entity["base"]} if entity.get("base") else set()
    if counts(entity):
        names = work_names(entity)
        found.update(filter(None, [names.get("snapshot"), names.get("hidden")]))
        found.update(change["hidden"] for change in names.get("disks", {}).values())
    return found


def dependents(image_id: str, entities: Iterable[Record]) -> list[str]:
    """Ids of the images and VMs that need `image_id`, deleted and broken ones too."""
    return [entity["id"] for entity in entities if entity["id"] != image_id and image_id in needs(entity)]


def data_names(entity: Record) -> set[str]:
    """All data that `entity` names: its own, and what its work was or is making."""
    found = {entity["data"]["name"]} if entity.get("data") else set()
    names = work_names(entity)
    found.update(filter(None, [names.get("data")]))
    found.update(names.get("images", {}).values())
    return found | {change["data"] for change in names.get("disks", {}).values()}


def standing_data(entity: Record) -> set[str]:
    """The data that `entity` relies on: as `data_names`, without what ended work has left behind."""
    return data_names(entity) if counts(entity) else data_names({**entity, "work": None})


def unused_data(image: Record, carried: Iterable[str], entities: Iterable[Record]) -> list[str]:
    """Data that goes with `image`: what it names and what was made under its lease, unless another record relies on it.

    `carried` must have been listed before `entities` were: data is made after the record that names it (trap 37).
    """
    elsewhere: set[str] = set()
    for entity in entities:
        if entity["id"] != image["id"]:
            elsewhere |= standing_data(entity)
    own = {name for name in carried if models.maker(name) == image["id"]}
    return sorted((own | data_names(image)) - elsewhere)


def open_snapshot(image: Record) -> str | None:
    """The snapshot that the disk's work is making, if any: to be finished before the disk is used."""
    return work_names(image).get("snapshot") if counts(image) else None


def counts(entity: Record) -> bool:
    """Whether what the entity's work names is still to be made, or to be undone: the work has not ended, or has ended
    with something half made, which nothing but the same work finishes."""
    work = entity["work"]
    if work is None or work["state"] == "done":
        return False
    half_made = entity.get("status") == models.BROKEN or work.get("committed", False)
    return half_made or work["state"] in models.UNFINISHED


def claim(image: Record) -> dict[str, Any] | None:
    """What the claim of a VM's job on this disk names (`overlays.claim`), None when there is none. It stands until that
    job is finished or taken back, whoever does it."""
    names = work_names(image)
    return names if "hidden" in names and counts(image) else None


def open_resize(image: Record) -> int | None:
    """The size in bytes that the disk's work is giving it, if any: to be finished before the disk is used."""
    return work_names(image).get("size_bytes") if counts(image) else None


def is_disk_at_rest(image: Record) -> bool:
    """Whether it is a whole disk with no open work: no other image is based on such a one."""
    return image["kind"] == models.DISK and image["status"] != models.BROKEN and not counts(image)


def is_unfinished(image: Record) -> bool:
    """Whether `intents.roll_forward` has something to finish before the disk is used."""
    return open_snapshot(image) is not None or open_resize(image) is not None


def work_names(entity: Record) -> dict[str, Any]:
    """What the entity's work, open or ended, names."""
    return (entity["work"] or {}).get("names") or {}
