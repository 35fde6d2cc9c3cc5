"""The domain XML, checked against libvirt's own schema; that a real libvirt starts it is the launch tests' business."""

import dataclasses
import json
import types
import xml.etree.ElementTree as ET
from typing import Any

import libvirt
import pytest

from vdsm import ids, leases
from vdsm.virt import domxml, spec

GROUND = domxml.Ground("qemu", "/run/launcher", "/usr/bin/qemu", console_log="/run/console/x.log")
QEMU = f"{{{domxml.QEMU_NAMESPACE}}}"


def source(path: str = "/repo/data", kind: str = "qcow2", *backing: dict[str, Any], is_volume: bool = False) -> Any:
    return types.SimpleNamespace(path=path, format=kind, size_bytes=5 << 20, backing=list(backing), is_volume=is_volume)


def metadata(**wanted: Any) -> domxml.Metadata:
    parsed = spec.VmSpec.parse({"vm_id": ids.new(), **wanted})
    held = (leases.Lease("space", "vm", "/repo/vms/vm", 0), leases.Lease("space", "image", "/repo/i", 0, True))
    return domxml.Metadata(parsed, "repo-name", ({"repo": "repo-name", "image_id": "i"},), held, 1700000000.5)


def built(*sources: Any, ground: domxml.Ground = GROUND, plan: Any = None, **wanted: Any) -> ET.Element:
    if len(sources) and "disks" not in wanted:
        wanted["disks"] = [{"image_id": ids.new()} for _ in sources]
    return ET.fromstring(domxml.build(metadata(**wanted), sources, plan, ground))


WHOLE = {
    "smallest": {},
    "everything": {
        "name": "wëb.1",
        "machine": "pc",
        "vcpus": 2,
        "boot_order": ["network", "disk"],
        "nics": [{}, {"model": "e1000", "mac": "52:54:00:00:00:01"}],
        "vnc": {"password": "<&'\">"},
        "custom_properties": {"a": "\u0001]]>"},
    },
    "uefi": {"firmware": "uefi"},
    "direct": {"direct_kernel": {"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": 'a="b" <c>'}},
}


def fits_the_schema(text: str) -> bool:
    """libvirt checks the schema first; what its test driver thinks of the domain after that does not matter."""
    conn = libvirt.open("test:///default")
    try:
        conn.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    except libvirt.libvirtError as error:
        return bool(error.get_error_code() != libvirt.VIR_ERR_XML_INVALID_SCHEMA)
    finally:
        conn.close()
    return True


