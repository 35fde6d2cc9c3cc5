"""What a VM shall be: the VmSpec.

Plain frozen data. `parse` reads it from the dictionary that comes over the wire (in snake_case) and from a domain's
metadata; `to_dict` is its inverse, without secrets.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from vdsm import errors, ids

MAX_DISKS = 24
MAX_NICS = 8
# What libvirt and udev take in a serial number.
SERIAL_PATTERN = r"[A-Za-z0-9_.+-]{1,36}"
MAC_PATTERN = r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}"
# A domain's name; libvirt's log files are named by it.
NAME_PATTERN = r"[^\W_][\w.+-]{0,63}"
PROPERTY_PATTERN = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
PATH_PATTERN = r"/[^\0\n]{1,4000}"


@dataclasses.dataclass(frozen=True)
class DirectKernel:
    """Boots a kernel of the host, without firmware's boot order. Files must lie under `virt.boot_dirs`."""

    kernel: str
    initrd: str | None = None
    cmdline: str = ""


@dataclasses.dataclass(frozen=True)
class Disk:
    """A virtual disk, or a snapshot when `read_only`. `serial` is the image's id unless given; `boot_order` ranks it
    among the VM's disks."""

    image_id: str
    repo_id: str | None = None
    bus: Literal["virtio", "sata", "scsi"] = "virtio"
    read_only: bool = False
    serial: str | None = None
    boot_order: int | None = None


@dataclasses.dataclass(frozen=True)
class Nic:
    """User-mode network: the guest reaches out, nobody reaches in."""

    model: Literal["virtio", "e1000"] = "virtio"
    mac: str | None = None
    type: Literal["user"] = "user"


@dataclasses.dataclass(frozen=True)
class Vnc:
    """A console on this host's loopback, at a port that libvirt chooses."""

    listen: Literal["127.0.0.1"] = "127.0.0.1"
    password: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class VmSpec:
    """One VM. `boot_order` says which kinds of devices are tried, one after the other.

    `lease_repo_id` names the repository that holds the VM's lease and record; without it that of the first disk does.
    `on_lease_lost` is what happens when its leases are lost while it runs.
    """

    vm_id: str
    name: str = ""
    memory_mib: int = 1024
    vcpus: int = 1
    machine: Literal["q35", "pc"] = "q35"
    firmware: Literal["bios", "uefi"] = "bios"
    boot_order: tuple[Literal["disk", "network"], ...] = ("disk",)
    direct_kernel: DirectKernel | None = None
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    console_log: bool = True
    vnc: Vnc | None = None
    agent_channel: bool = True
    custom_properties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lease_repo_id: str | None = None
    on_lease_lost: Literal["kill"] = "kill"

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """The spec that `given` describes. Raises `InvalidParameters` naming the parameter."""
        spec = _read(cls, given, "")
        spec = dataclasses.replace(
            spec,
            vm_id=ids.check_uuid(spec.vm_id, "vm_id"),
            name=spec.name or spec.vm_id.lower(),
            disks=tuple(
                dataclasses.replace(disk, image_id=ids.check_uuid(disk.image_id, f"disks[{at}].image_id"))
                for at, disk in enumerate(spec.disks)
            ),
            nics=tuple(dataclasses.replace(nic, mac=nic.mac and nic.mac.lower()) for nic in spec.nics),
        )
        for parameter, reason in _wrong(spec):
            raise errors.InvalidParameters(parameter=parameter, reason=reason)
        return typing.cast(Self, spec)

    def to_dict(self) -> dict[str, Any]:
        """JSON for metadata and answers, without the console's password."""
        known = dataclasses.asdict(self)
        if known["vnc"] is not None:
            del known["vnc"]["password"]
        return known


