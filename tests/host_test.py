"""The host's hardware and capabilities."""

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import supervdsm_process as processes

from supervdsm import calls, client, contract
from vdsm import errors, roothelper
from vdsm.host import capabilities, hardware, packages, processors

# -- the root helper's failures --------------------------------------------------------------------------------------


class FailingHelper(client.Helper):
    """Fails every call in the given way."""

    def __init__(self, failure: contract.HelperError) -> None:
        super().__init__("/nowhere")
        self.failure = failure

    def call(self, call: contract.Call[contract.R]) -> contract.R:
        raise self.failure


AS_OURS = {
    "refused": errors.HelperFailed,
    "failed": errors.HelperFailed,
    "deadline": errors.HelperUnavailable,
    "stopped": errors.HelperUnavailable,
    "unavailable": errors.HelperUnavailable,
}


@pytest.mark.parametrize("kind", contract.HelperError.by_kind)
def test_every_failure_of_the_helper_becomes_one_of_ours(kind: str) -> None:
    helper = FailingHelper(contract.HelperError.by_kind[kind]("because"))
    with pytest.raises(AS_OURS[kind]) as caught:
        roothelper.call(helper, calls.GetHardwareInfo())
    assert caught.value.facts["reason"] == "because"
    assert caught.value.facts.get("call", "GetHardwareInfo") == "GetHardwareInfo"


def test_no_helper_is_an_error_with_its_socket() -> None:
    with pytest.raises(errors.HelperUnavailable, match=r"/nowhere/svdsm\.sock: No such file or directory"):
        hardware.read(client.Helper("/nowhere/svdsm.sock"))


# -- hardware --------------------------------------------------------------------------------------------------------

NAMES = {"systemManufacturer", "systemProductName", "systemVersion", "systemSerialNumber", "systemUUID", "systemFamily"}


@processes.needs_root
def test_this_machine_tells_each_field_or_why_not() -> None:
    with processes.running() as helper:
        told = hardware.read(client.Helper(helper.socket))
    assert told.keys() == NAMES | {"reasons"}
    assert told["reasons"].keys() == {name for name in NAMES if told[name] is None}
    assert all(told["reasons"].values())


