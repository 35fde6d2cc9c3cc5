"""The reader of foreign image headers: agreement with qemu-img, refusal of everything hostile, bounded work."""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from vdsm import errors, sizes
from vdsm.storage.files import imageheader

CLUSTER = 65536
SIZE = 64 * sizes.MIB
U16, U32, U64 = ">H", ">I", ">Q"

Patch = tuple[int, str, int] | tuple[int, bytes]

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img: apt install qemu-utils")


def qemu_img(*arguments: str, directory: Path | None = None) -> str:
    return subprocess.run(
        ["qemu-img", *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=directory, timeout=30
    ).stdout


def create(path: Path, *arguments: str, size: str = "64M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *arguments, str(path), size, directory=path.parent)
    return path


def patched(original: bytes, patches: Sequence[Patch]) -> bytes:
    data = bytearray(original)
    for offset, *change in patches:
        value = change[0] if isinstance(change[0], bytes) else struct.pack(*change)
        data[offset : offset + len(value)] = value
    return bytes(data)


def refusal(path: Path, claimed: str = "qcow2") -> str:
    with pytest.raises(errors.BadImageFile) as caught:
        fd, _ = imageheader.open_checked(str(path), claimed)
        os.close(fd)
    assert caught.value.facts["path"] == str(path)
    return str(caught.value.facts["reason"])


def accepted(path: Path, claimed: str = "qcow2", **limits: int) -> imageheader.ImageHeader:
    fd, header = imageheader.open_checked(str(path), claimed, imageheader.Limits(**limits))
    os.close(fd)
    return header


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Well-formed images to patch, by name."""
    directory = tmp_path_factory.mktemp("seeds")
    paths = {
        "v3": create(directory / "v3"),
        "v2": create(directory / "v2", "-o", "compat=0.10"),
        "v3 of 512-byte clusters": create(directory / "small", "-o", "cluster_size=512", size="4M"),
        "written": create(directory / "written", size="1G"),
        "luks": luks(directory / "luks"),
        "bitmap": create(directory / "bitmap"),
    }
    write = ["qemu-io", "-f", "qcow2", "-c", "write 0 4k", str(paths["written"])]
    subprocess.run(write, check=True, capture_output=True)
    qemu_img("bitmap", "--add", "-f", "qcow2", str(paths["bitmap"]), "monday")
    return {name: path.read_bytes() for name, path in paths.items()}


def luks(path: Path) -> Path:
    secret = ("--object", "secret,id=key,data=abc")
    return create(path, *secret, "-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=200", size="1M")


# -- agreement with qemu-img -----------------------------------------------------------------------------------------

PLAIN = {
    "version 2": ("-o", "compat=0.10"),
    "version 3": ("-o", "compat=1.1"),
    "lazy refcounts": ("-o", "lazy_refcounts=on"),
    "extended L2": ("-o", "extended_l2=on,cluster_size=128k"),
    "smallest extended L2": ("-o", "extended_l2=on,cluster_size=16k"),
    "zstd": ("-o", "compression_type=zstd"),
    "preallocated metadata": ("-o", "preallocation=metadata"),
    "preallocated": ("-o", "preallocation=falloc"),
} | {f"clusters of {size}": ("-o", f"cluster_size={size}") for size in ("512", "1k", "4k", "32k", "256k", "1M", "2M")}
PLAIN |= {f"refcounts of {bits} bits": ("-o", f"refcount_bits={bits}") for bits in (1, 2, 4, 8, 16, 32, 64)}


def assert_agrees(path: Path, header: imageheader.ImageHeader) -> None:
    told = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", str(path)))
    specific = told["format-specific"]["data"]
    assert header.format == "qcow2"
    assert header.virtual_size_bytes == told["virtual-size"]
    assert 1 << header.cluster_bits == told["cluster-size"]
    assert {2: "0.10", 3: "1.1"}[header.version] == specific["compat"]
    assert header.refcount_bits == specific["refcount-bits"]
    assert header.compression == specific["compression-type"]
    assert header.backing_name == told.get("backing-filename")
    assert header.backing_format == told.get("backing-filename-format")
    assert header.data_file_name == specific.get("data-file")
    assert (header.encryption is not None) == told.get("encrypted", False)
    assert header.snapshots == len(told.get("snapshots", []))
    assert header.bitmaps == len(specific.get("bitmaps", []))
    features = {
        "dirty": told.get("dirty-flag", False),
        "corrupt": specific.get("corrupt", False),
        "lazy_refcounts": specific.get("lazy-refcounts", False),
        "extended_l2": specific.get("extended-l2", False),
        "compression_type": specific["compression-type"] != "zlib",
        "data_file": "data-file" in specific,
        "raw_data_file": specific.get("data-file-raw", False),
        "bitmaps": bool(specific.get("bitmaps")),
    }
    assert header.features == {name for name, present in features.items() if present}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_plain_images_are_accepted_and_read_as_qemu_reads_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = create(tmp_path / "image", *options)
    assert_agrees(path, accepted(path))


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_images_with_data_are_accepted(tmp_path: Path, cluster: str, kind: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000) + bytes(sizes.MIB) + b"x" * 300_000)
    for compressed in ((), ("-c",)):
        path = tmp_path / f"image{len(compressed)}"
        options = ("-o", f"cluster_size={cluster},compression_type={kind}")
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *compressed, *options, str(source), str(path))
        assert_agrees(path, accepted(path))


def test_shrunk_and_grown_images_are_accepted(tmp_path: Path) -> None:
    path = create(tmp_path / "image", size="64G")
    qemu_img("resize", "-q", "-f", "qcow2", "--shrink", str(path), "1M")
    assert_agrees(path, accepted(path))
    qemu_img("resize", "-q", "-f", "qcow2", str(path), "128G")
    assert_agrees(path, accepted(path))


def test_bitmaps_are_counted_and_limited(tmp_path: Path) -> None:
    path = create(tmp_path / "image")
    for name in ("monday", "tuesday", "wednesday"):
        qemu_img("bitmap", "--add", "-f", "qcow2", str(path), name)
    assert_agrees(path, accepted(path))
    with pytest.raises(errors.BadImageFile, match="3 bitmaps; the limit is 2"):
        accepted(path, bitmaps=2)


def with_backing(path: Path) -> Path:
    create(path.parent / "base")
    return create(path, "-b", "base", "-F", "qcow2")


def with_data_file(path: Path) -> Path:
    return create(path, "-o", "data_file=data.raw,data_file_raw=on")


def with_snapshots(path: Path) -> Path:
    create(path)
    for name in ("one", "two"):
        qemu_img("snapshot", "-c", name, str(path))
    return path


def left_dirty(path: Path) -> Path:
    create(path, "-o", "lazy_refcounts=on")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", str(path)], capture_output=True)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(with_backing, "backing file, by the relative name 'base'", id="backing file"),
        pytest.param(with_data_file, "in another file, by the relative name 'data.raw'", id="external data file"),
        pytest.param(with_snapshots, r"internal snapshots \(2\)", id="internal snapshots"),
        pytest.param(luks, r"encrypted \(luks\)", id="encrypted"),
        pytest.param(left_dirty, "marked dirty", id="dirty"),
    ],
)
def test_wellformed_but_unwanted(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    path = make(tmp_path / "image")
    assert_agrees(path, imageheader.read(str(path)))
    assert re.search(reason, refusal(path))


# -- hostile qcow2 files ---------------------------------------------------------------------------------------------

HEADER_END = 112  # of the v3 seed; the feature name table follows, 384 bytes
AFTER_NAMES = HEADER_END + 8 + 384
L1 = 0x30000  # of the v3 seed, as the check of the seeds below makes sure
REFCOUNT_TABLE = 0x10000
FDE, BITMAPS, DATA_FILE, BACKING_FORMAT = 0x0537BE77, 0x23852875, 0x44415441, 0xE2792ACA


def backing(name: bytes, offset: int = 0x400) -> list[Patch]:
    return [(8, U64, offset), (16, U32, len(name)), (offset, name)]


def extension(kind: int, data: bytes, at: int = HEADER_END) -> list[Patch]:
    return [(at, U32, kind), (at + 4, U32, len(data)), (at + 8, data.ljust(-(-len(data) // 8) * 8 + 8, b"\0"))]


def bitmaps(count: int, reserved: int, size_bytes: int, offset: int) -> list[Patch]:
    return extension(BITMAPS, struct.pack(">IIQQ", count, reserved, size_bytes, offset))


HOSTILE: dict[str, tuple[str, list[Patch], str]] = {
    "version 0": ("v3", [(4, U32, 0)], "version 0"),
    "version 4": ("v3", [(4, U32, 4)], "version 4"),
    "version of all ones": ("v3", [(4, U32, 2**32 - 1)], "version 4294967295"),
    "qcow version 1": ("v3", [(4, U32, 1)], "recognised as qcow"),
    "clusters of 256 bytes": ("v3", [(20, U32, 8)], "cluster bits 8"),
    "clusters of 4 MiB": ("v3", [(20, U32, 22)], "cluster bits 22"),
    "clusters of 2 to the 2 to the 32": ("v3", [(20, U32, 2**32 - 1)], "cluster bits"),
    "bigger clusters than it was made with": ("v3", [(20, U32, 17)], "not aligned"),
    "smaller clusters than it was made with": ("v3", [(20, U32, 9)], "L1 table is too small"),
    "backing file, absolute": ("v3", backing(b"/etc/shadow"), "backing file, by the absolute name '/etc/shadow'"),
    "backing file, relative": ("v3", backing(b"../other.img"), "by the relative name"),
    "backing file, json": ("v3", backing(b'json:{"driver":"nbd"}'), "by the description"),
    "backing file, nbd": ("v3", backing(b"nbd:127.0.0.1:10809"), "by the protocol name"),
    "backing file, https": ("v3", backing(b"https://169.254.169.254/"), "by the protocol name"),
    "backing file, device": ("v3", backing(b"/dev/sda"), "by the absolute name"),
    "backing file, fd": ("v3", backing(b"/proc/self/fd/3"), "by the absolute name"),
    "backing file, colon behind a slash": ("v3", backing(b"a/b:c"), "by the relative name"),
    "backing file, not UTF-8": ("v3", backing(b"\xff\xfe"), "by the relative name"),
    "backing file, NUL bytes": ("v3", backing(b"\0" * 20), "backing file"),
    "backing file, terminal escapes": ("v3", backing(b"\x1b[2J"), r"x1b\[2J"),
    "backing file, version 2": ("v2", backing(b"/etc/shadow"), "by the absolute name"),
    "backing name of no length": ("v3", [(8, U64, 0x400)], "backing name of 0 bytes"),
    "backing name of 1024 bytes": ("v3", backing(b"x" * 1024), "backing name of 1024 bytes"),
    "backing name of 4 GiB": ("v3", [(8, U64, 0x400), (16, U32, 2**32 - 1)], "backing name of 4294967295 bytes"),
    "backing name in the header": ("v3", backing(b"x", offset=105), "not inside the first cluster"),
    "backing name at the magic": ("v3", [(8, U64, 1), (16, U32, 4)], "not inside the first cluster"),
    "backing name behind the first cluster": ("v3", backing(b"x", offset=CLUSTER), "not inside the first cluster"),
    "backing name over the cluster's end": (
        "v3",
        [(8, U64, CLUSTER - 4), (16, U32, 8)],
        "not inside the first cluster",
    ),
    "backing name at the end of 64 bits": ("v3", [(8, U64, 2**64 - 8), (16, U32, 8)], "not inside the first cluster"),
    "backing name over the extensions": ("v3", backing(b"/etc/shadow", offset=HEADER_END + 16), "longer than its room"),
    "size 0": ("v3", [(24, U64, 0)], "its size is 0"),
    "size of 63 TiB": ("v3", [(24, U64, 63 * sizes.TIB)], "L1 table is too small"),
    "size of 64 bits": ("v3", [(24, U64, 2**64 - 512)], "L1 table is too small"),
    "size one L2 table over the L1": ("v3", [(24, U64, 512 * sizes.MIB + 512)], "L1 table is too small"),
    "size that is no sector": ("v3", [(24, U64, SIZE + 1)], "not a multiple of 512"),
    "AES": ("v3", [(32, U32, 1)], r"encrypted \(aes\)"),
    "AES, version 2": ("v2", [(32, U32, 1)], r"encrypted \(aes\)"),
    "LUKS without its header": ("v3", [(32, U32, 2)], "encryption method and header contradict"),
    "encryption 3": ("v3", [(32, U32, 3)], "encryption method 3"),
    "LUKS header without LUKS": ("luks", [(32, U32, 0)], "encryption method and header contradict"),
    "no L1 table": ("v3", [(36, U32, 0)], "L1 table is too small"),
    "L1 longer than the file": ("v3", [(36, U32, 4096)], "L1 table reaches beyond"),
    "L1 of 32 GiB": ("v3", [(36, U32, 2**32 - 1)], "L1 table is too large"),
    "L1 not aligned": ("v3", [(40, U64, L1 + 8)], "L1 table is not aligned"),
    "L1 at the end of 64 bits": ("v3", [(40, U64, 2**64 - CLUSTER)], "L1 table reaches beyond"),
    "L1 behind the file": ("v3", [(40, U64, 1 << 40)], "L1 table reaches beyond"),
    "L1 in the header": ("v3", [(40, U64, 0)], "overlap"),
    "L1 in the refcount table": ("v3", [(40, U64, REFCOUNT_TABLE)], "overlap"),
    "L2 behind the file": ("v3", [(L1, U64, 1 << 40 | 1 << 63)], "L1 table has an impossible entry"),
    "L2 over the file's end": ("v3", [(L1, U64, L1)], "L1 table has an impossible entry"),
    "L2 not aligned": ("v3", [(L1, U64, 0x20200)], "L1 table has an impossible entry"),
    "L2 in the header": ("written", [(0x30000, U64, 1 << 63)], "L1 table has an impossible entry"),
    "L2 with low reserved bits": ("v3", [(L1, U64, 0x20000 | 1)], "L1 table has an impossible entry"),
    "L2 with high reserved bits": ("v3", [(L1, U64, 0x20000 | 1 << 56)], "L1 table has an impossible entry"),
    "second L2 behind the file": ("written", [(0x30008, U64, 1 << 50)], "L1 table has an impossible entry"),
    "L1 cut off by the file's end": ("v3", [(24, U64, 1024 * sizes.MIB), (36, U32, 2)], "L1 table reaches beyond"),
    "refcount table in the header": ("v3", [(48, U64, 0)], "overlap"),
    "refcount table not aligned": ("v3", [(48, U64, REFCOUNT_TABLE + 512)], "refcount table is not aligned"),
    "refcount table behind the file": ("v3", [(48, U64, 1 << 62)], "refcount table reaches beyond"),
    "refcount table over the file's end": ("v3", [(56, U32, 3)], "refcount table reaches beyond"),
    "refcount table of no clusters": ("v3", [(56, U32, 0)], "refcount table has a wrong length"),
    "refcount table of 256 TiB": ("v3", [(56, U32, 2**32 - 1)], "refcount table has a wrong length"),
    "refcount table over the L1": ("written", [(56, U32, 3)], "overlap"),
    "refcount block behind the file": ("v3", [(REFCOUNT_TABLE, U64, 1 << 63)], "refcount table has an impossible"),
    "refcount block not aligned": ("v3", [(REFCOUNT_TABLE, U64, 0x20200)], "refcount table has an impossible"),
    "refcount block with reserved bits": ("v3", [(REFCOUNT_TABLE, U64, 0x20001)], "refcount table has an impossible"),
    "last refcount block behind the file": ("v3", [(0x1FFF8, U64, 1 << 40)], "refcount table has an impossible"),
    "snapshots behind the file": ("v3", [(60, U32, 1), (64, U64, 1 << 40)], "snapshot table reaches beyond"),
    "snapshots not aligned": ("v3", [(60, U32, 1), (64, U64, 0x20008)], "snapshot table is not aligned"),
    "snapshots in the header": ("v3", [(60, U32, 1)], "overlap"),
    "snapshots without end": ("v3", [(60, U32, 2**32 - 1)], "internal snapshots are too many"),
    "one snapshot": ("v3", [(60, U32, 1), (64, U64, 0x20000)], r"internal snapshots \(1\)"),
    "dirty": ("v3", [(72, U64, 1)], "marked dirty"),
    "corrupt": ("v3", [(72, U64, 2)], "marked corrupt"),
    "data file without a name": ("v3", [(72, U64, 4)], "in another file, without a name"),
    "data file": ("v3", [(72, U64, 4), *extension(DATA_FILE, b"/etc/shadow")], "in another file, by the absolute name"),
    "data file by json": ("v3", [(72, U64, 4), *extension(DATA_FILE, b'json:{"driver":"nbd"}')], "by the description"),
    "data file named but not used": ("v3", extension(DATA_FILE, b"/etc/shadow"), "in another file"),
    "raw data file without data file": ("v3", [(88, U64, 2)], "no data file to be raw"),
    "compression bit without type": ("v3", [(72, U64, 8)], "compression type and feature bit contradict"),
    "compression type without bit": ("v3", [(104, ">B", 1)], "compression type and feature bit contradict"),
    "compression type 2": ("v3", [(72, U64, 8), (104, ">B", 2)], "compression type 2"),
    "compression type behind the header": ("v3", [(72, U64, 8), (100, U32, 104), (104, U32, 0)], "contradict"),
    "extended L2 in small clusters": ("v3 of 512-byte clusters", [(72, U64, 16)], "too small for extended L2"),
    "extended L2 without room in the L1": ("v3", [(72, U64, 16), (24, U64, 512 * sizes.MIB)], "L1 table is too small"),
    "unknown feature 5": ("v3", [(72, U64, 1 << 5)], r"unknown features \(0x20\)"),
    "unknown feature 63": ("v3", [(72, U64, 1 << 63)], "unknown features"),
    "refcounts of 128 bits": ("v3", [(96, U32, 7)], "refcount order 7"),
    "refcount order of all ones": ("v3", [(96, U32, 2**32 - 1)], "refcount order"),
    "header length 0": ("v3", [(100, U32, 0)], "header length 0"),
    "header length 103": ("v3", [(100, U32, 103)], "header length 103"),
    "header length odd": ("v3", [(100, U32, 113)], "header length 113"),
    "header longer than a cluster": ("v3", [(100, U32, CLUSTER + 8)], "header length 65544"),
    "header length of 4 GiB": ("v3", [(100, U32, 2**32 - 8)], "header length"),
    "extension over the cluster": ("v3", [(HEADER_END + 4, U32, CLUSTER)], "longer than its room"),
    "extension of 4 GiB": ("v3", [(HEADER_END + 4, U32, 2**32 - 1)], "longer than its room"),
    "unknown extension of 4 GiB": ("v3", [(HEADER_END, U32, 7), (HEADER_END + 4, U32, 2**32 - 1)], "longer than"),
    "extension cut by the backing name": ("v3", backing(b"x", offset=HEADER_END + 4), "extension is cut short"),
    "extension twice": (
        "v3",
        extension(BACKING_FORMAT, b"raw") + extension(BACKING_FORMAT, b"qcow2", at=HEADER_END + 16),
        "appears twice",
    ),
    "65 extensions": ("v3", [(HEADER_END, struct.pack(">II", 7, 0) * 65)], "more than 64 header extensions"),
    "extension behind a long unknown one": (
        "v3",
        extension(7, b"x" * 30_000) + extension(DATA_FILE, b"/etc/shadow", at=HEADER_END + 8 + 30_000),
        "in another file",
    ),
    "bitmaps valid but absent": ("v3", [(88, U64, 1)], "bitmaps are valid, but has none"),
    "bitmaps extension too short": ("v3", extension(BITMAPS, b"\0" * 16), "bitmaps extension has a wrong length"),
    "no bitmaps": ("v3", bitmaps(0, 0, 24, 0x20000), "0 bitmaps are not possible"),
    "bitmaps without end": ("v3", bitmaps(2**32 - 1, 0, 24, 0x20000), "4294967295 bitmaps are not possible"),
    "bitmaps with reserved bits": ("v3", bitmaps(1, 1, 24, 0x20000), "1 bitmaps are not possible"),
    "bitmap directory too short": ("v3", bitmaps(2, 0, 24, 0x20000), "bitmap directory has a wrong length"),
    "bitmap directory too long": ("v3", bitmaps(1, 0, 1 << 40, 0x20000), "bitmap directory has a wrong length"),
    "bitmap directory behind the file": ("v3", bitmaps(1, 0, 32, 1 << 40), "bitmap directory reaches beyond"),
    "bitmap directory not aligned": ("v3", bitmaps(1, 0, 32, 0x20008), "bitmap directory is not aligned"),
    "encryption header behind the file": (
        "v3",
        [(32, U32, 2), *extension(FDE, struct.pack(">QQ", 1 << 40, 512))],
        "encryption header reaches beyond",
    ),
    "encryption header cut short": ("v3", [(32, U32, 2), *extension(FDE, b"\0" * 8)], "extension has a wrong length"),
}


@pytest.mark.parametrize(("seed", "patches", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_qcow2_is_refused(
    tmp_path: Path, seeds: dict[str, bytes], seed: str, patches: list[Patch], reason: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(seeds[seed])
    if seed != "luks":
        accepted(path)  # the seed is good: the patch alone is what is refused
    path.write_bytes(patched(seeds[seed], patches))
    assert re.search(reason, refusal(path))


def test_the_seed_has_its_tables_where_the_patches_go(seeds: dict[str, bytes]) -> None:
    assert struct.unpack_from(U64, seeds["v3"], 40) == (L1,)
    assert struct.unpack_from(U64, seeds["v3"], 48) == (REFCOUNT_TABLE,)
    assert struct.unpack_from(U32, seeds["v3"], 100) == (HEADER_END,)
    assert struct.unpack_from(U32, seeds["v3"], AFTER_NAMES) == (0,)
    assert struct.unpack_from(U64, seeds["written"], 40) == (0x30000,)


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 111, 4096, CLUSTER, 0x20000, 0x30000, 0x30007])
def test_a_truncated_qcow2_is_refused(tmp_path: Path, seeds: dict[str, bytes], length: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(seeds["v3"][:length])
    assert re.search("cut short|beyond the end|no qcow2 header|impossible entry", refusal(path))


def test_harmless_oddities_are_accepted(tmp_path: Path, seeds: dict[str, bytes]) -> None:
    """What the specification tells readers to ignore is no reason to refuse."""
    path = tmp_path / "image"
    unknown_extension = extension(0x12345678, b"of the future", at=AFTER_NAMES)
    path.write_bytes(patched(seeds["v3"], [(80, U64, 1 << 40), (88, U64, 1 << 41), *unknown_extension]))
    assert accepted(path).virtual_size_bytes == SIZE


def test_the_size_limit_is_configurable(tmp_path: Path) -> None:
    path = create(tmp_path / "image", size="17T")
    assert "its size is 18691697672192 bytes; the limit is 17592186044416" in refusal(path)
    accepted(path, virtual_size_bytes=17 * sizes.TIB)
    with pytest.raises(errors.BadImageFile, match="limit"):
        accepted(path, virtual_size_bytes=17 * sizes.TIB - 1)


def test_a_huge_claim_reads_a_bounded_part_of_the_file(tmp_path: Path) -> None:
    """Full-size tables of the biggest kind: 2 MiB of header, 32 MiB of L1, 8 MiB of refcount table."""
    path = create(tmp_path / "image", "-o", "cluster_size=2M", size="1M")
    first = path.read_bytes()[: 2 * sizes.MIB]
    tables = [(36, U32, 4 * sizes.MIB), (40, U64, 16 * sizes.MIB), (48, U64, 64 * sizes.MIB), (56, U32, 4)]
    entries = struct.pack(U64, 100 * sizes.MIB) * (4 * sizes.MIB)
    with path.open("wb") as file:
        file.write(patched(first, tables))
        file.seek(16 * sizes.MIB)
        file.write(entries)
        file.truncate(sizes.TIB)
    before, began = bytes_read(), time.process_time()
    assert accepted(path).l1_entries == 4 * sizes.MIB
    assert bytes_read() - before <= 43 * sizes.MIB
    assert time.process_time() - began < 10


def bytes_read() -> int:
    """What this process has asked the kernel to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


# -- raw files and the formats that claim to be raw ------------------------------------------------------------------


@pytest.mark.parametrize(("length", "virtual"), [(512, 512), (1000, 1024), (sizes.MIB, sizes.MIB)])
def test_raw_files(tmp_path: Path, length: int, virtual: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\x55" * length)
    header = accepted(path, "raw")
    assert (header.format, header.file_size_bytes, header.virtual_size_bytes) == ("raw", length, virtual)
    assert virtual == json.loads(qemu_img("info", "--output=json", "-f", "raw", str(path)))["virtual-size"]


def test_a_real_partition_table_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "image"
    boot_sector = bytes(510) + b"\x55\xaa"
    path.write_bytes(boot_sector.ljust(sizes.MIB, b"\0"))
    accepted(path, "raw")


def test_raw_limits(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()
    assert "size is 0" in refusal(path, "raw")
    os.truncate(path, 2 * sizes.MIB)
    with pytest.raises(errors.BadImageFile, match="the limit is 1048576"):
        accepted(path, "raw", virtual_size_bytes=sizes.MIB)


@pytest.mark.parametrize(
    ("made_as", "options", "recognised"),
    [
        ("qcow2", (), "qcow2"),
        ("qcow", (), "qcow"),
        ("qed", (), "qed"),
        ("vmdk", (), "vmdk"),
        ("vmdk", ("-o", "subformat=monolithicFlat"), "vmdk"),
        ("vmdk", ("-o", "compat6"), "vmdk"),
        ("vdi", (), "vdi"),
        ("vpc", (), "vhd"),
        ("vpc", ("-o", "subformat=fixed"), "vhd"),
        ("vhdx", (), "vhdx"),
        ("parallels", (), "parallels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_another_format_is_not_raw(tmp_path: Path, made_as: str, options: tuple[str, ...], recognised: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", made_as, *options, str(path), "4M")
    assert refusal(path, "raw") == f"it is recognised as {recognised}, not raw"
    if recognised != "qcow2":
        assert refusal(path, "qcow2") == f"it is recognised as {recognised}, not qcow2"


@pytest.mark.parametrize(
    ("content", "recognised"),
    [
        (b"COWD", "vmdk"),
        (b"LUKS\xba\xbe\x00\x01aes", "luks"),
        (b'# a comment\n\n# another\nversion=1\nRW 8 FLAT "/etc/shadow" 0\n', "vmdk"),
        (b"WithoutFreeSpace", "parallels"),
        (b"Bochs Virtual HD Image", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
        (b"QFI\xfb", "qcow2"),
        (b"QFI\xfb" + b"\xff" * 508, "qcow2"),
        (bytes(1024) + b"koly".ljust(512, b"\0"), "dmg"),
    ],
)
def test_a_magic_alone_makes_a_raw_claim_false(tmp_path: Path, content: bytes, recognised: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    assert refusal(path, "raw") == f"it is recognised as {recognised}, not raw"


def test_a_raw_file_is_not_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    assert refusal(path) == "it has no qcow2 header"


def test_a_reader_is_asked_only_for_formats_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vmdk"):
        imageheader.read(str(tmp_path / "image"), {"raw", "vmdk"})


# -- opening ---------------------------------------------------------------------------------------------------------


# What the tests open besides their own files.
OTHERS = ("/dev/zero", "/", f"/proc/{os.getpid()}/fd")


def open_files() -> set[str]:
    """Of this process, which also has other tests' sockets and pipes: those come and go."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(path.readlink()))
    return found


@pytest.fixture(autouse=True)
def no_descriptor_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [name for name in open_files() if name in OTHERS or name.startswith(str(tmp_path))]


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "image")
    (tmp_path / "link").symlink_to(tmp_path / "image")
    assert "cannot be opened" in refusal(tmp_path / "link")


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image")
    assert refusal(tmp_path / "image", "raw") == "it is not a regular file"


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/proc/self/fd"])
def test_devices_and_directories_are_refused(path: str) -> None:
    assert refusal(Path(path), "raw") == "it is not a regular file"


@pytest.mark.parametrize("path", ["/no/such/file", "/etc/passwd/x", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_opened_is_refused(path: str) -> None:
    with pytest.raises(errors.BadImageFile, match="cannot be opened"):
        imageheader.open_checked(path, "raw")


def test_the_file_checked_is_the_file_used(tmp_path: Path) -> None:
    path = create(tmp_path / "image")
    fd, header = imageheader.open_checked(str(path), "qcow2")
    try:
        path.unlink()
        with_backing(path)
        assert imageheader.read(fd, path="the same") == imageheader.ImageHeader(**(vars(header) | {"path": "the same"}))
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_a_descriptor_is_named_in_the_refusal(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(errors.BadImageFile, match=f"descriptor {fd} is refused: it is not a regular file"):
            imageheader.read(fd)
    finally:
        os.close(fd)


# -- anything at all -------------------------------------------------------------------------------------------------

SEEDS = ("v3", "v2", "v3 of 512-byte clusters", "written", "luks", "bitmap")
NUMBERS = strategies.one_of(
    strategies.integers(0, 2**64 - 1),
    strategies.sampled_from([0, 1, 2, 3, 8, 9, 21, 22, 104, 512, CLUSTER, 2**31, 2**32 - 1, 2**56, 2**63, 2**64 - 1]),
    strategies.integers(0, 64).map(lambda bit: (1 << bit) % 2**64),
)
FIELDS = strategies.one_of(
    strategies.sampled_from([4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104, 112, 116]),
    strategies.integers(0, 0x30008),
)
CHANGES = strategies.lists(strategies.tuples(FIELDS, strategies.sampled_from([U16, U32, U64]), NUMBERS), max_size=6)


def judge(content: bytes) -> imageheader.ImageHeader | str:
    """What the reader says of a file with this content, for either claim; only `BadImageFile` may be raised."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, content)
        began = time.process_time()
        try:
            header = imageheader.read(fd)
            imageheader.check(header, header.format)
            return header
        except errors.BadImageFile as error:
            return str(error)
        finally:
            assert time.process_time() - began < 2
    finally:
        os.close(fd)


@hypothesis.settings(max_examples=1500, deadline=None)
@hypothesis.given(seed=strategies.sampled_from(SEEDS), changes=CHANGES, length=strategies.integers(0, 1 << 20))
def test_a_mangled_image_is_judged_without_surprise(
    seeds: dict[str, bytes], seed: str, changes: list[tuple[int, str, int]], length: int
) -> None:
    patches: list[Patch] = [(at, size, value % 2 ** (8 * struct.calcsize(size))) for at, size, value in changes]
    judge(patched(seeds[seed], patches)[:length])


@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(
    head=strategies.binary(max_size=256), magic=strategies.sampled_from([b"", b"QFI\xfb\0\0\0\3", b"# x\n"])
)
def test_any_bytes_are_judged_without_surprise(head: bytes, magic: bytes) -> None:
    judge((magic + head).ljust(2048, b"\0"))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(changes=CHANGES)
def test_what_is_accepted_names_no_other_file_for_qemu_either(
    tmp_path_factory: pytest.TempPathFactory, seeds: dict[str, bytes], changes: list[tuple[int, str, int]]
) -> None:
    """The judge that counts is the tool: an accepted image must not make qemu-img look at another file."""
    patches: list[Patch] = [(at, size, value % 2 ** (8 * struct.calcsize(size))) for at, size, value in changes]
    content = patched(seeds["v3"], patches)
    header = judge(content)
    hypothesis.assume(isinstance(header, imageheader.ImageHeader) and header.format == "qcow2" and bool(changes))
    path = tmp_path_factory.mktemp("accepted") / "image"
    path.write_bytes(content)
    try:
        told = subprocess.run(
            ["qemu-img", "info", "--output=json", "-f", "qcow2", str(path)], capture_output=True, timeout=30
        )
        if told.returncode == 0:
            assert not {"backing-filename", "encrypted"} & json.loads(told.stdout).keys()
            assert "data-file" not in json.loads(told.stdout)["format-specific"]["data"]
    finally:
        shutil.rmtree(path.parent)