def _wrong(spec: VmSpec) -> typing.Iterator[tuple[str, str]]:
    """(parameter, reason) of what types alone do not tell."""
    if not re.fullmatch(NAME_PATTERN, spec.name):
        yield "name", "letters, digits, '_', '.', '+' and '-' only, 64 at most, a letter or digit first"
    if not 16 <= spec.memory_mib <= 4 << 20:
        yield "memory_mib", "must be 16 to 4194304"
    if not 1 <= spec.vcpus <= 255:
        yield "vcpus", "must be 1 to 255"
    if len(set(spec.boot_order)) != len(spec.boot_order):
        yield "boot_order", "names a kind twice"
    if spec.lease_repo_id is not None and not re.fullmatch(ids.REPO_ID_PATTERN, spec.lease_repo_id):
        yield "lease_repo_id", "not a repository id"
    for name in spec.custom_properties:
        if not re.fullmatch(PROPERTY_PATTERN, name):
            yield "custom_properties", f"{name!r} is no property name"
    yield from _wrong_kernel(spec.direct_kernel)
    yield from _wrong_disks(spec.disks)
    yield from _wrong_nics(spec.nics)
    if spec.vnc is not None and spec.vnc.password is not None and not 1 <= len(spec.vnc.password) <= 8:
        yield "vnc.password", "VNC takes 1 to 8 characters"


def _wrong_kernel(boot: DirectKernel | None) -> typing.Iterator[tuple[str, str]]:
    if boot is None:
        return
    for field, path in (("kernel", boot.kernel), ("initrd", boot.initrd)):
        if path is not None and not re.fullmatch(PATH_PATTERN, path):
            yield f"direct_kernel.{field}", "must be an absolute path"
    if len(boot.cmdline) > 2000 or not boot.cmdline.isprintable():
        yield "direct_kernel.cmdline", "must be one line of 2000 characters at most"


def _wrong_disks(disks: tuple[Disk, ...]) -> typing.Iterator[tuple[str, str]]:
    if len(disks) > MAX_DISKS:
        yield "disks", f"{MAX_DISKS} at most"
    images = [disk.image_id for disk in disks]
    orders = [disk.boot_order for disk in disks if disk.boot_order is not None]
    for at, disk in enumerate(disks):
        if images.index(disk.image_id) != at:
            yield f"disks[{at}].image_id", "the VM has this disk already"
        if disk.repo_id is not None and not re.fullmatch(ids.REPO_ID_PATTERN, disk.repo_id):
            yield f"disks[{at}].repo_id", "not a repository id"
        if disk.serial is not None and not re.fullmatch(SERIAL_PATTERN, disk.serial):
            yield f"disks[{at}].serial", "letters, digits, '_', '.', '+' and '-' only, 36 at most"
        if disk.bus == "sata" and disk.read_only:
            yield f"disks[{at}].read_only", "a SATA disk cannot be read-only"
        if disk.boot_order is not None and (disk.boot_order < 1 or orders.count(disk.boot_order) > 1):
            yield f"disks[{at}].boot_order", "must be positive, and no other disk's"


def _wrong_nics(nics: tuple[Nic, ...]) -> typing.Iterator[tuple[str, str]]:
    if len(nics) > MAX_NICS:
        yield "nics", f"{MAX_NICS} at most"
    for at, nic in enumerate(nics):
        if nic.mac is not None and not re.fullmatch(MAC_PATTERN, nic.mac):
            yield f"nics[{at}].mac", "not a unicast MAC address"


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(kind: Any, value: object, where: str) -> Any:
    """`value` as `kind`: dataclasses from mappings, tuples from lists, the rest as it is, checked."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # only ever "something or None" here
        return None if value is None else _read(members[0], value, where)
    if origin is Literal:
        _expect(value in members, where, f"must be one of {', '.join(map(str, members))}")
        return value
    if origin is tuple:
        _expect(isinstance(value, list | tuple), where, "must be a list")
        return tuple(_read(members[0], item, f"{where}[{at}]") for at, item in enumerate(typing.cast(list[Any], value)))
    if dataclasses.is_dataclass(kind):
        return _read_fields(typing.cast(type[Any], kind), value, where)
    if origin is not None:
        texts = isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
        _expect(texts, where, "must map texts to texts")
        return dict(typing.cast(Mapping[str, str], value))
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _expect(fits, where, f"must be {kind.__name__}")
    return value


def _read_fields(kind: type[Any], value: object, where: str) -> Any:
    _expect(isinstance(value, Mapping), where or "vm_params", "must be an object")
    given = typing.cast(Mapping[str, Any], value)
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for name in given.keys() - hints.keys():
        _expect(False, prefix + name, "unknown")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        _expect(field.name in given or not required, prefix + field.name, "missing")
    return kind(**{name: _read(hints[name], item, prefix + name) for name, item in given.items()})


def _expect(fine: bool, parameter: str, reason: str) -> None:
    if not fine:
        raise errors.InvalidParameters(parameter=parameter, reason=reason)
