"""Foreign image files: what is let in, decided by our own reading before any tool opens them.

A qcow2 file may name other files of this host (a backing file, an external data file), claim any size, and point its
tables anywhere; a "raw" file may begin with the header of another format, which a tool that guesses would believe.
`open_checked` opens a file once, reads its header, refuses what we do not want, and hands on the *descriptor*, so that
the file checked is the file used. Who can write the file can still change it under the tool: so give tools the format
and an explicit chain as well (`"backing": null`), and never the name.

    vmdk vdi vhd vhdx qed qcow luks parallels bochs cloop dmg    recognised, to be refused by name
    raw                                                          anything that is not recognised
    qcow2                                                        read whole: `qcow2.py`

Blocks as long as the storage does: runs in a child that may be killed. Nothing is written.
"""

import os
from collections.abc import Iterator, Set
from dataclasses import dataclass

from vdsm import errors, sizes
from vdsm.storage.files import imagefile, qcow2

ImageHeader = imagefile.ImageHeader

READABLE = frozenset({"raw", "qcow2"})

_MAGICS = (
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhd", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
_TRAILERS = (("vhd", b"conectix"), ("dmg", b"koly"))  # at the beginning of the last 512 bytes


@dataclass(frozen=True)
class Limits:
    """What `check` accepts at most."""

    virtual_size_bytes: int = 16 * sizes.TIB
    bitmaps: int = 128


_DEFAULT_LIMITS = Limits()


def open_checked(path: str, claimed_format: str, limits: Limits = _DEFAULT_LIMITS) -> tuple[int, ImageHeader]:
    """Open the regular file `path`, read its header and check it: (descriptor, header).

    The descriptor is read-only and belongs to the caller. A symbolic link in the last place is refused; where the
    directories above lead is the caller's question. Raises `BadImageFile`.
    """
    fd = imagefile.open_file(path)
    try:
        header = read(fd, {claimed_format}, path=path)
        check(header, claimed_format, limits)
    except BaseException:
        os.close(fd)
        raise
    return fd, header


def read(source: str | int, allowed: Set[str] = READABLE, *, path: str | None = None) -> ImageHeader:
    """The header of `source`, a path or a descriptor open for reading (`path` then names it in errors).

    `allowed` is the set of formats that the file may be in, out of `READABLE`; others are a `ValueError`. Raises
    `BadImageFile` when the file is not a regular one, is in another format, or contradicts its format's specification.
    """
    if not allowed <= READABLE:
        raise ValueError(f"no reader for {sorted(allowed - READABLE)}")
    if isinstance(source, int):
        return _read(imagefile.ImageFile(source, path or f"descriptor {source}"), allowed)
    fd = imagefile.open_file(source)
    try:
        return _read(imagefile.ImageFile(fd, source), allowed)
    finally:
        os.close(fd)


def check(header: ImageHeader, claimed_format: str, limits: Limits = _DEFAULT_LIMITS) -> None:
    """Refuse what is well-formed but not wanted from a stranger: references to other files, encryption, internal
    snapshots, unclean and oversized images. Raises `BadImageFile` with the first reason."""
    for reason in _objections(header, claimed_format, limits):
        raise errors.BadImageFile(path=header.path, reason=reason)


def _objections(header: ImageHeader, claimed_format: str, limits: Limits) -> Iterator[str]:
    if header.format != claimed_format:
        yield f"it is {header.format}, not {claimed_format}"
    if header.backing_name is not None:
        yield f"it has a backing file, {_describe(header.backing_name)}"
    if header.data_file:
        yield f"it keeps its data in another file, {_describe(header.data_file_name)}"
    if header.encryption:
        yield f"it is encrypted ({header.encryption})"
    if header.snapshots:
        yield f"it has internal snapshots ({header.snapshots})"
    if "corrupt" in header.features:
        yield "it is marked corrupt"
    if "dirty" in header.features:
        yield "it is marked dirty: it was not closed cleanly, or is still in use"
    if header.bitmaps > limits.bitmaps:
        yield f"it has {header.bitmaps} bitmaps; the limit is {limits.bitmaps}"
    if not 0 < header.virtual_size_bytes <= limits.virtual_size_bytes:
        yield f"its size is {header.virtual_size_bytes} bytes; the limit is {limits.virtual_size_bytes}"


def _describe(name: str | None) -> str:
    """What a reference to another file would make a tool do, with the name fit for a message."""
    if not name:
        return "without a name"
    shown = repr(name if len(name) <= 100 else name[:100] + "...")
    if name.startswith("json:"):
        return f"by the description {shown}"
    if ":" in name.partition("/")[0]:
        return f"by the protocol name {shown}"
    return f"by the {'absolute' if name.startswith('/') else 'relative'} name {shown}"


def _read(file: imagefile.ImageFile, allowed: Set[str]) -> ImageHeader:
    found = _detect(file)
    wanted = " or ".join(sorted(allowed))
    if found not in allowed:
        raise file.bad(f"it has no {wanted} header" if found == "raw" else f"it is recognised as {found}, not {wanted}")
    if found == "qcow2":
        return qcow2.read(file)
    return ImageHeader(file.path, "raw", file.size_bytes, sizes.round_up(file.size_bytes, 512))


def _detect(file: imagefile.ImageFile) -> str:
    """The format that a guessing tool could believe; "raw" when nothing is recognised."""
    head = file.read(0, 4096)
    if head.startswith(qcow2.MAGIC):
        return "qcow" if head[4:8] == b"\0\0\0\1" else "qcow2"
    for name, offset, magic in _MAGICS:
        if head.startswith(magic, offset):
            return name
    if _is_vmdk_text(head):
        return "vmdk"
    tail = file.read(max(file.size_bytes - 512, 0), 512)
    return next((name for name, magic in _TRAILERS if tail.startswith(magic)), "raw")


def _is_vmdk_text(head: bytes) -> bool:
    """A VMDK may be a text that names other files: comments and blank lines, then `version=`."""
    for line in head.splitlines():
        if line.strip() and not line.startswith(b"#"):
            return line.startswith(b"version=")
    return False
