"""What could be better in a repository, decided from what was read of it. Pure: no storage is touched here.

A finding is one thing that a job can do about it:

    type      fix                what the job does
    clean     cleanImage         removes an image that was deleted, or will never be finished, and that nobody needs
    clean     cleanLeftovers     removes data that no record names, and a slot without a record
    clean     cleanVmSlot        removes a VM's slot without a record
    optimize  optimizeImage      stores an image as fast as its maker asked for
    merge     mergeImage         joins a deleted image and the only one that is based on it
    mend      createVirtualDisk, createSnapshot, resizeVirtualDisk, copyImage, importImage: finishes what the verb began
    mend      mendVm             finishes or takes back a job on a whole VM
    mend      endWork            ends work that nobody is at; the image itself is well
    mend      relinkImage        makes the header of an image name what its record does (trap 42)
    mend      unknownWork        nothing: this agent does not know the work that has left the image broken

A finding with an obstacle cannot be done as things are. It is there so that no image is broken without a word.

What somebody is at is never a finding. Reading all this and acting on it are two moments, so a fix looks again under
its leases; `guard` is what must still be so then.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vdsm.record import Record
from vdsm.storage.rules import chain, models

CLEAN, OPTIMIZE, MERGE, MEND = TYPES = ("clean", "optimize", "merge", "mend")

CLEAN_IMAGE, CLEAN_LEFTOVERS, CLEAN_VM_SLOT = "cleanImage", "cleanLeftovers", "cleanVmSlot"
OPTIMIZE_IMAGE, MERGE_IMAGE = "optimizeImage", "mergeImage"
MEND_VM, END_WORK, RELINK_IMAGE = "mendVm", "endWork", "relinkImage"
UNKNOWN_WORK = "unknownWork"
COPY_IMAGE = "copyImage"
# Verbs whose work is finished by a job of the same kind.
FINISHED = ("createVirtualDisk", "createSnapshot", "resizeVirtualDisk", COPY_IMAGE, "importImage")
OF_VMS = (CLEAN_VM_SLOT, MEND_VM)
TYPE_OF = {
    **dict.fromkeys((CLEAN_IMAGE, CLEAN_LEFTOVERS, CLEAN_VM_SLOT), CLEAN),
    **{OPTIMIZE_IMAGE: OPTIMIZE, MERGE_IMAGE: MERGE},
    **dict.fromkeys((MEND_VM, END_WORK, RELINK_IMAGE, UNKNOWN_WORK, *FINISHED), MEND),
}


class Survey(NamedTuple):
    """What a repository holds.

    data       {name: bytes it takes}, listed before the records were read (trap 37)
    empty...   slots without a record that nobody holds
    live       ids of the images and VMs that somebody is at
    headers    of whole images that have one: {id: what it names as the data below, {"name", "format"} or None}
    """

    repo_name: str
    data: dict[str, int]
    images: dict[str, Record]
    vms: dict[str, Record]
    empty: frozenset[str]
    empty_vms: frozenset[str]
    live: frozenset[str]
    headers: dict[str, dict[str, str | None] | None]

    @property
    def entities(self) -> list[Record]:
        return [*self.images.values(), *self.vms.values()]


class Finding(NamedTuple):
    """`entity` is the id of an image or, with `is_vm`, of a VM. `freed_bytes`: None where that is not known before.
    `obstacle`: why the fix cannot be done, None when it can."""

    type: str
    fix: str
    entity: str
    description: str
    guard: dict[str, Any]
    freed_bytes: int | None = None
    is_vm: bool = False
    obstacle: str | None = None


def findings(survey: Survey) -> list[Finding]:
    """All there is to do, by type and then by id: the same for the same survey."""
    found = [*_of_images(survey), *_of_vms(survey), *_leftovers(survey)]
    return sorted(found, key=lambda one: (TYPES.index(one.type), one.fix, one.entity))


def find(survey: Survey, fix: str, entity: str) -> Finding | None:
    """The finding of that kind about the image or VM `entity`."""
    return next((one for one in findings(survey) if (one.fix, one.entity) == (fix, entity)), None)


# -- images ----------------------------------------------------------------------------------------------------------


def _of_images(survey: Survey) -> Iterator[Finding]:
    held = _held_by_vms(survey)
    for image in survey.images.values():
        if image["id"] in survey.live or image["id"] in held:
            continue
        found = _of_image(survey, image)
        if found is not None:
            yield found


def _held_by_vms(survey: Survey) -> set[str]:
    """What jobs on VMs have made: finished or taken back with the VM's other disks, never alone (trap 39)."""
    held: set[str] = set()
    for vm in survey.vms.values():
        if chain.counts(vm):
            held |= made_for_vm(vm)
    return held


