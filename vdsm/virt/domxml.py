"""The domain XML of a VM. Pure: the same spec and plans give the same text.

What the agent must know about a VM after it was restarted stands in the domain's metadata, as JSON in an element of
our own namespace:

    version     1
    spec        the VmSpec, without secrets
    lease_repo  persistent name of the repository with the VM's lease and record, or null (the repository's id is
                transient and may be another after a reconnect)
    disks       as the VM's record names them: [{"repo": persistent name, "image_id"}, ...]
    leases      what QEMU must hold: [[lockspace, name, path, offset, shared], ...]
    created     when VM.create was called, seconds since 1970
    launched    false until the launch was over: the guest was resumed for the first time, or shall wait
    paused      the launch leaves the guest stopped, as a hook script asked for
"""

import dataclasses
import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from vdsm import leases
from vdsm.virt import spec

NAMESPACE = "urn:vdsm:vm:1"
PREFIX = "vdsm"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
METADATA_VERSION = 1
GUEST_AGENT_CHANNEL = "org.qemu.guest_agent.0"
BALLOON_PERIOD_S = 10

ET.register_namespace(PREFIX, NAMESPACE)
ET.register_namespace("qemu", QEMU_NAMESPACE)


class Source(Protocol):
    """Where a disk's data is: what this needs of storage's DiskPlan."""

    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def backing(self) -> Sequence[dict[str, Any]]: ...
    @property
    def is_volume(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Metadata:
    spec: spec.VmSpec
    lease_repo: str | None
    disks: tuple[dict[str, str], ...]
    leases: tuple[leases.Lease, ...]
    created: float
    launched: bool = False
    paused: bool = False


@dataclasses.dataclass(frozen=True)
class Ground:
    """What the host contributes. `kernel` and `initrd` are the resolved paths of a direct boot."""

    domain_type: str
    launcher: str
    emulator: str
    console_log: str | None = None
    kernel: str | None = None
    initrd: str | None = None


def build(metadata: Metadata, sources: Sequence[Source], lease_plan: dict[str, Any] | None, ground: Ground) -> str:
    """The XML of the domain. `sources` are those of the spec's disks, in their order; `lease_plan` is the launcher's,
    None for a VM that needs no lease."""
    vm = metadata.spec
    domain = ET.Element("domain", type=ground.domain_type)
    _text(domain, "name", vm.name)
    _text(domain, "uuid", vm.vm_id)
    ET.SubElement(domain, "metadata").append(_metadata(metadata))
    _text(domain, "memory", str(vm.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(vm.vcpus))
    _os(domain, vm, ground)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if ground.domain_type == "kvm":
        ET.SubElement(domain, "cpu", mode="host-model", check="partial")
    ET.SubElement(domain, "clock", offset="utc")
    for name, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _text(domain, name, action)
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", ground.launcher)
    _disks(devices, vm, sources)
    _nics(devices, vm)
    _consoles(devices, vm, ground)
    memballoon = ET.SubElement(devices, "memballoon", model="virtio")
    ET.SubElement(memballoon, "stats", period=str(BALLOON_PERIOD_S))
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    # Images and kernels keep their owners: libvirt would give them to QEMU's user, and later to root.
    ET.SubElement(domain, "seclabel", type="none", model="dac")
    _environment(domain, lease_plan, ground)
    return ET.tostring(domain, encoding="unicode")


def metadata_xml(metadata: Metadata) -> str:
    """The metadata's element by itself, to replace that of a running domain: libvirt adds the namespace to it."""
    element = ET.Element("vm")
    element.text = _metadata(metadata).text
    return ET.tostring(element, encoding="unicode")


def with_metadata(xml: str, metadata: Metadata) -> str:
    """The domain's XML with this instead of the metadata that it has."""
    domain = ET.fromstring(xml)
    place = domain.find(f"metadata/{{{NAMESPACE}}}vm")
    assert place is not None
    place.text = _metadata(metadata).text
    return ET.tostring(domain, encoding="unicode")


def parse_metadata(xml: str) -> Metadata:
    """What `build` put into the metadata. Raises ValueError when it is not that."""
    try:
        found = json.loads(ET.fromstring(xml).text or "")
        if found["version"] != METADATA_VERSION:
            raise ValueError(f"version {found['version']}")
        return Metadata(
            spec=spec.VmSpec.parse(found["spec"]),
            lease_repo=found["lease_repo"],
            disks=tuple(found["disks"]),
            leases=tuple(leases.Lease(*lease) for lease in found["leases"]),
            created=found["created"],
            launched=found["launched"],
            paused=found.get("paused", False),
        )
    except (ET.ParseError, KeyError, TypeError) as error:
        raise ValueError(f"not our metadata: {error!r}") from error


def targets(vm: spec.VmSpec) -> list[str]:
    """The device name of each disk, in the spec's order: vda, sda, vdb, ..."""
    letters = {"vd": iter("abcdefghijklmnopqrstuvwxyz"), "sd": iter("abcdefghijklmnopqrstuvwxyz")}
    prefixes = ["vd" if disk.bus == "virtio" else "sd" for disk in vm.disks]
    return [prefix + next(letters[prefix]) for prefix in prefixes]


def macs(vm: spec.VmSpec) -> list[str]:
    """The MAC address of each nic: the spec's, or one that depends on the VM and the nic's position alone."""
    return [nic.mac or _mac(vm.vm_id, at) for at, nic in enumerate(vm.nics)]


def _mac(vm_id: str, at: int) -> str:
    tail = hashlib.sha256(f"{vm_id} {at}".encode()).digest()[:3]
    return "52:54:00:" + tail.hex(":")  # QEMU's prefix


@dataclasses.dataclass(frozen=True)
class Live:
    """What only the running domain tells."""

    agent_connected: bool
    vnc_port: int | None
    xml: str  # all of it
    growing: tuple[str, ...] = ()  # names of the disks whose volumes have to grow while they are written


def parse_live(xml: str) -> Live:
    """From the XML of a running domain."""
    domain = ET.fromstring(xml)
    channel = domain.find(f"devices/channel/target[@name='{GUEST_AGENT_CHANNEL}']")
    graphics = domain.find("devices/graphics[@type='vnc']")
    port = None if graphics is None else graphics.get("port")
    return Live(
        agent_connected=channel is not None and channel.get("state") == "connected",
        vnc_port=None if port in (None, "-1") else int(port or 0),
        xml=xml,
        growing=tuple(_growing(domain)),
    )


def _growing(domain: ET.Element) -> Iterator[str]:
    for disk in domain.iterfind("devices/disk[@type='block']"):
        driver, target = disk.find("driver"), disk.find("target")
        grows = driver is not None and driver.get("type") == "qcow2" and disk.find("readonly") is None
        if grows and target is not None:
            yield target.get("dev", "")


def disk_of(xml: str, alias: str) -> str | None:
    """The name of the disk that libvirt calls `alias` in a running domain."""
    for disk in ET.fromstring(xml).iterfind("devices/disk") if xml else ():
        known, target = disk.find("alias"), disk.find("target")
        if known is not None and target is not None and known.get("name") == alias:
            return target.get("dev")
    return None


# -- parts -----------------------------------------------------------------------------------------------------------


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _metadata(metadata: Metadata) -> ET.Element:
    element = ET.Element(f"{{{NAMESPACE}}}vm")
    element.text = json.dumps(
        {
            "version": METADATA_VERSION,
            "spec": metadata.spec.to_dict(),
            "lease_repo": metadata.lease_repo,
            "disks": list(metadata.disks),
            "leases": [list(lease) for lease in metadata.leases],
            "created": metadata.created,
            "launched": metadata.launched,
            "paused": metadata.paused,
        }
    )
    return element


def _os(domain: ET.Element, vm: spec.VmSpec, ground: Ground) -> None:
    system = ET.SubElement(domain, "os")
    if vm.firmware == "uefi":
        system.set("firmware", "efi")
    _text(system, "type", "hvm", arch="x86_64", machine=vm.machine)
    if vm.direct_kernel is not None:
        _text(system, "kernel", ground.kernel or vm.direct_kernel.kernel)
        if ground.initrd is not None:
            _text(system, "initrd", ground.initrd)
        _text(system, "cmdline", vm.direct_kernel.cmdline)


def _disks(devices: ET.Element, vm: spec.VmSpec, sources: Sequence[Source]) -> None:
    orders = dict(_boot_orders(vm))
    for at, (disk, source, target) in enumerate(zip(vm.disks, sources, targets(vm), strict=True)):
        kind = "block" if source.is_volume else "file"
        element = ET.SubElement(devices, "disk", type=kind, device="disk")
        # No page cache: another host must see what was written. Native AIO needs that, and is the faster one.
        # A guest that finds its disk full is stopped instead of getting errors.
        driver = {"cache": "none", "io": "native", "discard": "unmap", "error_policy": "stop"}
        ET.SubElement(element, "driver", {"name": "qemu", "type": source.format, **driver})
        _source(element, {"path": source.path, "format": source.format, "size_bytes": source.size_bytes})
        _backing(element, source.backing)
        ET.SubElement(element, "target", dev=target, bus=disk.bus)
        _text(element, "serial", disk.serial or disk.image_id)
        if disk.read_only:
            ET.SubElement(element, "readonly")
        if ("disk", at) in orders:
            ET.SubElement(element, "boot", order=str(orders["disk", at]))
    if any(disk.bus == "scsi" for disk in vm.disks):
        ET.SubElement(devices, "controller", type="scsi", model="virtio-scsi")


def _source(parent: ET.Element, link: dict[str, Any]) -> None:
    """Where the data is. A volume is longer than the raw image in it, which the guest must not see."""
    if parent.get("type") == "file":
        ET.SubElement(parent, "source", file=link["path"])
        return
    source = ET.SubElement(parent, "source", dev=link["path"])
    if link["format"] == "raw":
        slices = ET.SubElement(source, "slices")
        ET.SubElement(slices, "slice", type="storage", offset="0", size=str(link["size_bytes"]))


def _backing(parent: ET.Element, chain: Sequence[dict[str, Any]]) -> None:
    """The whole chain, explicitly: records rule, image headers are not asked. An empty element ends it."""
    kind = parent.get("type", "file")  # all of a chain are in one repository
    for link in chain:
        parent = ET.SubElement(parent, "backingStore", type=kind)
        ET.SubElement(parent, "format", type=link["format"])
        _source(parent, link)
    ET.SubElement(parent, "backingStore")


def _boot_orders(vm: spec.VmSpec) -> Iterator[tuple[tuple[str, int], int]]:
    """((kind, position), order): kinds as the spec lists them, disks among themselves by their rank."""
    if vm.direct_kernel is not None:
        return
    ranked = sorted(range(len(vm.disks)), key=lambda at: (vm.disks[at].boot_order or spec.MAX_DISKS + 1, at))
    positions = {"disk": ranked, "network": list(range(len(vm.nics)))}
    places = [(kind, at) for kind in vm.boot_order for at in positions[kind]]
    for order, place in enumerate(places, start=1):
        yield place, order


def _nics(devices: ET.Element, vm: spec.VmSpec) -> None:
    orders = dict(_boot_orders(vm))
    for at, (nic, mac) in enumerate(zip(vm.nics, macs(vm), strict=True)):
        element = ET.SubElement(devices, "interface", type=nic.type)
        ET.SubElement(element, "mac", address=mac)
        ET.SubElement(element, "model", type=nic.model)
        if ("network", at) in orders:
            ET.SubElement(element, "boot", order=str(orders["network", at]))


def _consoles(devices: ET.Element, vm: spec.VmSpec, ground: Ground) -> None:
    serial = ET.SubElement(devices, "serial", type="pty")
    if ground.console_log is not None:
        # Appended: to begin anew virtlogd would make a new file that is root's alone. The agent has emptied it.
        ET.SubElement(serial, "log", file=ground.console_log, append="on")
    ET.SubElement(serial, "target", port="0")
    if vm.agent_channel:
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "target", type="virtio", name=GUEST_AGENT_CHANNEL)
    if vm.vnc is not None:
        graphics = ET.SubElement(devices, "graphics", type="vnc", port="-1", autoport="yes", listen=vm.vnc.listen)
        if vm.vnc.password is not None:
            graphics.set("passwd", vm.vnc.password)
        video = ET.SubElement(devices, "video")
        ET.SubElement(video, "model", type="vga")
    else:
        video = ET.SubElement(devices, "video")
        ET.SubElement(video, "model", type="none")


def _environment(domain: ET.Element, lease_plan: dict[str, Any] | None, ground: Ground) -> None:
    """The launcher's orders. libvirt starts it with nothing else in its environment."""
    orders = {"VDSM_QEMU": ground.emulator}
    if lease_plan is not None:
        orders["VDSM_LEASE_PLAN"] = json.dumps(lease_plan)
    commandline = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for name, value in orders.items():
        ET.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}env", name=name, value=value)
