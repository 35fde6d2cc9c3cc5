"""The VmSpec: what is taken, what is refused and by which name."""

import json
from typing import Any

import pytest

from vdsm import errors, ids
from vdsm.virt import spec

VM, IMAGE, OTHER = ids.new(), ids.new(), ids.new()


def parsed(**given: Any) -> spec.VmSpec:
    return spec.VmSpec.parse({"vm_id": VM, **given})


def test_defaults_are_a_small_vm_without_devices() -> None:
    found = parsed()
    assert (found.name, found.memory_mib, found.vcpus, found.machine, found.firmware) == (VM, 1024, 1, "q35", "bios")
    assert (found.disks, found.nics, found.vnc, found.agent_channel, found.console_log) == ((), (), None, True, True)


def test_ids_and_addresses_are_lowered() -> None:
    found = parsed(vm_id=VM.upper(), disks=[{"image_id": IMAGE.upper()}], nics=[{"mac": "52:54:00:AB:CD:EF"}])
    assert (found.vm_id, found.disks[0].image_id, found.nics[0].mac) == (VM, IMAGE, "52:54:00:ab:cd:ef")


def test_a_spec_survives_json() -> None:
    full = parsed(
        name="web-1",
        memory_mib=64,
        vcpus=2,
        machine="pc",
        boot_order=["network", "disk"],
        direct_kernel={"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": "quiet"},
        disks=[
            {"image_id": IMAGE, "bus": "scsi", "boot_order": 2},
            {"image_id": OTHER, "read_only": True, "serial": "x"},
        ],
        nics=[{"model": "e1000"}],
        vnc={},
        agent_channel=False,
        custom_properties={"colour": "red"},
        lease_repo_id="main",
    )
    assert spec.VmSpec.parse(json.loads(json.dumps(full.to_dict()))) == full


def test_the_console_password_is_told_to_nobody() -> None:
    found = parsed(vnc={"password": "secret"})
    assert found.vnc is not None and found.vnc.password == "secret"
    assert "secret" not in json.dumps(found.to_dict())
    assert "secret" not in repr(found)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no uuid": ({"vm_id": "web"}, "vm_id"),
    "unknown field": ({"colour": "red"}, "colour"),
    "unknown field of a disk": ({"disks": [{"image_id": IMAGE, "size": 1}]}, "disks[0].size"),
    "missing field": ({"disks": [{}]}, "disks[0].image_id"),
    "text for a number": ({"memory_mib": "64"}, "memory_mib"),
    "truth for a number": ({"vcpus": True}, "vcpus"),
    "object for a list": ({"disks": {}}, "disks"),
    "text for an object": ({"disks": ["x"]}, "disks[0]"),
    "number as a property": ({"custom_properties": {"a": 1}}, "custom_properties"),
    "property name": ({"custom_properties": {"LD PRELOAD": ""}}, "custom_properties"),
    "name with a slash": ({"name": "../etc"}, "name"),
    "name with a dash first": ({"name": "-x"}, "name"),
    "long name": ({"name": "x" * 65}, "name"),
    "little memory": ({"memory_mib": 15}, "memory_mib"),
    "much memory": ({"memory_mib": (4 << 20) + 1}, "memory_mib"),
    "no cpu": ({"vcpus": 0}, "vcpus"),
    "machine": ({"machine": "microvm"}, "machine"),
    "boot order": ({"boot_order": ["disk", "disk"]}, "boot_order"),
    "boot device": ({"boot_order": ["floppy"]}, "boot_order[0]"),
    "relative kernel": ({"direct_kernel": {"kernel": "boot/vmlinuz"}}, "direct_kernel.kernel"),
    "two-line command line": ({"direct_kernel": {"kernel": "/k", "cmdline": "a\nb"}}, "direct_kernel.cmdline"),
    "image": ({"disks": [{"image_id": "x"}]}, "disks[0].image_id"),
    "same image twice": ({"disks": [{"image_id": IMAGE}, {"image_id": IMAGE.upper()}]}, "disks[1].image_id"),
    "bus": ({"disks": [{"image_id": IMAGE, "bus": "ide"}]}, "disks[0].bus"),
    "serial": ({"disks": [{"image_id": IMAGE, "serial": "a b"}]}, "disks[0].serial"),
    "read-only sata": ({"disks": [{"image_id": IMAGE, "bus": "sata", "read_only": True}]}, "disks[0].read_only"),
    "rank": ({"disks": [{"image_id": IMAGE, "boot_order": 0}]}, "disks[0].boot_order"),
    "same rank": (
        {"disks": [{"image_id": IMAGE, "boot_order": 1}, {"image_id": OTHER, "boot_order": 1}]},
        "disks[0].boot_order",
    ),
    "many disks": ({"disks": [{"image_id": ids.new()} for _ in range(25)]}, "disks"),
    "many nics": ({"nics": [{}] * 9}, "nics"),
    "multicast address": ({"nics": [{"mac": "01:00:00:00:00:00"}]}, "nics[0].mac"),
    "bridge": ({"nics": [{"type": "bridge"}]}, "nics[0].type"),
    "open console": ({"vnc": {"listen": "0.0.0.0"}}, "vnc.listen"),
    "long password": ({"vnc": {"password": "123456789"}}, "vnc.password"),
    "repository": ({"lease_repo_id": "a/b"}, "lease_repo_id"),
    "repository of a disk": ({"disks": [{"image_id": IMAGE, "repo_id": "/"}]}, "disks[0].repo_id"),
    "policy": ({"on_lease_lost": "pause"}, "on_lease_lost"),
}


@pytest.mark.parametrize(("given", "parameter"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_spec_is_refused_by_the_parameters_name(given: dict[str, Any], parameter: str) -> None:
    with pytest.raises(errors.InvalidParameters) as refused:
        parsed(**given)
    assert refused.value.facts["parameter"] == parameter
