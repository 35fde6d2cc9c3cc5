"""What an image is: the words of its record, how one is made, and what its record must say before it is used.

An image's record (`vdsm/record.py` has the bytes) has these fields:

    id           UUID
    kind         "disk" (mutable) or "snapshot" (immutable)
    status       "optimized", "degraded" (usable, could be stored better) or "broken" (its data is not complete)
    deleted      True: gone for callers; stays as long as another image is based on it
    size_bytes   what a guest sees
    data         {"name", "format": "raw" or "qcow2"}: where the bytes are. Data is never renamed
    base         the image whose data lies below this one's, or None
    strategy     "space" or "performance": what its maker asked for; decides between optimized and degraded
    user_data    the caller's, returned untouched
    digest       of the request that made it: the same id with the same request is the same image
    created      seconds since 1970
    version      counts writes of the record
    generation   counts finished and fenced jobs
    work         what is being done to it, or how the last work ended; None before the first
    writer       {"host_id", "boot_id"} of the last write, and which owner of the record lease it was: `vdsm/record.py`

`work` is {"job_id" (None: done within a call), "kind", "host_id", "boot_id", "host_generation", "state", "stage",
"stages", "stage_name", "percent", "error", "names"}, and "committed" once there is no way back for it.
`host_generation` is the host's in the lockspace when it queued the job, so that others can tell whether it has been
away since. What the states mean: `verdicts.py`. `names` are the things that are being made:

    createSnapshot, in the disk      {"snapshot": id, "data": name of the disk's new data}
    createSnapshot, in the snapshot  {"disk": id}
    resizeVirtualDisk                {"size_bytes": the disk's new size}
    hidden overlay                   {"disk": id, "data": name of the overlay, "vm": {"repo": persistent name, "id"}}
    disk, before sysprep's commit    {"hidden": id, "vm": {"repo", "id"}, "before": the work before, or None}
    new image of makeTemplate        {"vm": {"repo", "id"}}
    copyImage, importImage           {"source": ...}
    VM record, sysprep               {"disks": {disk id: {"hidden": id, "data": name}}, "repos": {disk id: theirs}}
    VM record, makeTemplate          {"images": {image id: name of its data}, "repo": persistent name of theirs}
    mergeImage                       {"merged": id of the deleted image below, "direction": "pull" or "push"}
    optimizeImage                    {"data": name of the data that replaces the present one}

Pure, but for the clock and this host's boot id.
"""

import hashlib
import json
import time
import uuid
from typing import Any

from vdsm import errors, record, sizes

OPTIMIZED, DEGRADED, BROKEN = "optimized", "degraded", "broken"
DISK, SNAPSHOT, VM = "disk", "snapshot", "vm"
SPACE, PERFORMANCE = "space", "performance"
RAW, QCOW2 = "raw", "qcow2"

# Work in these states is not finished: whoever wrote it is at it, or has died over it.
OPEN = ("queued", "running", "committing")

# Nobody has begun this work, and nobody will by himself: its request said AutoFix=false.
WANTED = "wanted"
# What is named by work in these states is still being made, or waits for somebody who goes on.
UNFINISHED = (*OPEN, WANTED, "interrupted", "fenced")

# Sizes are whole 4096-byte blocks, so that an image fits repositories with either sector size. 16 TiB is what ext4
# allows a file.
BLOCK_BYTES = 4096
MAX_SIZE_BYTES = 16 * sizes.TIB - BLOCK_BYTES
# Half of a record: names, work and the error of a failed job must always find room beside it.
MAX_USER_DATA_BYTES = 16 << 10


def writer(host_id: int) -> dict[str, Any]:
    """Of a first record, and of work. `record.update` says more."""
    return {"host_id": host_id, "boot_id": record.boot_id()}


def size(size_bytes: int) -> int:
    """The size an image of `size_bytes` gets: rounded up to whole blocks. Raises `InvalidParameters`."""
    rounded = sizes.round_up(size_bytes, BLOCK_BYTES)
    if not 0 < rounded <= MAX_SIZE_BYTES:
        raise errors.InvalidParameters(parameter="size", reason=f"must be 1 to {MAX_SIZE_BYTES} bytes")
    return rounded


