"""What hook scripts may not change in a domain: that it is this VM, started by our launcher, on the planned data.

Everything else is theirs: CPUs, memory, tuning, more devices, QEMU's command line. What they add has no lease. So it
must not name a file inside a repository, where somebody else may hold one; the check reads names, it follows no links.
"""

import os.path
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vdsm.virt import domxml

_ENV = f"{{{domxml.QEMU_NAMESPACE}}}commandline/{{{domxml.QEMU_NAMESPACE}}}env"
_METADATA = f"metadata/{{{domxml.NAMESPACE}}}vm"
_ORDERS = "VDSM_"
# What decides which bytes a disk is; the rest (bus, serial, cache, tuning) may be changed.
_DATA = ("source", "backingStore", "readonly", "transient", "encryption", "mirror")

# What must be as it was, in the words of the refusal.
_FIXED: dict[str, Callable[[ET.Element], object]] = {
    "the VM's uuid": lambda domain: _texts(domain, "uuid"),
    "the VM's name": lambda domain: _texts(domain, "name"),
    "the emulator, which is the launcher that takes the leases": lambda domain: _texts(domain, "devices/emulator"),
    "the agent's metadata": lambda domain: _texts(domain, _METADATA),
    "the launcher's orders": lambda domain: sorted((e.get("name"), e.get("value")) for e in _orders(domain)),
    "the label that keeps libvirt from changing the owner of images": lambda domain: [
        sorted(label.items()) for label in domain.iterfind("seclabel[@model='dac']")
    ],
}


def check(planned: str, edited: str, repository_dirs: Sequence[str]) -> None:
    """Raises ValueError with what a script changed that it may not. `edited` is well-formed and has no entities."""
    before, after = ET.fromstring(planned), ET.fromstring(edited)
    if after.tag != "domain":
        raise ValueError(f"a <{after.tag}>, not a <domain>")
    for what, find in _FIXED.items():
        if find(before) != find(after):
            raise ValueError(f"it changed {what}")
    wanted = [_data(disk) for disk in _disks(before)]
    planned_disks = []
    for disk in _disks(after):
        if _data(disk) in wanted:
            wanted.remove(_data(disk))
            planned_disks.append(disk)
    if wanted:
        raise ValueError("it changed the data of a disk, or took one away")
    inside = [str(Path(path).parent) for path in _sources(before)] + list(map(os.path.normpath, repository_dirs))
    ours = {part for element in (*planned_disks, *_orders(after)) for part in element.iter()}
    for name in _names(after, ours):
        if any(f"{directory}/" in f"{name}/" for directory in inside):
            raise ValueError(f"it adds {name}, which is inside a repository")


def _texts(domain: ET.Element, path: str) -> list[str]:
    return [element.text or "" for element in domain.iterfind(path)]


def _orders(domain: ET.Element) -> list[ET.Element]:
    return [element for element in domain.iterfind(_ENV) if (element.get("name") or "").startswith(_ORDERS)]


def _disks(domain: ET.Element) -> list[ET.Element]:
    return domain.findall("devices/disk")


def _data(disk: ET.Element) -> tuple[object, ...]:
    driver = disk.find("driver")
    parts = [ET.canonicalize(ET.tostring(part), strip_text=True) for name in _DATA for part in disk.iterfind(name)]
    return disk.get("type"), disk.get("device"), None if driver is None else driver.get("type"), *parts


def _sources(domain: ET.Element) -> Iterator[str]:
    for disk in _disks(domain):
        for source in disk.iter("source"):
            yield from filter(None, (source.get("file"), source.get("dev")))


def _names(domain: ET.Element, ours: set[ET.Element]) -> Iterator[str]:
    """Every attribute and text outside `ours` and the metadata, paths among them in their plain form too."""
    metadata = {part for found in domain.iterfind("metadata") for part in found.iter()}
    for element in domain.iter():
        if element in ours or element in metadata:
            continue
        for value in filter(None, (*element.attrib.values(), (element.text or "").strip())):
            yield value
            yield os.path.normpath(value)