def made_for_vm(vm: Record) -> set[str]:
    """Ids of the images that the VM's work names as its own."""
    names = (vm["work"] or {}).get("names") or {}
    return {change["hidden"] for change in names.get("disks", {}).values()} | set(names.get("images", {}))


def _of_image(survey: Survey, image: Record) -> Finding | None:
    if chain.claim(image) is not None:
        return _claimed_by_vm(survey, image)
    if image["status"] == models.BROKEN and "vm" in chain.work_names(image):
        return _left_by_vm(survey, image)
    if image["deleted"]:
        return _deleted(survey, image)
    if image["status"] == models.BROKEN:
        return _broken(survey, image)
    if image["status"] == models.DEGRADED:
        description = f"store {_name(image)} as raw data without a base, as its strategy asks"
        return Finding(OPTIMIZE, OPTIMIZE_IMAGE, image["id"], description, _guard(image))
    if chain.counts(image) and not _is_merging(survey, image):
        description = f"{image['work']['kind']} on {_name(image)} has died: end it, so that the image can be used"
        return Finding(MEND, END_WORK, image["id"], description, _guard(image))
    if not chain.counts(image) and _is_misled(survey, image):
        description = f"let the header of {_name(image)} name what it is based on, as its record does"
        return Finding(MEND, RELINK_IMAGE, image["id"], description, _guard(image))
    return None


def _is_misled(survey: Survey, image: Record) -> bool:
    """Whether the header names something else than the record. Nothing of ours asks it, but somebody may."""
    below = survey.images.get(image["base"] or "")
    wanted = below["data"] if below is not None else None
    return image["id"] in survey.headers and survey.headers[image["id"]] != wanted


def _deleted(survey: Survey, image: Record) -> Finding | None:
    users = chain.dependents(image["id"], survey.entities)
    if not users:
        return _to_clean(survey, image, f"remove {_name(image)}, which was deleted")
    above = survey.images.get(users[0])
    if len(users) > 1 or above is None or not _can_be_merged(survey, image, above):
        return None
    description = f"merge {_name(image)}, which was deleted, with {_name(above)}, which is based on it"
    guard = {**_guard(image), "into": above["id"], "into_generation": above["generation"]}
    return Finding(MERGE, MERGE_IMAGE, image["id"], description, guard)


def _can_be_merged(survey: Survey, image: Record, above: Record) -> bool:
    """Whether the two can be one. A deleted image that nobody needs is cleaned, not merged; what is half made, or
    belongs to a job on a VM, comes first. A merge that was cut off has broken the lower one itself."""
    begun = (image["work"] or {}).get("kind") == MERGE_IMAGE
    whole = above["status"] != models.BROKEN and (image["status"] != models.BROKEN or begun)
    free = above["id"] not in {*survey.live, *_held_by_vms(survey)} and chain.claim(above) is None
    needed = not above["deleted"] or bool(chain.dependents(above["id"], survey.entities))
    return whole and free and needed and above["base"] == image["id"]


def _is_merging(survey: Survey, image: Record) -> bool:
    """Whether the dead work is a merge that is a finding of the lower image."""
    below = survey.images.get(image["base"] or "")
    merging = image["work"]["kind"] == MERGE_IMAGE and below is not None and below["id"] not in survey.live
    return merging and below is not None and below["deleted"] and _deleted(survey, below) is not None


