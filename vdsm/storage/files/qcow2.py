"""The header of a qcow2 file, versions 2 and 3, read with suspicion.

Source: the qcow2 specification (QEMU's docs/interop/qcow2). All numbers are big endian.

    offset  bytes  field                    what is accepted
         0      4  magic                    51 46 49 fb
         4      4  version                  2 or 3
         8      8  backing file offset      0 = none; else the name lies in the first cluster, behind the header
        16      4  backing file name size   1..1023
        20      4  cluster bits             9..21; 14..21 with extended L2 entries
        24      8  virtual size             a multiple of 512
        32      4  encryption method        0 none, 1 AES, 2 LUKS (has an encryption header extension)
        36      4  L1 entries               enough for the virtual size; at most 32 MiB of them
        40      8  L1 offset                aligned; table inside the file, each entry an L2 table inside the file
        48      8  refcount table offset    aligned, not 0; table inside the file, each entry a block inside the file
        56      4  refcount table clusters  at least 1, at most 8 MiB of them
        60      4  internal snapshots       at most 65536
        64      8  snapshot table offset    aligned, inside the file
    version 3 goes on (version 2 ends here, its refcounts have 16 bits):
        72      8  incompatible features    0 dirty, 1 corrupt, 2 data file, 3 compression type, 4 extended L2 entries
        80      8  compatible features      0 lazy refcounts; others are ignored, as the specification says
        88      8  autoclear features       0 bitmaps are valid, 1 the data file is raw; others are ignored
        96      4  refcount order           0..6: refcounts of 1 << order bits
       100      4  header length            104..cluster size, a multiple of 8
       104      1  compression type         0 zlib, 1 zstd; the feature bit is set when it is not 0
    then, up to the backing file name or the end of the first cluster, extensions of {type 4, length 4, data, padding
    to 8}: 0 end, e2792aca backing format, 44415441 data file name, 23852875 bitmaps, 0537be77 encryption header,
    6803f857 feature names; others are skipped, as the specification says. Each known one at most once, 64 in all.

An L1 entry has its L2 table's offset in bits 9..55 and a flag in bit 63; a refcount table entry has its block's offset
in bits 9..63; 0 is "none", other bits must be 0. L2 tables, refcount blocks and data are not read.

At most 42 MiB of a file are read (the first cluster and the two tables), whatever it claims. A table may be longer than
its size needs: shrinking an image leaves it so.
"""

import array
import struct
import sys
from typing import NamedTuple

from vdsm import sizes
from vdsm.storage.files import imagefile

MAGIC = b"QFI\xfb"

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BITMAPS_EXTENSION = struct.Struct(">IIQQ")
_ENCRYPTION_EXTENSION = struct.Struct(">QQ")

_L1_LIMIT_BYTES = 32 * sizes.MIB  # QEMU's own limits: a bigger table cannot be opened anyway
_REFCOUNT_TABLE_LIMIT_BYTES = 8 * sizes.MIB
_BITMAP_DIRECTORY_LIMIT_BYTES = 64 * sizes.MIB
_BITMAPS_LIMIT = 65535
_SNAPSHOTS_LIMIT = 65536
_EXTENSIONS_LIMIT = 64  # real files have four; a cluster of empty ones would be a quarter of a million
_NAME_LIMIT_BYTES = 1023

_INCOMPATIBLE = ("dirty", "corrupt", "data_file", "compression_type", "extended_l2")
_COMPATIBLE = ("lazy_refcounts",)
_AUTOCLEAR = ("bitmaps", "raw_data_file")
_ENCRYPTION = (None, "aes", "luks")
_COMPRESSION = ("zlib", "zstd")

_END, _BACKING_FORMAT, _DATA_FILE = 0, 0xE2792ACA, 0x44415441
_BITMAPS, _ENCRYPTION_HEADER, _FEATURE_NAMES = 0x23852875, 0x0537BE77, 0x6803F857
_KNOWN_EXTENSIONS = frozenset({_BACKING_FORMAT, _DATA_FILE, _BITMAPS, _ENCRYPTION_HEADER, _FEATURE_NAMES})


class _Fixed(NamedTuple):
    """The first 72 bytes, common to both versions."""

    magic: bytes
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size_bytes: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    snapshots_offset: int


class _Table(NamedTuple):
    """A table of file offsets, and which bits of its entries mean what."""

    name: str
    offset: int
    size_bytes: int
    place_bits: int
    reserved_bits: int


def read(file: imagefile.ImageFile) -> imagefile.ImageHeader:
    """The header of `file`, which begins with `MAGIC`. Raises `BadImageFile` where it contradicts the specification."""
    return _Reader(file).header()


