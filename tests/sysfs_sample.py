"""A /sys of block devices, made in a directory as the kernel would: for disks that test machines do not have.

The values are those of a host with an iSCSI LUN over two paths and a volume group on it, a Fibre Channel LUN, an NVMe
disk, and a loop device.
"""

from pathlib import Path

PAGE_80 = b"\x00\x80\x00\x10" + b"1ab0000000000001"
WWID = "naa.60014051ab0000000000001000000000"


class Tree:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.sys = root / "sys"
        (self.sys / "block").mkdir(parents=True)
        (root / "proc" / "self").mkdir(parents=True)
        self.mount({"254:0": "/"})

    def mount(self, places: dict[str, str]) -> None:
        lines = [f"22 1 {number} / {path} rw - ext4 /dev/x rw\n" for number, path in places.items()]
        (self.root / "proc" / "self" / "mountinfo").write_text("".join(lines))

    def write(self, path: str, content: str | bytes) -> None:
        file = self.sys / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def disk(self, name: str, number: str, sectors: int, block: int = 512, **files: str) -> None:
        self.write(f"block/{name}/dev", f"{number}\n")
        self.write(f"block/{name}/size", f"{sectors}\n")
        self.write(f"block/{name}/ro", "0\n")
        for file in ("logical_block_size", "physical_block_size"):
            self.write(f"block/{name}/queue/{file}", f"{block}\n")
        for side in ("holders", "slaves"):
            (self.sys / "block" / name / side).mkdir(exist_ok=True)
        for file, content in files.items():
            self.write(f"block/{name}/{file.replace('__', '/')}", f"{content}\n")

    def stack(self, upper: str, *lower: str) -> None:
        for name in lower:
            (self.sys / "block" / name / "holders" / upper).symlink_to(f"../../{upper}")
            (self.sys / "block" / upper / "slaves" / name).symlink_to(f"../../{name}")

    def scsi(self, name: str, address: str, parent: str, wwid: str = WWID, state: str = "running") -> None:
        """Makes the disk a SCSI one, below `parent` (a session, a remote port)."""
        device = f"devices/{parent}/target{address.rpartition(':')[0]}/{address}"
        for file, text in {"vendor": "LIO-ORG ", "model": "IBLOCK          ", "rev": "4.0 "}.items():
            self.write(f"{device}/{file}", f"{text}\n")
        self.write(f"{device}/state", f"{state}\n")
        self.write(f"{device}/wwid", f"{wwid}\n")
        self.write(f"{device}/vpd_pg80", PAGE_80)
        (self.sys / device / "scsi_device" / address).mkdir(parents=True)
        (self.sys / "block" / name / "device").symlink_to(self.sys / device)

    def session(self, number: int, host: int, address: str, replacement_s: int = 5, state: str = "LOGGED_IN") -> None:
        device = f"devices/platform/host{host}/session{number}/iscsi_session/session{number}"
        files = {"targetname": "iqn.2026-01.test:target", "tpgt": "1", "state": state, "initiatorname": "(null)"}
        for file, text in (files | {"recovery_tmo": str(replacement_s)}).items():
            self.write(f"{device}/{file}", f"{text}\n")
        sessions = self.sys / "class" / "iscsi_session"
        sessions.mkdir(parents=True, exist_ok=True)
        (sessions / f"session{number}").symlink_to(self.sys / device)
        connection = f"class/iscsi_connection/connection{number}:0"
        files = {"persistent_address": address, "persistent_port": "3260", "recv_tmo": "5", "ping_tmo": "5"}
        for file, text in files.items():
            self.write(f"{connection}/{file}", f"{text}\n")


def host(root: Path) -> Tree:
    """The whole host; disks are named in the tests."""
    tree = Tree(root)
    for number, (name, session) in enumerate({"sda": 2, "sdb": 3}.items()):
        tree.disk(name, f"8:{16 * number}", 524288)
        tree.scsi(name, f"{number}:0:0:7", f"platform/host{number}/session{session}")
        tree.session(session, number, f"10.66.{number + 1}.1")
    tree.disk("dm-0", "254:0", 524288, dm__name="36001", dm__uuid=f"mpath-3{WWID.removeprefix('naa.')}")
    tree.stack("dm-0", "sda", "sdb")
    tree.disk("dm-1", "254:1", 2048, dm__name="shelf-board", dm__uuid="LVM-abc")
    tree.stack("dm-1", "dm-0")
    tree.disk("sdc", "8:32", 2097152, block=4096)
    tree.scsi("sdc", "5:0:0:1", "pci0000:00/host5/rport-5:0-1", wwid="naa.500a0b8000000001")
    tree.disk("nvme0n1", "259:0", 4096, wwid="eui.0025385b", device__model="Disk", device__serial="S1", device__x="")
    tree.write("block/nvme0n1/nvme0n1p1/partition", "1\n")
    tree.write("block/nvme0n1/nvme0n1p1/dev", "259:1\n")
    tree.disk("loop0", "7:0", 2048)
    return tree