def _broken(survey: Survey, image: Record) -> Finding | None:
    kind, names = (image["work"] or {}).get("kind"), chain.work_names(image)
    if kind == "createSnapshot" and image["kind"] == models.SNAPSHOT:
        disk = survey.images.get(names["disk"])
        if disk is not None and chain.open_snapshot(disk) == image["id"]:
            return None  # finished with its disk
        return _to_clean(survey, image, f"remove {_name(image)}, which was never begun")
    if kind in FINISHED:
        return Finding(MEND, kind, image["id"], f"finish {_name(image)}: {kind} was {_ending(image)}", _guard(image))
    obstacle = f"it was left by {kind}, which this agent does not know; another version may finish it"
    description = f"{_name(image)} is broken: {obstacle}, removeImage takes it away"
    return Finding(MEND, UNKNOWN_WORK, image["id"], description, _guard(image), obstacle=obstacle)


def _left_by_vm(survey: Survey, image: Record) -> Finding | None:
    """Made for a VM whose record does not speak of it any more. A disk that is claimed for it is freed first."""
    work = image["work"]
    if chain.dependents(image["id"], survey.entities):
        return None
    found = _to_clean(survey, image, f"remove {_name(image)}, which {work['kind']} of a VM has left behind")
    return _ask_vm(survey, found, work["names"]["vm"])


def _claimed_by_vm(survey: Survey, disk: Record) -> Finding | None:
    """Mended with its VM as long as that speaks of the same hidden image."""
    names = disk["work"]["names"]
    if names["hidden"] in _held_by_vms(survey):
        return None
    description = f"end what {disk['work']['kind']} of a VM has left behind on {_name(disk)}, so that it can be used"
    found = Finding(MEND, END_WORK, disk["id"], description, _guard(disk))
    return _ask_vm(survey, found, {**names["vm"], "made": names["hidden"]})


def _ask_vm(survey: Survey, found: Finding, vm: dict[str, str]) -> Finding:
    """One in another repository must be asked first, whether it speaks of the image (`made`: of that one)."""
    return found._replace(guard={**found.guard, "vm": vm}) if vm["repo"] != survey.repo_name else found


def _to_clean(survey: Survey, image: Record, description: str) -> Finding:
    unused = chain.unused_data(image, survey.data, survey.entities)
    freed = sum(survey.data.get(name, 0) for name in unused)
    return Finding(CLEAN, CLEAN_IMAGE, image["id"], description, _guard(image), freed)


# -- VMs -------------------------------------------------------------------------------------------------------------


def _of_vms(survey: Survey) -> Iterator[Finding]:
    for vm in survey.vms.values():
        if vm["id"] not in survey.live and chain.counts(vm):
            way = "finish" if vm["work"].get("committed") else "take back"
            description = f"{way} {vm['work']['kind']} of VM {vm['name'] or vm['id']}, which was {_ending(vm)}"
            yield Finding(MEND, MEND_VM, vm["id"], description, _guard(vm), is_vm=True)


# -- what no record names --------------------------------------------------------------------------------------------


def _leftovers(survey: Survey) -> Iterator[Finding]:
    unnamed = unnamed_data(survey.data, survey.entities)
    for image_id in sorted({models.maker(name) for name in unnamed} | survey.empty):
        if image_id not in survey.live:
            freed = sum(survey.data[name] for name in unnamed if models.maker(name) == image_id)
            description = f"remove what is left of image {image_id}, which nothing names"
            yield Finding(CLEAN, CLEAN_LEFTOVERS, image_id, description, {}, freed)
    for vm_id in survey.empty_vms:
        description = f"remove the empty slot of VM {vm_id}"
        yield Finding(CLEAN, CLEAN_VM_SLOT, vm_id, description, {}, 0, is_vm=True)


def unnamed_data(data: dict[str, int] | list[str], entities: list[Record]) -> list[str]:
    """The data that no record relies on. `data` was listed before the records (trap 37)."""
    named: set[str] = set()
    for entity in entities:
        named |= chain.standing_data(entity)
    return sorted(set(data) - named)


# -- words -----------------------------------------------------------------------------------------------------------


def _guard(entity: Record) -> dict[str, Any]:
    return {"generation": entity["generation"], "job_id": (entity["work"] or {}).get("job_id")}


def _name(image: Record) -> str:
    return f"{image['kind']} {image['id']}"


def _ending(entity: Record) -> str:
    """How the work stands, for people."""
    state = entity["work"]["state"]
    return {models.WANTED: "asked for and not begun"}.get(state, "interrupted" if state in models.OPEN else state)
