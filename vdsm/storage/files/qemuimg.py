"""qemu-img: command lines, and the rules that all of them keep.

No format is ever guessed, and no backing name is ever taken from a header: a source is given as its whole chain, built
here from records, with the format of every layer and an explicit end (traps 34 and 42). Images are read and written
past the page cache, and files of this host where their file system can do that. Tools that parse what guests or
strangers wrote run under `limits`.

The functions build argument lists; `run` is for the quick ones, jobs run the long ones through their worker.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vdsm import errors, programs, sizes
from vdsm.storage.rules import models

# An image is made in milliseconds; a preallocated one in seconds where the file system knows fallocate.
QUICK_S = 25.0
# What the C library calls ENOSPC and EDQUOT; tools run with LC_ALL=C.UTF-8.
_FULL = ("No space left on device", "Disk quota exceeded")
# Of the qcow2 images that are made here.
_CLUSTER_BYTES = 64 * sizes.KIB
_TABLE_ENTRIES = _CLUSTER_BYTES // 8
_COUNTS = _CLUSTER_BYTES // 2
SPARE_BYTES = 16 * _CLUSTER_BYTES  # the header, and what is moved while tables grow
# Parallel coroutines of a raw copy: what it takes to keep a disk busy.
_COROUTINES = 16
_CACHED, _UNCACHED = {"direct": False}, {"direct": True}


class Layer(NamedTuple):
    """One image file of a chain.

    `size_bytes` says that it is a volume: its length is no property of the image, which has this one, and it holds old
    bytes where nothing was written (trap 40). `driver` is QEMU's for the path: "host_device" for a block device.
    `direct`: whether it is read and written past the page cache; a file of this host may be where that is not possible.
    """

    path: str
    format: str
    size_bytes: int | None = None
    driver: str = "file"
    direct: bool = True

    @property
    def is_raw_volume(self) -> bool:
        return self.format == models.RAW and self.size_bytes is not None


def source(chain: Sequence[Layer]) -> str:
    """The name under which qemu-img opens `chain`, top first, without looking at what the headers name."""
    node: dict[str, Any] | None = None
    for layer in reversed(chain):
        node = _node(layer, node)
    return "json:" + json.dumps(node)


def _node(layer: Layer, below: dict[str, Any] | None) -> dict[str, Any]:
    """A layer on the node `below`, in QEMU's words. None is an explicit end; what is raw has nothing below it."""
    node: dict[str, Any] = {"driver": layer.format, "file": {"driver": layer.driver, "filename": layer.path}}
    if layer.format != models.RAW:
        return {**node, "backing": below}
    return node if layer.size_bytes is None else {**node, "size": layer.size_bytes}


def create(target: Layer, size_bytes: int, backing: Layer | None = None) -> list[str]:
    """An empty image; a raw one preallocated, or, on a volume, written whole. With `backing` an overlay, which is not
    opened: its format is told.

    The header names the backing relative to the overlay, so that a repository may move.
    """
    if target.is_raw_volume:
        return zero(target, 0, size_bytes)
    where = ["-u", "-b", backing.path.rpartition("/")[2], "-F", backing.format] if backing else []
    options = ["-o", "preallocation=falloc"] if target.format == models.RAW else []
    return ["qemu-img", "create", "-q", "-f", target.format, *options, *where, target.path, str(size_bytes)]


def convert(chain: Sequence[Layer], target: Layer, *, sparse: bool = False) -> list[str]:
    """A whole copy of `chain`, made anew, with progress on its output.

    Raw targets are written out of order, which is fastest, and preallocated unless they are to be `sparse`; a qcow2
    written out of order would have its clusters scattered. A raw volume is taken as it is, and written with all zeros.
    """
    fast = ["-W", "-m", str(_COROUTINES)] if target.format == models.RAW else []
    if target.is_raw_volume:
        fast += ["-n"]
    elif target.format == models.RAW and not sparse:
        fast += ["-o", "preallocation=falloc"]
    caches = ["-t", _cache(target.direct), "-T", _cache(all(layer.direct for layer in chain))]
    return ["qemu-img", "convert", "-p", *fast, *caches, "-O", target.format, source(chain), target.path]


def _cache(direct: bool) -> str:
    """qemu-img's word. What is written through the page cache is flushed by whoever made the file."""
    return "none" if direct else "writeback"


def zero(target: Layer, offset: int, length: int) -> list[str]:
    """Writes zeros into a part of a raw volume, as the device does that best."""
    nothing = "json:" + json.dumps({"driver": "null-co", "size": length, "read-zeroes": True})
    where = f"driver=raw,offset={offset},size={length},file.driver={target.driver},file.filename={target.path}"
    return ["qemu-img", "convert", "-n", "-t", "none", "--target-image-opts", nothing, where]


