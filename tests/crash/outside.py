"""A repository seen by somebody who shares no code with the agent: records by their documented layout, content by
`qemu-img convert` with the chain spelled out, everything else by what lies in its directories."""

import hashlib
import json
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.crash import places

Record = dict[str, Any]

_AREA_BYTES = 32 << 10
_RECORD_OFFSET = 2 << 20
_HEAD = struct.Struct("<8sQII32s")
_OPEN = ("queued", "running", "committing", "interrupted")

_LEADER = struct.Struct("<IIII QQQQQ 48s 48s")  # sanlock's: magic, ..., names of lockspace and resource
_LOCKSPACE, _RESOURCE = 0x12212010, 0x06152010
# When the owner took it, 0: it is free. And in the sector of each host, behind two others, whether it holds it shared.
_TIMESTAMP, _SECTOR_BYTES, _HOST_FLAGS, _SHARED = struct.Struct("<Q"), 512, 128, 1
_TIMESTAMP_OFFSET = 152
_HOSTS = 2
LEASE_BYTES = (2 + _HOSTS) * _SECTOR_BYTES

_known: dict[str, str] = {}  # digest of a chain's files: digest of what they show


def record(read: places.Read) -> Record | None:
    """The newest valid record of a slot."""
    found = []
    for area in (0, _AREA_BYTES):
        raw = read(_RECORD_OFFSET + area, _AREA_BYTES)
        if len(raw) < _AREA_BYTES:
            continue
        magic, version, length, _, digest = _HEAD.unpack_from(raw)
        payload = raw[_HEAD.size : _HEAD.size + length]
        if magic == b"VDSMREC1" and hashlib.sha256(raw[:24] + payload).digest() == digest:
            found.append((version, payload))
    return json.loads(max(found)[1]) if found else None


def records(place: places.Place, kind: str) -> dict[str, Record]:
    """All records of a repository's `images` or `vms`, by id."""
    found = {name: record(read) for name, read in place.slots(kind).items()}
    return {name: known for name, known in found.items() if known is not None}


def shown(place: places.Place) -> dict[str, Any]:
    """What callers have in the repository: each image that is not deleted with all that must never change by itself.

    A broken one shows nothing but that it is broken.
    """
    images = records(place, "images")
    return {
        image_id: _shown(place, image, images) for image_id, image in sorted(images.items()) if not image["deleted"]
    }


def _shown(place: places.Place, image: Record, images: dict[str, Record]) -> Any:
    if image["status"] == "broken":
        return f"broken: {image['work'] and image['work']['kind']} {image['work'] and image['work']['state']}"
    kept = {name: image[name] for name in ("kind", "size_bytes", "user_data")}
    return {**kept, "content": content(place, image, images)}


def content(place: places.Place, image: Record, images: dict[str, Record]) -> str:
    """Digest of all bytes that a guest would read, or why they cannot be read."""
    chain = [image]
    while (base := chain[-1]["base"]) is not None:
        if base not in images or len(chain) > len(images):
            return f"unreadable: no base {base}"
        chain.append(images[base])
    node: dict[str, Any] | None = None
    digest = hashlib.sha256()
    for layer in reversed(chain):
        name, image_format = layer["data"]["name"], layer["data"]["format"]
        path = place.data(name, image_format, layer["size_bytes"])
        if path is None:
            return f"unreadable: no data {name}"
        with path.open("rb") as file:
            digest.update(image_format.encode() + hashlib.file_digest(file, "sha256").digest())
        below, node = (
            node,
            {
                "driver": image_format,
                "file": {"driver": "file", "filename": str(path)},
            },
        )
        if image_format == "qcow2":
            node["backing"] = below
    digest.update(str(image["size_bytes"]).encode())
    if digest.hexdigest() not in _known:
        _known[digest.hexdigest()] = _converted("json:" + json.dumps(node), image["size_bytes"])
    return _known[digest.hexdigest()]


