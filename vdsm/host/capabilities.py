"""Host.getCapabilities: what this host is and can do.

Names and shapes are upstream VDSM's, where numbers are mostly strings; `hostID`, `hostName`, `repositoryFormats` and
`reasons` are ours. A fact whose source is missing is None, with the reason in `reasons` under its name: one broken
source must not hide the rest of the host from its engine.
"""

import dataclasses
import hashlib
import hmac
import shlex
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdsm import errors
from vdsm.host import packages, processors

# Mixed into the machine id, so that the host's UUID does not give the machine id away (machine-id(5) asks for this).
_APPLICATION = uuid.UUID("6bb3a6a5-0d6f-4a08-9d5e-1c4d2d5fd0b7")


class Unknown(Exception):
    """A fact cannot be told; the text says why."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """What other rooms know of this host. The functions may block, are called once, and may raise a `VdsmError`."""

    host_id: int
    host_name: str
    software_version: str
    repository_formats: Sequence[str]
    # The answer of `hardware.read`.
    hardware: Callable[[], Mapping[str, Any]]
    # "kvm" or "qemu": what a guest really runs under here.
    domain_type: Callable[[], str]
    # libvirt's capabilities document.
    hypervisor_xml: Callable[[], str]
    # {hook point: {script: {"checksum": ...}}}
    hooks: Callable[[], Mapping[str, Any]]


def read(sources: Sources, root: Path = Path("/")) -> dict[str, Any]:
    """All capabilities by name, and `reasons`. Blocks; `root` is where /proc, /sys and /etc are. Raises nothing that
    comes from a missing or odd source."""
    readers = _readers(sources, root)
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, reader in readers.items():
        try:
            values[name] = reader()
        except (Unknown, errors.VdsmError, ValueError) as error:
            values[name], reasons[name] = None, str(error)
        except OSError as error:
            values[name], reasons[name] = None, f"{error.filename}: {error.strerror}"
    for name, version in (values["packages2"] or {}).items():
        if version is None:
            reasons[f"packages2.{name}"] = "not installed"
    return values | {"reasons": reasons}


def _readers(sources: Sources, root: Path) -> dict[str, Callable[[], Any]]:
    return {
        "uuid": lambda: _uuid(sources, root),
        "hostID": lambda: sources.host_id,
        "hostName": lambda: sources.host_name,
        "software_version": lambda: sources.software_version,
        "operatingSystem": lambda: _operating_system(root),
        "kernelArgs": lambda: (root / "proc/cmdline").read_text().strip(),
        "boot_uuid": lambda: (root / "proc/sys/kernel/random/boot_id").read_text().strip(),
        "cpuModel": lambda: _processor(root, "model name"),
        "cpuSpeed": lambda: _processor(root, "cpu MHz"),
        "cpuFlags": lambda: ",".join(_processor(root, "flags").split()),
        "cpuThreads": lambda: str(len(processors.topology(root).online)),
        "cpuCores": lambda: str(processors.topology(root).cores),
        "cpuSockets": lambda: str(processors.topology(root).sockets),
        "onlineCpus": lambda: ",".join(map(str, processors.topology(root).online)),
        "memSize": lambda: str(_memory_kib(root) // 1024),
        "kvmEnabled": lambda: "true" if sources.domain_type() == "kvm" else "false",
        "emulatedMachines": lambda: _machines(sources.hypervisor_xml()),
        "packages2": packages.versions,
        "repositoryFormats": lambda: list(sources.repository_formats),
        "hooks": sources.hooks,
    }


def _uuid(sources: Sources, root: Path) -> str:
    """The firmware's UUID; on a machine whose firmware has none, one derived from its machine id. When the firmware
    cannot be asked just now there is no answer: a host must not change its identity because a daemon is down."""
    told = sources.hardware()["systemUUID"]
    if told is not None:
        return str(told).lower()
    machine = uuid.UUID((root / "etc/machine-id").read_text().strip())
    derived = hmac.digest(machine.bytes, _APPLICATION.bytes, hashlib.sha256)
    return str(uuid.UUID(bytes=derived[:16], version=4))


def _operating_system(root: Path) -> dict[str, str | None]:
    """os-release(5): lines as a shell reads them."""
    lines = shlex.split((root / "etc/os-release").read_text(), comments=True)
    told = dict(line.partition("=")[::2] for line in lines)
    names = {"name": "NAME", "version": "VERSION_ID", "pretty_name": "PRETTY_NAME"}
    return {name: told.get(key) for name, key in names.items()}


def _processor(root: Path, key: str) -> str:
    text = processors.description(root).get(key)
    if text is None:
        raise Unknown(f"{processors.CPUINFO} does not tell it on this architecture")
    return text


def _memory_kib(root: Path) -> int:
    lines = (root / "proc/meminfo").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemTotal:")]
    if not found:
        raise Unknown("proc/meminfo has no MemTotal")
    return int(found[0])


def _machines(document: str) -> list[str]:
    """The machine types that libvirt offers to guests of this host's architecture, each name once, sorted."""
    try:
        tree = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise Unknown(f"libvirt's capabilities: {error}") from error
    architecture = tree.findtext("host/cpu/arch")
    guests = [arch for arch in tree.iterfind("guest/arch") if arch.get("name") == architecture]
    return sorted({machine.text or "" for guest in guests for machine in guest.iterfind(".//machine")})