def most_bytes(data_format: str, size_bytes: int) -> int:
    """What an image of this size takes at most, with every cluster written."""
    if data_format == models.RAW:
        return size_bytes
    clusters = -(-size_bytes // _CLUSTER_BYTES)
    tables = -(-clusters // _TABLE_ENTRIES)
    tables += -(-tables // _TABLE_ENTRIES)  # of L2 and L1, 8 bytes an entry
    counts = -(-(clusters + tables) // _COUNTS) + 1  # a cluster of refcounts, 2 bytes each, and their table
    return (clusters + tables + counts + -(-counts // _TABLE_ENTRIES)) * _CLUSTER_BYTES + SPARE_BYTES


def stand_in(path: str, layer: Layer, size_bytes: int, below: str | None) -> list[str]:
    """An image that holds nothing itself and shows what `layer` does, on the stand-in `below`.

    The header names both with their formats, so whoever opens `path` by its name alone reads no other header for what
    lies below. The stand-ins are read through the page cache, for they may be in memory, the layers are not.
    """
    lower: dict[str, Any] | None = None
    if below is not None:  # its header tells what it stands for: it is ours
        lower = {"driver": models.QCOW2, "file": {"driver": "file", "filename": below}, "cache": _CACHED}
    node = _node(layer, lower)
    described = "json:" + json.dumps({**node, "cache": _UNCACHED})
    return ["qemu-img", "create", "-q", "-f", models.QCOW2, "-u", "-b", described, "-F", layer.format, path,
            str(size_bytes)]  # fmt: skip


def rebase(overlay: Layer, chain: Sequence[Layer], backing: Layer | None) -> list[str]:
    """Writes into `overlay`, which lies on `chain`, all that differs between that and `backing`, with progress. None is
    a backing that shows nothing.

    What overlay and chain show together, overlay and backing do afterwards. `backing` is opened by its name, as its
    header says: give a stand-in.
    """
    caches = ["-t", "none", "-T", "writeback"]  # of overlay and chain, and of the stand-in
    where = ["-b", backing.path, "-F", backing.format] if backing else ["-b", ""]
    return ["qemu-img", "rebase", "-p", *caches, *where, source([overlay, *chain])]


def name_backing(overlay: Layer, backing: Layer | None) -> list[str]:
    """Writes into the overlay's header what lies below it, as `create` does; nothing but the header is touched."""
    where = ["-b", backing.path.rpartition("/")[2], "-F", backing.format] if backing else ["-b", ""]
    return ["qemu-img", "rebase", "-q", "-u", "-f", overlay.format, *where, overlay.path]


def resize(target: Layer, size_bytes: int) -> list[str]:
    """Gives an image another size; what is behind a smaller one is lost. What is new has no space yet.

    What lies below is not opened: it is never larger than what lies on it, so it has nothing to show there.
    """
    return ["qemu-img", "resize", "-q", "--shrink", source([target]), str(size_bytes)]


def commit(chain: Sequence[Layer]) -> list[str]:
    """Writes what the top of `chain` holds into the layer below it, which grows to its size; the top stays as it is."""
    return ["qemu-img", "commit", "-p", "-d", "-t", "none", source(chain)]


def measure(chain: Sequence[Layer], target_format: str) -> list[str]:
    """Prints JSON: "required" bytes for a copy of `chain`."""
    return ["qemu-img", "measure", "--output", "json", "-O", target_format, source(chain)]


def extents(layer: Layer) -> list[str]:
    """Prints JSON: the extents of `layer` without what lies below, each "present" when the file itself tells it."""
    return ["qemu-img", "map", "--output", "json", source([layer])]


def percent(line: str) -> int | None:
    """The whole percents of a progress line, `    (41.23/100%)`."""
    number, slash, _ = line.strip().removeprefix("(").partition("/100%)")
    return int(float(number)) if slash else None


def teller(progress: Callable[[int], None]) -> Callable[[str], None]:
    """Takes a tool's lines and hands on the percents of those that tell progress."""

    def take(line: str) -> None:
        found = percent(line)
        if found is not None:
            progress(found)

    return take


def limits(size_bytes: int) -> programs.Limits:
    """For an image of this size: memory for the tables of the largest, CPU for one that must be decompressed."""
    return programs.Limits(address_space_bytes=2 * sizes.GIB, cpu_s=600 + 60 * (size_bytes // sizes.GIB))


def run(argv: list[str], fds: Sequence[int], size_bytes: int) -> bytes:
    """Runs a quick command with `fds` inherited and returns its output. Raises `ToolFailed`, `DeadlinePassed`."""
    completed = programs.run(argv, timeout_s=QUICK_S, pass_fds=fds, limits=limits(size_bytes))
    return programs.check(completed, "qemu-img").stdout


def explain(error: errors.ToolFailed, repo_id: str) -> errors.VdsmError:
    """The failure in the words of the one who asked: a full repository is no broken tool."""
    return errors.RepositoryFull(repo_id=repo_id) if is_full(error) else error


def is_full(error: errors.ToolFailed) -> bool:
    """Whether the tool's target had no space left, or its owner no quota."""
    return any(words in line for line in error.facts.get("output", ()) for words in _FULL)