def _converted(source: str, size_bytes: int | None = None) -> str:
    with tempfile.NamedTemporaryFile() as raw:
        done = subprocess.run(
            ["qemu-img", "convert", "-O", "raw", source, raw.name], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            return f"unreadable: {done.stderr.strip()}"
        with Path(raw.name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if size_bytes not in (None, file.tell()):
                return f"unreadable: {file.tell()} bytes instead of {size_bytes}"
    return found


def vms(place: places.Place) -> dict[str, Any]:
    """What callers know of the VMs with a record: all that changes by nobody but them."""
    return {
        vm_id: {name: vm[name] for name in ("name", "disks", "deleted", "exit_code")}
        for vm_id, vm in sorted(records(place, "vms").items())
    }


def generation(place: places.Place, kind: str, name: str) -> Any:
    """Of one of `images` or `vms`: the generation, and how its work stands."""
    known = records(place, kind).get(name)
    return known and {"generation": known["generation"], "work": known["work"] and known["work"]["state"]}


def files(place: Path) -> dict[str, str]:
    """What the files of an export show, by name: the ending says which format they have. Hidden ones do not count."""
    found = {}
    for path in sorted(place.glob("[!.]*")):
        layer = {"driver": path.suffix[1:], "file": {"driver": "file", "filename": str(path)}}
        digest = hashlib.sha256(path.suffix.encode() + path.read_bytes()).hexdigest()
        if digest not in _known:
            _known[digest] = _converted("json:" + json.dumps(layer))
        found[path.name] = _known[digest]
    return found


def repository(place: Path) -> dict[str, Any]:
    """What a directory is: nothing that is called a repository, or all of one."""
    header = place / "repository"
    if not header.exists():
        return {}
    known = record(places.reading(header)) or {}
    with header.open("rb") as file:
        leaders = [_leader(file.read(_LEADER.size)) for at in (0, 1 << 20) if file.seek(at) == at]
    name = known.get("name")
    return {
        "header": {field: known.get(field) for field in ("format", "io_timeout_s", "sector_bytes")},
        "bytes": header.stat().st_size,
        "leases": leaders == [(_LOCKSPACE, name), (_RESOURCE, name)],
        "directories": {path.name: oct(path.stat().st_mode) for path in sorted(place.iterdir()) if path.is_dir()},
    }


def _leader(raw: bytes) -> tuple[int, str]:
    """(magic, lockspace) of a lease."""
    magic, *_, lockspace, _ = _LEADER.unpack(raw)
    return magic, lockspace.rstrip(b"\0").decode()


def held(place: places.Place) -> list[str]:
    """Leases of images and VMs that storage says are held, by one of the first hosts."""
    return [
        f"{name} at {at}"
        for kind in ("images", "vms")
        for name, read in place.slots(kind).items()
        for at in (0, 1 << 20)
        if is_held(read(at, LEASE_BYTES))
    ]


def is_held(raw: bytes) -> bool:
    """Whether a lease's first `LEASE_BYTES` say so."""
    if len(raw) < LEASE_BYTES or int.from_bytes(raw[:4], "little") != _RESOURCE:
        return False
    flags = (raw[(2 + host) * _SECTOR_BYTES + _HOST_FLAGS] for host in range(_HOSTS))
    return any(_TIMESTAMP.unpack_from(raw, _TIMESTAMP_OFFSET)) or any(flag & _SHARED for flag in flags)


def hidden(place: Path) -> list[str]:
    """What was made under a name of its own and never got its own."""
    return [f"{path.name} is left behind" for path in place.glob(".*")]


def unguarded(place: places.Place) -> list[str]:
    """Disks that a committed job on a VM is still going to switch, although another VM might be started on them: their
    record neither claims them for it nor has them on their overlay."""
    images = records(place, "images")
    found = []
    for vm_id, vm in records(place, "vms").items():
        work = vm["work"] or {}
        if work.get("committed") and work["state"] != "done":
            for disk_id, change in work["names"].get("disks", {}).items():
                disk = images[disk_id]
                claimed = (disk["work"] or {}).get("names", {}).get("hidden") == change["hidden"]
                if disk["data"]["name"] != change["data"] and not (claimed and disk["work"]["state"] == "running"):
                    found.append(f"disk {disk_id} is free to use before the {work['kind']} of VM {vm_id} is finished")
    return found


def strays(place: places.Place) -> list[str]:
    """What has no business in a repository that nobody is working on: data and slots that no record accounts for,
    deleted images that nobody needs, work that has not ended."""
    images, vms = records(place, "images"), records(place, "vms")
    named = {image["data"]["name"] for image in images.values()}
    needed = {image["base"] for image in images.values()}
    found = [f"data {name} that no record names" for name in place.data_names() if name not in named]
    for kind, known in (("images", images), ("vms", vms)):
        found += [f"a slot without record in {kind}" for name in place.slots(kind) if name not in known]
    for image_id, image in images.items():
        if image["deleted"] and image_id not in needed:
            found.append(f"image {image_id} is deleted, nobody needs it, and it is there ({image['status']})")
    for known in (*images.values(), *vms.values()):
        work = known["work"] or {}
        if work.get("state") in _OPEN:
            found.append(f"{known['kind']} {known['id']}: {work['kind']} is {work['state']}")
    return found