@processes.needs_root
def test_the_firmware_s_words_arrive_under_upstream_s_names(tmp_path: Path) -> None:
    for name, text in {"sys_vendor": "ACME \xfc\n", "product_name": "Box\n", "product_serial": " S-1 \n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "product_uuid").write_bytes(b"\xff\n")
    (tmp_path / "product_version").write_text("\n")
    with processes.running(processes.extended(dmi=str(tmp_path))) as helper:
        told = hardware.read(client.Helper(helper.socket))
    assert told == {
        "systemManufacturer": "ACME \xfc",
        "systemProductName": "Box",
        "systemVersion": None,
        "systemSerialNumber": "S-1",
        "systemUUID": "\ufffd",
        "systemFamily": None,
        "reasons": {
            "systemVersion": "product_version is empty",
            "systemFamily": "product_family: No such file or directory",
        },
    }


# -- capabilities ----------------------------------------------------------------------------------------------------

UUID = "4C4C4544-0051-3610-8052-B4C04F4D3632"
LIBVIRT = """
<capabilities>
  <host><cpu><arch>x86_64</arch></cpu></host>
  <guest><os_type>hvm</os_type><arch name='i686'><machine>isapc</machine></arch></guest>
  <guest><os_type>hvm</os_type><arch name='x86_64'>
    <machine maxCpus='255'>pc-q35-7.2</machine><machine canonical='pc-q35-7.2' maxCpus='255'>q35</machine>
    <domain type='qemu'/><domain type='kvm'><machine maxCpus='255'>pc-q35-7.2</machine></domain>
  </arch></guest>
</capabilities>
"""
HOOKS = {"before_vm_start": {"50_numa": {"checksum": "0" * 64}}}
STRINGS = ["uuid", "hostName", "software_version", "kernelArgs", "boot_uuid", "cpuModel", "cpuSpeed", "cpuFlags"]
STRINGS += ["cpuThreads", "cpuCores", "cpuSockets", "onlineCpus", "memSize", "kvmEnabled"]
OTHERS = ["hostID", "operatingSystem", "emulatedMachines", "packages2", "repositoryFormats", "hooks", "reasons"]
FROM_FILES = {"operatingSystem", "kernelArgs", "boot_uuid", "cpuModel", "cpuSpeed", "cpuFlags", "cpuThreads"}
FROM_FILES |= {"cpuCores", "cpuSockets", "onlineCpus", "memSize"}


def unavailable() -> Any:
    raise errors.HypervisorUnavailable(reason="no socket")


def sources(**changes: Any) -> capabilities.Sources:
    given: dict[str, Any] = {
        "host_id": 7,
        "host_name": "blue",
        "software_version": "0.1.0",
        "repository_formats": ("localfs-1.0",),
        "hardware": lambda: {"systemUUID": UUID},
        "domain_type": lambda: "qemu",
        "hypervisor_xml": lambda: LIBVIRT,
        "hooks": lambda: HOOKS,
    }
    return capabilities.Sources(**given | changes)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A host with two sockets of two cores of two threads, core numbers repeating in each socket, CPU 7 offline."""

    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    description = "model name\t: Fast One\ncpu MHz\t\t: 2000.5\nflags\t\t: fpu vme\npower management:\n\n"
    write("proc/cpuinfo", "".join(f"processor\t: {number}\n{description}" for number in range(7)))
    write("proc/meminfo", "MemTotal:       16777215 kB\nMemFree:  1 kB\n")
    write("proc/cmdline", "quiet ro\n")
    write("proc/sys/kernel/random/boot_id", "bb8ec961-57a1-4a91-a291-a8695237adf7\n")
    write("etc/os-release", "PRETTY_NAME=\"It's 12\"\nNAME=Debian\n# comment\nVERSION_ID='12'\n")
    write("etc/machine-id", "3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    write("sys/devices/system/cpu/online", "0-6\n")
    for number in range(7):
        core, socket = number // 2, number // 4
        folder = f"sys/devices/system/cpu/cpu{number}/topology"
        write(f"{folder}/core_id", str(core % 2))
        write(f"{folder}/core_cpus_list", f"{core * 2}-{core * 2 + 1}\n" if core < 3 else "6\n")
        write(f"{folder}/package_cpus_list", f"{socket * 4}-{min(socket * 4 + 3, 6)}\n")
    yield tmp_path


def test_this_host_s_capabilities_agree_with_other_witnesses() -> None:
    told = capabilities.read(sources())
    json.dumps(told, allow_nan=False)
    assert told.keys() == {*STRINGS, *OTHERS}
    assert all(isinstance(told[name], str) for name in STRINGS if name not in told["reasons"])
    assert told["cpuThreads"] == str(os.sysconf("SC_NPROCESSORS_ONLN"))
    assert 1 <= int(told["cpuSockets"]) <= int(told["cpuCores"]) <= int(told["cpuThreads"])
    assert told["memSize"] == str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20)
    assert told["boot_uuid"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    by_architecture = {"cpuModel", "cpuSpeed", "cpuFlags"}
    assert told["reasons"].keys() <= by_architecture | {f"packages2.{name}" for name in packages.PACKAGES}


def test_capabilities_of_a_known_host_are_exact(root: Path) -> None:
    told = capabilities.read(sources(), root)
    versions = told.pop("packages2")
    assert versions.keys() == packages.PACKAGES.keys()
    reasons = told.pop("reasons")
    assert all(name.startswith("packages2.") for name in reasons)
    assert told == {
        "uuid": UUID.lower(),
        "hostID": 7,
        "hostName": "blue",
        "software_version": "0.1.0",
        "operatingSystem": {"name": "Debian", "version": "12", "pretty_name": "It's 12"},
        "kernelArgs": "quiet ro",
        "boot_uuid": "bb8ec961-57a1-4a91-a291-a8695237adf7",
        "cpuModel": "Fast One",
        "cpuSpeed": "2000.5",
        "cpuFlags": "fpu,vme",
        "cpuThreads": "7",
        "cpuCores": "4",
        "cpuSockets": "2",
        "onlineCpus": "0,1,2,3,4,5,6",
        "memSize": "16383",
        "kvmEnabled": "false",
        "emulatedMachines": ["pc-q35-7.2", "q35"],
        "repositoryFormats": ["localfs-1.0"],
        "hooks": HOOKS,
    }


def test_what_the_probe_found_decides_about_kvm(root: Path) -> None:
    assert capabilities.read(sources(domain_type=lambda: "kvm"), root)["kvmEnabled"] == "true"


@pytest.mark.parametrize(
    ("source", "fact"),
    [("hardware", "uuid"), ("domain_type", "kvmEnabled"), ("hypervisor_xml", "emulatedMachines")],
)
def test_a_source_that_fails_hides_its_own_facts_only(root: Path, source: str, fact: str) -> None:
    whole, told = capabilities.read(sources(), root), capabilities.read(sources(**{source: unavailable}), root)
    assert told.pop("reasons") == whole.pop("reasons") | {fact: "libvirt does not answer: no socket"}
    assert told == whole | {fact: None}


def test_a_host_without_proc_and_sys_still_answers(tmp_path: Path) -> None:
    told = capabilities.read(sources(), tmp_path)
    assert told["reasons"].keys() >= FROM_FILES
    assert all(told[name] is None for name in FROM_FILES)
    assert told["reasons"]["memSize"] == f"{tmp_path}/proc/meminfo: No such file or directory"
    assert (told["hostID"], told["uuid"], told["kvmEnabled"]) == (7, UUID.lower(), "false")


@pytest.mark.parametrize(
    ("path", "text", "facts"),
    [
        ("proc/cpuinfo", "processor : 0\nFeatures : fp asimd\n", {"cpuModel", "cpuSpeed", "cpuFlags"}),
        ("proc/meminfo", "MemFree: 1 kB\n", {"memSize"}),
        ("sys/devices/system/cpu/online", "what\n", {"cpuThreads", "cpuCores", "cpuSockets", "onlineCpus"}),
        ("etc/os-release", 'NAME="open\n', {"operatingSystem"}),
        ("etc/os-release", "\udcff", {"operatingSystem"}),
    ],
    ids=["other architecture", "memory", "processors", "quotes", "encoding"],
)
def test_an_odd_file_hides_its_own_facts_only(root: Path, path: str, text: str, facts: set[str]) -> None:
    whole = capabilities.read(sources(), root)
    (root / path).write_text(text, errors="surrogateescape")
    told = capabilities.read(sources(), root)
    assert told["reasons"].keys() - whole["reasons"].keys() == facts
    assert {name for name in told if told[name] != whole[name]} == facts | {"reasons"}


def test_a_broken_document_of_libvirt_is_a_reason(root: Path) -> None:
    told = capabilities.read(sources(hypervisor_xml=lambda: "<capabilities>"), root)
    assert told["emulatedMachines"] is None
    assert told["reasons"]["emulatedMachines"].startswith("libvirt's capabilities: no element found")


# -- the host's identity ---------------------------------------------------------------------------------------------


def no_uuid() -> dict[str, Any]:
    return {"systemUUID": None, "reasons": {"systemUUID": "this machine has no DMI"}}


def test_without_firmware_the_uuid_is_derived_from_the_machine_id(root: Path) -> None:
    derived = capabilities.read(sources(hardware=no_uuid), root)["uuid"]
    # Stored: a host keeps its identity over versions of the agent.
    assert derived == "046acaa2-7d06-481c-83bc-9f16a734ec54"
    assert uuid.UUID(derived).version == 4
    (root / "etc/machine-id").write_text("4d1219c7c4c5404aaa1f6d2a48adfda4\n")
    assert capabilities.read(sources(hardware=no_uuid), root)["uuid"] != derived


def test_a_host_without_any_identity_says_so(root: Path) -> None:
    (root / "etc/machine-id").write_text("uninitialized\n")
    told = capabilities.read(sources(hardware=no_uuid), root)
    assert told["uuid"] is None
    assert told["reasons"]["uuid"]


# -- packages and processors -----------------------------------------------------------------------------------------


def test_versions_agree_with_the_package_database() -> None:
    for name, version in packages.versions().items():
        command = ["dpkg-query", "-W", "-f", "${Version}", packages.PACKAGES[name]]
        known = subprocess.run(command, capture_output=True, text=True)
        whole = "-".join(filter(None, version.values())) if version else None
        assert whole == (re.sub(r"^\d+:", "", known.stdout) or None)


def test_a_package_that_is_not_installed_is_none_with_a_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All that the agent drives may be installed where the tests run.
    monkeypatch.setattr(packages, "PACKAGES", {"libc": "libc-bin", "none": "no-such-package"})
    told = capabilities.read(sources(), root)
    assert told["packages2"]["none"] is None
    assert told["packages2"]["libc"]["version"]
    assert told["reasons"] == {"packages2.none": "not installed"}


def test_without_a_package_database_there_is_a_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A system without dpkg, such as Fedora.
    monkeypatch.setenv("PATH", str(root))
    told = capabilities.read(sources(), root)
    assert told["packages2"] is None
    assert "dpkg-query" in told["reasons"]["packages2"]


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        ("9.0.0-4+deb12u2", ("9.0.0", "4+deb12u2")),
        ("1:7.2+dfsg-7+deb12u18+b3", ("7.2+dfsg", "7+deb12u18+b3")),
        ("1.0-rc1-2", ("1.0-rc1", "2")),
        ("20230101", ("20230101", "")),
        ("2:3.0", ("3.0", "")),
    ],
)
def test_debian_versions_are_split(version: str, parts: tuple[str, str]) -> None:
    assert packages.split(version) == dict(zip(("version", "release"), parts, strict=True))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0\n", (0,)), ("0-3\n", (0, 1, 2, 3)), ("0-1,4,6-7\n", (0, 1, 4, 6, 7))],
)
def test_the_kernel_s_lists_are_read(text: str, numbers: tuple[int, ...]) -> None:
    assert processors.parse_list(text) == numbers