@pytest.mark.parametrize("wanted", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("domain_type", ["qemu", "kvm"])
def test_libvirts_schema_accepts_it(wanted: dict[str, Any], domain_type: str) -> None:
    disks = [{"image_id": ids.new()}, {"image_id": ids.new(), "bus": "scsi", "read_only": True}]
    ground = dataclasses.replace(GROUND, domain_type=domain_type, kernel="/boot/k", initrd="/boot/i")
    chain = ({"path": "/repo/b1", "format": "qcow2"}, {"path": "/repo/b2", "format": "raw"})
    text = domxml.build(
        metadata(disks=disks, **wanted), [source("/d", "qcow2", *chain), source()], {"leases": []}, ground
    )
    assert fits_the_schema(text)
    assert not fits_the_schema(text.replace("<vcpu>", "<vcpu colour='red'>"))


def found(element: ET.Element, path: str) -> ET.Element:
    """What must be there."""
    (one,) = element.findall(path)
    return one


def test_the_chain_is_explicit_and_ends() -> None:
    """Records rule: libvirt and QEMU must not look into image headers (trap 42)."""
    domain = built(source("/top", "qcow2", {"path": "/mid", "format": "qcow2"}, {"path": "/base", "format": "raw"}))
    disk = domain.find("devices/disk")
    assert disk is not None
    seen = [(found(disk, "source").get("file"), found(disk, "driver").get("type"))]
    link = disk.find("backingStore")
    while link is not None and len(link):
        seen.append((found(link, "source").get("file"), found(link, "format").get("type")))
        link = link.find("backingStore")
    assert seen == [("/top", "qcow2"), ("/mid", "qcow2"), ("/base", "raw")]
    assert link is not None, "without an empty backingStore libvirt probes the last image"


def test_a_disk_without_a_chain_ends_at_once() -> None:
    link = built(source()).find("devices/disk/backingStore")
    assert link is not None and len(link) == 0


def test_volumes_are_block_devices_and_a_raw_one_ends_where_its_image_does() -> None:
    below = {"path": "/dev/vg/below", "format": "raw", "size_bytes": 3 << 20}
    disk = built(source("/dev/vg/top", "qcow2", below, is_volume=True)).find("devices/disk")
    assert disk is not None and disk.get("type") == "block"
    assert disk.find("source[@dev='/dev/vg/top']") is not None and disk.find("source/slices") is None
    link = disk.find("backingStore[@type='block']")
    assert link is not None and link.find("source[@dev='/dev/vg/below']") is not None
    found = link.find("source/slices/slice")
    assert found is not None and found.attrib == {"type": "storage", "offset": "0", "size": str(3 << 20)}


def test_disks_bypass_the_page_cache() -> None:
    driver = built(source("/d", "raw")).find("devices/disk/driver")
    assert driver is not None
    assert (driver.get("type"), driver.get("cache"), driver.get("io")) == ("raw", "none", "native")


def test_libvirt_leaves_the_owners_of_images_and_kernels_alone() -> None:
    """By default it gives each file to QEMU's user, and afterwards to root (seen on a disk)."""
    label = built(source()).find("seclabel")
    assert label is not None and label.attrib == {"type": "none", "model": "dac"}


def test_targets_are_named_by_bus() -> None:
    disks = [{"image_id": ids.new(), "bus": bus} for bus in ("virtio", "sata", "virtio", "scsi")]
    assert domxml.targets(metadata(disks=disks).spec) == ["vda", "sda", "vdb", "sdb"]


def orders(domain: ET.Element, device: str) -> list[str | None]:
    boots = [one.find("boot") for one in domain.findall(device)]
    return [None if boot is None else boot.get("order") for boot in boots]


def test_disks_boot_by_rank_then_by_position() -> None:
    disks = [
        {"image_id": ids.new()},
        {"image_id": ids.new(), "boot_order": 2},
        {"image_id": ids.new(), "boot_order": 1},
    ]
    domain = built(source(), source(), source(), disks=disks, nics=[{}])
    assert (orders(domain, "devices/disk"), orders(domain, "devices/interface")) == (["3", "2", "1"], [None])


def test_the_network_boots_first_when_the_spec_says_so() -> None:
    domain = built(source(), nics=[{}], boot_order=["network", "disk"])
    assert (orders(domain, "devices/disk"), orders(domain, "devices/interface")) == (["2"], ["1"])


def test_a_direct_kernel_leaves_no_boot_order_and_takes_the_resolved_paths() -> None:
    ground = dataclasses.replace(GROUND, kernel="/boot/real", initrd="/boot/ramdisk")
    domain = built(source(), direct_kernel={"kernel": "/boot/link", "initrd": "/boot/link2"}, ground=ground)
    assert [domain.findtext(f"os/{name}") for name in ("kernel", "initrd")] == ["/boot/real", "/boot/ramdisk"]
    assert orders(domain, "devices/disk") == [None]


def test_mac_addresses_stay_the_same_from_start_to_start() -> None:
    first = metadata(nics=[{}, {}]).spec
    assert domxml.macs(first) == domxml.macs(spec.VmSpec.parse(first.to_dict()))
    assert len(set(domxml.macs(first))) == 2
    assert domxml.macs(first) != domxml.macs(metadata(nics=[{}, {}]).spec)


def test_the_launcher_gets_its_plan_and_the_real_emulator() -> None:
    domain = built(plan={"leases": [["a", "b", "/c", 0, False]]})
    orders_given = {env.get("name"): env.get("value") for env in domain.findall(f"{QEMU}commandline/{QEMU}env")}
    assert domain.findtext("devices/emulator") == "/run/launcher"
    assert orders_given["VDSM_QEMU"] == "/usr/bin/qemu"
    assert json.loads(orders_given["VDSM_LEASE_PLAN"] or "") == {"leases": [["a", "b", "/c", 0, False]]}


def test_without_leases_the_launcher_has_nothing_to_take() -> None:
    assert [env.get("name") for env in built().iter(f"{QEMU}env")] == ["VDSM_QEMU"]


def test_the_metadata_comes_back_as_it_was() -> None:
    known = metadata(name="a", vnc={})
    element = ET.fromstring(domxml.build(known, [], None, GROUND)).find(f"metadata/{{{domxml.NAMESPACE}}}vm")
    assert element is not None
    # libvirt hands the element on without its prefix
    assert domxml.parse_metadata(f"<vm>{element.text}</vm>") == known
    launched = dataclasses.replace(known, launched=True)
    assert domxml.parse_metadata(domxml.metadata_xml(launched)) == launched


@pytest.mark.parametrize("text", ["", "<vm/>", "<vm>1</vm>", "<vm>{}</vm>", '<vm>{"version": 2}</vm>', "not xml"])
def test_strange_metadata_is_not_ours(text: str) -> None:
    with pytest.raises(ValueError):
        domxml.parse_metadata(text)


def test_the_same_vm_gives_the_same_text() -> None:
    known = metadata(nics=[{}])
    assert domxml.build(known, [], {"a": 1}, GROUND) == domxml.build(known, [], {"a": 1}, GROUND)


def test_live_facts_are_read_from_the_running_domains_xml() -> None:
    text = """<domain><devices><graphics type='vnc' port='5901'/><channel type='unix'>
        <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel></devices></domain>"""
    assert domxml.parse_live(text) == domxml.Live(agent_connected=True, vnc_port=5901, xml=text)
    assert domxml.parse_live("<domain/>") == domxml.Live(agent_connected=False, vnc_port=None, xml="<domain/>")
