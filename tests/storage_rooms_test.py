"""How large volumes are made that grow while they are written, and where a qcow2 ends."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from vdsm import errors
from vdsm.storage.files import qemuimg, refcounts
from vdsm.storage.rules import rooms

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
CHUNK = GIB


@pytest.mark.parametrize(
    ("written", "most", "wanted"),
    [
        pytest.param(0, 100 * GIB, GIB, id="a new disk"),
        pytest.param(0, 5 * MIB, 5 * MIB, id="a disk smaller than a chunk"),
        pytest.param(7 * GIB, 100 * GIB, 8 * GIB, id="a chunk ahead"),
        pytest.param(64 * GIB, 100 * GIB, 68 * GIB, id="a sixteenth ahead"),
        pytest.param(99 * GIB, 100 * GIB, 100 * GIB, id="all that it can take"),
        pytest.param(100 * GIB, 100 * GIB, 100 * GIB + 100 * GIB // 16, id="more than it can take, by leaked clusters"),
    ],
)
def test_room_is_a_step_ahead(written: int, most: int, wanted: int) -> None:
    assert rooms.room(written, CHUNK, most) == wanted


def test_volume_that_was_grown_does_not_ask_at_once() -> None:
    """Whatever was written: about half a step lies before the mark, and half a step behind it."""
    most = 16 * TIB
    for written in (0, MIB, GIB, 15 * GIB, 16 * GIB, 17 * GIB, 300 * GIB, 8 * TIB):
        size = rooms.room(written, CHUNK, most)
        asks_at = rooms.asks_at(size, CHUNK, most)
        assert asks_at - written >= 0.4 * CHUNK and size - asks_at >= CHUNK // 2


def test_volume_with_all_it_can_take_asks_when_it_is_full() -> None:
    assert rooms.asks_at(5 * MIB, CHUNK, 5 * MIB) == 5 * MIB


def test_terabyte_takes_some_hundred_extensions() -> None:
    size = extensions = 0
    while size < TIB:
        size = rooms.room(max(0, rooms.asks_at(size, CHUNK, 16 * TIB)), CHUNK, 16 * TIB)
        extensions += 1
    assert extensions < 250


def said_end(path: Path) -> int:
    """As qemu-img finds it, by all tables of the image."""
    said = subprocess.run(["qemu-img", "check", "-f", "qcow2", "--output", "json", path], capture_output=True)
    return int(json.loads(said.stdout)["image-end-offset"])


def qemu_io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True)


def in_clusters(path: Path) -> None:
    """As long as a device is: whole blocks behind the end, too."""
    with path.open("ab") as file:
        file.truncate(-(-file.tell() // MIB) * MIB + MIB)


@pytest.mark.parametrize("options", ["", "refcount_bits=1", "refcount_bits=64", "compat=0.10", "cluster_size=2M"])
def test_end_is_what_qemu_img_says(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    given = ["-o", options] if options else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *given, path, "8G"], check=True)
    chosen = random.Random(options)
    for _ in range(6):
        qemu_io(path, *(f"write {chosen.randrange(8192) * MIB} 64k" for _ in range(5)))
        end = said_end(path)
        in_clusters(path)
        slack = 7 * 65536 if options == "refcount_bits=1" else 0  # eight of them are in a byte
        assert end <= refcounts.end_bytes(str(path)) <= end + slack


def test_end_of_more_than_one_block_of_counts(tmp_path: Path) -> None:
    """A cluster of 512 bytes counts 256 clusters, 128 KiB: `cluster_size=4k` has a block for each 8 MiB."""
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1G"], check=True)
    qemu_io(path, "write 0 30M")
    assert refcounts.end_bytes(str(path)) == said_end(path) > 30 * MIB
    qemu_io(path, "discard 0 30M")
    assert refcounts.end_bytes(str(path)) == said_end(path)


def test_what_is_no_image_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (bytes(MIB), b"QFI\xfb" + bytes(MIB - 4), b"QFI\xfb" + b"\xff" * (MIB - 4), b"short"):
        path.write_bytes(content)
        with pytest.raises(errors.BadImageFile):
            refcounts.end_bytes(str(path))


def test_spare_room_is_in_what_a_qcow2_takes_at_most() -> None:
    assert qemuimg.most_bytes("qcow2", GIB) > GIB + qemuimg.SPARE_BYTES