class _Reader:
    """One pass over a header, in the order of the specification."""

    def __init__(self, file: imagefile.ImageFile) -> None:
        self._file = file
        self._require = file.require
        self._fixed = _Fixed._make(_HEADER.unpack(file.read_exactly(0, _HEADER.size, "the header")))
        self._require(self._fixed.version in (2, 3), f"qcow2 version {self._fixed.version} is not known")
        bits = self._fixed.cluster_bits
        self._require(9 <= bits <= 21, f"cluster bits {bits} are not in 9..21")
        self._cluster_bytes = 1 << bits
        self._incompatible, self._compatible, self._autoclear, self._refcount_order, self._length = 0, 0, 0, 4, 72
        if self._fixed.version == 3:
            rest = file.read_exactly(_HEADER.size, _HEADER_3.size, "the header")
            words = _HEADER_3.unpack(rest)
            self._incompatible, self._compatible, self._autoclear, self._refcount_order, self._length = words
        self._occupied = [(0, self._cluster_bytes, "the header")]

    def header(self) -> imagefile.ImageHeader:
        features = self._features()
        self._check_numbers()
        first_cluster = self._file.read_exactly(0, self._cluster_bytes, "the first cluster")
        compression = self._compression(first_cluster)
        backing_name = self._backing_name(first_cluster)
        extensions = self._extensions(first_cluster)
        bitmaps = self._bitmaps(extensions.get(_BITMAPS))
        self._check_encryption_header(extensions.get(_ENCRYPTION_HEADER))
        self._check_tables()
        return imagefile.ImageHeader(
            path=self._file.path,
            format="qcow2",
            file_size_bytes=self._file.size_bytes,
            virtual_size_bytes=self._fixed.size_bytes,
            version=self._fixed.version,
            cluster_bits=self._fixed.cluster_bits,
            refcount_bits=1 << self._refcount_order,
            l1_entries=self._fixed.l1_entries,
            backing_name=backing_name,
            backing_format=_text(extensions.get(_BACKING_FORMAT)),
            data_file_name=_text(extensions.get(_DATA_FILE)),
            encryption=_ENCRYPTION[self._fixed.encryption],
            compression=compression,
            snapshots=self._fixed.snapshots,
            bitmaps=bitmaps,
            features=features,
        )

    def _features(self) -> frozenset[str]:
        unknown = self._incompatible >> len(_INCOMPATIBLE) << len(_INCOMPATIBLE)
        self._require(unknown == 0, f"it needs unknown features ({unknown:#x})")
        words = ((self._incompatible, _INCOMPATIBLE), (self._compatible, _COMPATIBLE), (self._autoclear, _AUTOCLEAR))
        found = frozenset(name for word, names in words for bit, name in enumerate(names) if word >> bit & 1)
        self._require("raw_data_file" not in found or "data_file" in found, "it has no data file to be raw")
        roomy = self._fixed.cluster_bits >= 14
        self._require("extended_l2" not in found or roomy, "its clusters are too small for extended L2 entries")
        return found

    def _check_numbers(self) -> None:
        fixed, length = self._fixed, self._length
        self._require(self._refcount_order <= 6, f"refcount order {self._refcount_order} is over 6")
        shortest = 72 if fixed.version == 2 else 104
        possible = shortest <= length <= self._cluster_bytes and length % 8 == 0
        self._require(possible, f"header length {length} is not possible")
        self._require(fixed.size_bytes % 512 == 0, f"size {fixed.size_bytes} is not a multiple of 512")
        self._require(fixed.encryption < len(_ENCRYPTION), f"encryption method {fixed.encryption} is not known")
        self._require(fixed.snapshots <= _SNAPSHOTS_LIMIT, f"{fixed.snapshots} internal snapshots are too many")

    def _compression(self, first_cluster: bytes) -> str:
        kind = first_cluster[104] if self._length > 104 else 0
        agree = bool(kind) == bool(self._incompatible >> 3 & 1)
        self._require(agree, "compression type and feature bit contradict each other")
        self._require(kind < len(_COMPRESSION), f"compression type {kind} is not known")
        return _COMPRESSION[kind]

    def _backing_name(self, first_cluster: bytes) -> str | None:
        offset, size = self._fixed.backing_offset, self._fixed.backing_size
        if offset == 0:
            return None
        self._require(0 < size <= _NAME_LIMIT_BYTES, f"a backing name of {size} bytes is not possible")
        inside = self._length <= offset and offset + size <= self._cluster_bytes
        self._require(inside, "the backing name is not inside the first cluster")
        return _text(first_cluster[offset : offset + size])

    def _extensions(self, first_cluster: bytes) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        offset, end = self._length, self._fixed.backing_offset or self._cluster_bytes
        for _ in range(_EXTENSIONS_LIMIT):
            if offset == end:
                return found
            self._require(offset + _EXTENSION.size <= end, "a header extension is cut short")
            kind, length = _EXTENSION.unpack_from(first_cluster, offset)
            if kind == _END:
                return found
            offset += _EXTENSION.size
            self._require(offset + length <= end, f"header extension {kind:#x} is longer than its room")
            if kind in _KNOWN_EXTENSIONS:
                self._require(kind not in found, f"header extension {kind:#x} appears twice")
                found[kind] = first_cluster[offset : offset + length]
            offset = min(sizes.round_up(offset + length, 8), end)
        raise self._file.bad(f"it has more than {_EXTENSIONS_LIMIT} header extensions")

    def _bitmaps(self, extension: bytes | None) -> int:
        if extension is None:
            self._require(not self._autoclear & 1, "it says that its bitmaps are valid, but has none")
            return 0
        self._require(len(extension) == _BITMAPS_EXTENSION.size, "the bitmaps extension has a wrong length")
        count, reserved, size_bytes, offset = _BITMAPS_EXTENSION.unpack(extension)
        self._require(0 < count <= _BITMAPS_LIMIT and reserved == 0, f"{count} bitmaps are not possible")
        possible = 24 * count <= size_bytes <= _BITMAP_DIRECTORY_LIMIT_BYTES
        self._require(possible, "the bitmap directory has a wrong length")
        self._occupy(offset, size_bytes, "the bitmap directory")
        return int(count)

    def _check_encryption_header(self, extension: bytes | None) -> None:
        luks = _ENCRYPTION[self._fixed.encryption] == "luks"
        self._require((extension is not None) == luks, "encryption method and header contradict each other")
        if extension is not None:
            self._require(len(extension) == _ENCRYPTION_EXTENSION.size, "the encryption extension has a wrong length")
            offset, size_bytes = _ENCRYPTION_EXTENSION.unpack(extension)
            self._occupy(offset, size_bytes, "the encryption header")

    def _check_tables(self) -> None:
        fixed = self._fixed
        l2_entries = self._cluster_bytes // (16 if self._incompatible >> 4 & 1 else 8)
        needed = -(-fixed.size_bytes // (l2_entries * self._cluster_bytes))
        l1_bytes = fixed.l1_entries * 8
        refcount_bytes = fixed.refcount_table_clusters * self._cluster_bytes
        self._require(fixed.l1_entries >= needed, "the L1 table is too small for the size")
        self._require(l1_bytes <= _L1_LIMIT_BYTES, "the L1 table is too large")
        self._require(0 < refcount_bytes <= _REFCOUNT_TABLE_LIMIT_BYTES, "the refcount table has a wrong length")
        self._occupy(fixed.snapshots_offset, 40 * fixed.snapshots, "the snapshot table")
        self._occupy(fixed.l1_offset, l1_bytes, "the L1 table")
        self._occupy(fixed.refcount_table_offset, refcount_bytes, "the refcount table")
        self._check_overlap()
        self._check_entries(_Table("L1", fixed.l1_offset, l1_bytes, 0x00FFFFFFFFFFFE00, 0x7F000000000001FF))
        self._check_entries(
            _Table("refcount", fixed.refcount_table_offset, refcount_bytes, 0xFFFFFFFFFFFFFE00, 0x00000000000001FF)
        )

    def _occupy(self, offset: int, length: int, what: str) -> None:
        """`length` bytes at `offset` hold `what`: they must be aligned and inside the file."""
        if length:
            self._require(offset % self._cluster_bytes == 0, f"{what} is not aligned to a cluster")
            self._require(offset + length <= self._file.size_bytes, f"{what} reaches beyond the end of the file")
            self._occupied.append((offset, offset + length, what))

    def _check_overlap(self) -> None:
        self._occupied.sort()
        for (_, end, what), (offset, _, other) in zip(self._occupied, self._occupied[1:], strict=False):
            self._require(end <= offset, f"{what} and {other} overlap")

    def _check_entries(self, table: _Table) -> None:
        first, last = self._cluster_bytes, self._file.size_bytes - self._cluster_bytes
        end = table.offset + table.size_bytes
        for offset in range(table.offset, end, sizes.MIB):
            chunk = self._file.read_exactly(offset, min(sizes.MIB, end - offset), f"the {table.name} table")
            for entry in filter(None, _numbers(chunk)):
                place = entry & table.place_bits
                possible = first <= place <= last and place % self._cluster_bytes == 0
                if entry & table.reserved_bits or not possible:
                    raise self._file.bad(f"the {table.name} table has an impossible entry, {entry:#018x}")


def _numbers(chunk: bytes) -> "array.array[int]":
    numbers = array.array("Q", chunk)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _text(name: bytes | None) -> str | None:
    return None if name is None else name.decode("utf-8", "backslashreplace")
