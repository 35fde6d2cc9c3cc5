"""Command lines for images on volumes, where a length is no property of the image and old bytes lie about."""

import json
import subprocess
from pathlib import Path

import pytest

from vdsm import sizes
from vdsm.storage.files import qemuimg

MIB = sizes.MIB
OLD = b"\xa5"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.write_bytes(OLD * 8 * MIB)
    return path


def run(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("size_bytes", [4096, MIB, sizes.GIB, 123456 << 12, 10 * sizes.GIB, 16 * sizes.TIB - 4096])
def test_most_that_an_image_takes_is_what_qemu_says_and_not_much_more(size_bytes: int) -> None:
    told = json.loads(run(["qemu-img", "measure", "-O", "qcow2", "--size", str(size_bytes), "--output", "json"]))
    assert 0 <= qemuimg.most_bytes("qcow2", size_bytes) - told["fully-allocated"] <= MIB
    assert qemuimg.most_bytes("raw", size_bytes) == size_bytes


def test_raw_volume_is_made_with_zeros_up_to_the_images_size(volume: Path) -> None:
    run(qemuimg.create(qemuimg.Layer(str(volume), "raw", 5 * MIB), 5 * MIB))
    assert volume.read_bytes() == bytes(5 * MIB) + OLD * 3 * MIB


def test_copy_to_a_raw_volume_writes_its_zeros_and_nothing_behind(volume: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB) + b"b" * MIB + bytes(MIB))
    run(qemuimg.convert([qemuimg.Layer(str(source), "raw")], qemuimg.Layer(str(volume), "raw", 3 * MIB)))
    assert volume.read_bytes() == source.read_bytes() + OLD * 5 * MIB


def test_raw_volume_shows_no_more_than_the_image(volume: Path, tmp_path: Path) -> None:
    run(qemuimg.convert([qemuimg.Layer(str(volume), "raw", 2 * MIB)], qemuimg.Layer(str(tmp_path / "copy"), "raw")))
    assert (tmp_path / "copy").read_bytes() == OLD * 2 * MIB


def test_part_of_a_raw_volume_is_emptied(volume: Path) -> None:
    run(qemuimg.zero(qemuimg.Layer(str(volume), "raw", 8 * MIB), 4096, 3 * MIB))
    assert volume.read_bytes() == OLD * 4096 + bytes(3 * MIB) + OLD * (5 * MIB - 4096)