def check_user_data(user_data: Any) -> None:
    """Raises `InvalidParameters` when it would not leave room in the record."""
    if len(json.dumps(user_data, ensure_ascii=False).encode()) > MAX_USER_DATA_BYTES:
        raise errors.InvalidParameters(parameter="userData", reason=f"larger than {MAX_USER_DATA_BYTES} bytes")


def digest(verb: str, request: dict[str, Any]) -> str:
    """What makes two requests the same one."""
    return hashlib.sha256(json.dumps([verb, request], sort_keys=True).encode()).hexdigest()


def data_name(image_id: str) -> str:
    """A fresh name for data that is made under the data lease of `image_id`."""
    return f"{image_id}.{uuid.uuid4().hex[:8]}"


def maker(name: str) -> str:
    """The image under whose data lease the data was made."""
    return name.partition(".")[0]


def new(fields: dict[str, Any], host_id: int, work: dict[str, Any]) -> record.Record:
    """The first record of an image: broken, generation 0. `fields` are those that the caller decides."""
    blank: dict[str, Any] = {"deleted": False, "base": None, "strategy": SPACE, "user_data": {}}
    fixed = {"status": BROKEN, "generation": 0, "created": int(time.time()), "writer": writer(host_id), "work": work}
    return {**blank, **fields, **fixed}


def work(
    kind: str,
    host_id: int,
    names: dict[str, Any],
    *,
    job_id: str | None = None,
    host_generation: int | None = None,
    wanted: bool = False,
) -> dict[str, Any]:
    """Work that is queued for a job, or, without one, running within the call; `wanted`: left to a later fix."""
    state = WANTED if wanted else "queued" if job_id else "running"
    return {
        **{"job_id": job_id, "kind": kind, **writer(host_id), "host_generation": host_generation},
        **{"state": state, "stage": 0, "stages": 1, "stage_name": ""},
        **{"percent": -1, "error": None, "names": names},
    }


def done(image: record.Record, **changes: Any) -> record.Record:
    """`image` with its work finished: complete, with the status that its strategy gives it, one generation on."""
    ended = {**image["work"], "state": "done", "percent": 100, "names": {}}
    generation = image["generation"] + 1
    changed = {**image, "work": ended, "generation": generation, **changes}
    return {**changed, "status": settled(changed)}


def settled(image: record.Record) -> str:
    """The status of a complete image: degraded when it is stored for space although speed was asked for."""
    fast = image["data"]["format"] == RAW and image["base"] is None
    return DEGRADED if image["strategy"] == PERFORMANCE and not fast else OPTIMIZED


def is_open(image: record.Record) -> bool:
    """Whether the record's work is not finished; what was committed is not until it is done, whatever came between."""
    work = image["work"] or {}
    return work.get("state") in OPEN or (work.get("committed", False) and work["state"] != "done")


def check_generation(image: record.Record, expected: int | None) -> None:
    if expected is not None and image["generation"] != expected:
        raise errors.GenerationMismatch(entity=image["id"], actual=image["generation"], expected=expected)


def check_usable(image: record.Record, kind: str | None = None) -> None:
    """Raises unless the image is complete, not deleted, of `kind` and claimed by no job.

    Work without a job's id is done within a call, under the lease: who sees it broken and open sees a maker that died.
    """
    if image["deleted"]:
        raise errors.ImageNotUsable(image_id=image["id"], status="deleted")
    if kind is not None and image["kind"] != kind:
        raise errors.WrongKind(image_id=image["id"], kind=image["kind"], needed=kind)
    if is_open(image) and image["work"]["job_id"]:
        raise busy(image)
    if image["status"] == BROKEN:
        raise errors.ImageNotUsable(image_id=image["id"], status=BROKEN)


def busy(image: record.Record) -> errors.ImageBusy:
    about = image["work"]
    return errors.ImageBusy(
        image_id=image["id"], job_id=about["job_id"], state=about["state"], host_id=about["host_id"]
    )
