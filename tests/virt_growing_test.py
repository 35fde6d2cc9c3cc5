"""Disks whose volumes begin small, with real guests on loop devices: they grow while they are written, a VM that finds
no room stands still and goes on, and no byte is lost."""

import contextlib
import dataclasses
import gzip
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervdsm import client as helper_client
from tests import file_volumes, loop_volumes, sanlock_fixture, virt_ground
from tests.until import until
from vdsm import events, forkserver, leases, storage
from vdsm.jobs import pool, registry
from vdsm.storage import formats
from vdsm.tool import guestimage

ground = virt_ground.ground
MIB = 1 << 20
CHUNK = file_volumes.CHUNK_BYTES
REPO = "loops"
DISK = 256 * MIB
BLOCK = 32 << 10  # what the guest writes at once
FIRST = MIB  # where it begins


def writer(end_bytes: int) -> bytes:
    """A boot sector that writes its disk from 1 MiB on, block after block, each beginning with the number of its first
    sector, and says D on the serial port when it is done. Errors are tried again; it sees none while QEMU stops it."""
    start = bytes.fromhex("31c0 8ed8 8ed0 bc007c")  # xor ax,ax; mov ds,ax; mov ss,ax; mov sp,7c00h

    def code(packet: int, back_on_error: int, back: int) -> bytes:
        sector = struct.pack("<H", packet + 8)
        return (
            b"\x66\xa1" + sector + bytes.fromhex("66a30080")  # mov eax,[sector]; mov [8000h],eax
            + b"\xbe" + struct.pack("<H", packet) + bytes.fromhex("b280 b80043 cd13")  # mov si,packet; dl,80h; write
            + b"\x72" + struct.pack("b", back_on_error)  # jc
            + b"\x66\x83\x06" + sector + bytes([BLOCK // 512])  # add dword [sector],64
            + b"\x66\x81\x3e" + sector + struct.pack("<I", end_bytes // 512)  # cmp dword [sector],end
            + b"\x72" + struct.pack("b", back)  # jb
            + bytes.fromhex("baf803 b044 ee f4 ebfd")  # mov dx,3f8h; mov al,'D'; out; hlt
        )  # fmt: skip

    to_error, to_jump = 4 + 4 + 3 + 2 + 3 + 2 + 2, 4 + 4 + 3 + 2 + 3 + 2 + 2 + 6 + 9 + 2
    packet = 0x7C00 + len(start) + len(code(0, 0, 0))
    whole = start + code(packet, -to_error, -to_jump)
    return virt_ground.boot_sector(whole + struct.pack("<BBHHHQ", 16, 0, BLOCK // 512, 0x8000, 0, FIRST // 512))


# The first process of a guest that writes as fast as it can.
FAST_BYTES = 200 * MIB
FAST = f"""\
#!/bin/sh
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
while read -r module; do insmod "/modules/$module"; done </modules/order
head -c 8388608 /dev/zero | tr '\\0' x >/x
for at in $(seq 0 {FAST_BYTES // (8 * MIB) - 1}); do
    dd if=/x of=/dev/vda bs=1M seek=$((at * 8)) oflag=direct conv=notrunc 2>/dev/null || echo a write failed
done
sync
echo all is written
while :; do sleep 3600; done
"""


def fast_guest(boot_dir: Path, scratch: Path) -> dict[str, str]:
    """directKernel of a guest that runs `FAST`: the tiny guest, with another first process behind its ramdisk."""
    tiny = guestimage.build_tiny(guestimage.default_cache())
    (scratch / "fast").write_text(FAST)
    (scratch / "fast").chmod(0o755)
    packed = subprocess.run(
        ["cpio", "--create", "--format=newc", "--quiet", "-D", scratch],
        input=b"fast\n",
        check=True,
        capture_output=True,
    ).stdout
    shutil.copyfile(tiny.kernel_path, boot_dir / "fast-kernel")
    (boot_dir / "fast-initrd").write_bytes(tiny.initrd_path.read_bytes() + gzip.compress(packed))
    cmdline = "console=ttyS0 quiet rdinit=/fast"
    return {"kernel": f"{boot_dir}/fast-kernel", "initrd": f"{boot_dir}/fast-initrd", "cmdline": cmdline}


class Host(virt_ground.Host):
    """An agent with real storage, whose one repository is on loop devices."""

    def __init__(self, ground: virt_ground.Ground, place: Path) -> None:
        super().__init__(ground, ground.settings)
        self.place = place
        self.server = forkserver.ForkServer(["vdsm.jobs.worker", *storage.preload(), loop_volumes.__name__], "WARNING")
        allowed = dataclasses.replace(self.settings.sanlock, unsafe_no_watchdog=True)
        self.settings = dataclasses.replace(self.settings, sanlock=allowed)
        log = events.EventLog()
        self.pool = pool.Pool(self.server, workers=1, lease_wait_s=2.0)
        helper = helper_client.Helper(str(place / "no helper"))
        jobs = registry.Registry(self.pool, log)
        self.storage: Any = storage.Storage(self.settings, log, self.server, jobs, helper)

    def connect(self) -> None:
        self.storage.connect_storage_repository(REPO, loop_volumes.FORMAT, {"path": str(self.place)})
        until(lambda: self.storage.list_storage_repositories()[0]["state"] == "joined")

    @contextlib.contextmanager
    def running(self) -> Iterator["Host"]:
        self.storage.start()
        self.pool.start()
        self.connect()
        self.start()
        try:
            yield self
        finally:
            for known in self.machines.list():
                self.machines.destroy(known["vm_id"])
            self.stop()
            self.group.sweep_all()
            assert self.pool.stop(10)
            self.storage.stop()
            self.server.stop()

    @property
    def group(self) -> "Group":
        return Group(self.place)

    # -- disks

    def disk(self, boot: bytes = b"") -> str:
        image_id = str(self.storage.create_virtual_disk(REPO, DISK)["image_id"])
        if boot:
            sector = self.place / "sector"
            sector.write_bytes(boot)
            self.group.qemu_io(self.volume(image_id), f"write -s {sector} 0 512")
        return image_id

    def volume(self, image_id: str) -> str:
        (name,) = [name for name in self.group.sizes() if name.startswith(image_id)]
        return name

    def room(self, image_id: str) -> int:
        return self.group.sizes()[self.volume(image_id)]

    # -- VMs

    def told(self, change: str) -> list[dict[str, Any]]:
        return [event.params for event in self.seen if event.topic == "vm" and event.params["change"] == change]

    def says(self, vm_id: str) -> str:
        """What the guest has written to its console."""
        return Path(self.info(vm_id)["console_log"]).read_text(errors="replace")

    def is_done(self, vm_id: str) -> bool:
        return "D" in self.says(vm_id)

    def write(self, vm_id: str, offset: int, length: int, pattern: int) -> None:
        """What the guest would do, by QEMU."""
        command = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P {pattern} {offset} {length}"'
        said = self.ground.virsh("qemu-monitor-command", vm_id, "--hmp", command)
        assert said == "", said  # what it says else is in QEMU's log

    def threshold(self, vm_id: str) -> int:
        """0: none is set."""
        said = self.ground.virsh("domstats", vm_id, "--block")
        found = [line.split("=")[1] for line in said.splitlines() if "block.0.threshold=" in line]
        return int(found[0]) if found else 0


class Group:
    """The volumes, from outside."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.group = loop_volumes.LoopGroup(str(place), 1)

    def sizes(self) -> dict[str, int]:
        return {name: volume.size_bytes for name, volume in self.group.volumes().items()}

    def qemu_io(self, name: str, *commands: str) -> str:
        path = self.place / "volumes" / name
        words = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True, text=True)
        assert "failed" not in done.stdout, done.stdout
        return done.stdout

    def limit(self, free_bytes: int) -> None:
        """No more than that is free from here on."""
        total, free = self.group.space()
        (self.place / "size").write_text(str(total - free + free_bytes))

    def unlimit(self) -> None:
        (self.place / "size").unlink(missing_ok=True)

    def sweep_all(self) -> None:
        self.unlimit()
        for name in self.group.volumes():
            if name != "vdsm":
                until(lambda name=name: self.group.remove(name) == "")


def shown(host: Host, image_id: str, end_bytes: int) -> list[int]:
    """The numbers that the guest's blocks begin with."""
    raw = host.place / "shown.raw"
    path = host.place / "volumes" / host.volume(image_id)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    with raw.open("rb") as file:
        found = []
        for offset in range(FIRST, end_bytes, BLOCK):
            file.seek(offset)
            found += struct.unpack("<I", file.read(4))
    raw.unlink()
    return found


def written(end_bytes: int) -> list[int]:
    return [offset // 512 for offset in range(FIRST, end_bytes, BLOCK)]


@pytest.fixture(scope="module")
def place(ground: virt_ground.Ground) -> Iterator[Path]:
    """A repository on loop devices, whose lockspace this host has joined."""
    try:
        loop_volumes.losetup("--find")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    where = ground.stack.storage_dir / "loops"
    where.mkdir()
    os.chown(where, -1, ground.storage.gid)
    where.chmod(0o2770)
    own = {**file_volumes.describe(where, REPO), "format": loop_volumes.FORMAT}
    repo = formats.open(own)
    repo.format_(sanlock_fixture.IO_TIMEOUT_S)
    leases.join(repo.lockspace(), sanlock_fixture.IO_TIMEOUT_S)
    until(lambda: leases.state(repo.lockspace()) == "joined")
    yield where
    leases.leave(repo.lockspace())


@pytest.fixture
def host(ground: virt_ground.Ground, place: Path) -> Iterator[Host]:
    sanlock_fixture.use(Path(ground.settings.sanlock.run_dir))
    with Host(ground, place).running() as running:
        yield running


def test_disk_grows_before_it_is_full(host: Host) -> None:
    disk = host.disk()
    vm_id = host.started(disks=host.disks(disk))
    until(lambda: host.threshold(vm_id) == CHUNK // 2)
    for step in range(5):
        host.write(vm_id, step * 8 * MIB, 8 * MIB, step + 1)
        until(lambda end=(step + 1) * 8 * MIB: host.threshold(vm_id) > end)
        assert host.room(disk) == host.threshold(vm_id) + CHUNK // 2 >= (step + 1) * 8 * MIB + CHUNK // 2
    assert host.told("disk") == [] and host.moves(vm_id)[-1] == "Up"
    host.machines.destroy(vm_id)
    host.group.qemu_io(host.volume(disk), *(f"read -P {step + 1} {step * 8 * MIB} {8 * MIB}" for step in range(5)))


def test_guest_that_writes_without_a_pause_loses_nothing(host: Host) -> None:
    end = 32 * MIB
    disk = host.disk(writer(end))
    vm_id = host.started(disks=host.disks(disk))
    until(lambda: host.is_done(vm_id), 60)
    assert host.info(vm_id)["status"] == "Up" and end < host.room(disk) <= end + 3 * CHUNK
    host.machines.destroy(vm_id)
    assert shown(host, disk, end) == written(end)


def test_guest_that_may_be_faster_than_its_disk_grows_loses_nothing(host: Host, tmp_path: Path) -> None:
    disk = host.disk()
    kernel = fast_guest(host.ground.stack.place.boot, tmp_path)
    vm_id = host.started(disks=host.disks(disk), direct_kernel=kernel, memory_mib=192)
    until(lambda: "all is written" in host.says(vm_id), 100)
    assert "failed" not in host.says(vm_id) and host.told("disk") == []
    until(lambda: host.info(vm_id)["status"] == "Up")
    host.machines.destroy(vm_id)
    host.group.qemu_io(host.volume(disk), f"read -P {ord('x')} 0 {FAST_BYTES}")


def test_vm_in_a_full_group_stands_still_and_goes_on_when_it_grew(host: Host) -> None:
    end = 24 * MIB
    disk = host.disk(writer(end))
    host.group.limit(CHUNK // 2)
    vm_id = host.started(disks=host.disks(disk))
    info = host.wait(vm_id, "Paused")
    until(lambda: "has no space" in host.info(vm_id)["reason"])
    info = host.info(vm_id)
    assert info["pause_code"] == "ENOSPC" and info["reason"].startswith("disk vda cannot grow: ")
    told = host.told("disk")
    assert {(one["disk"], one["image_id"], one["error"]["data"]["key"]) for one in told} == {
        ("vda", disk, "repository_full")
    }
    assert {"status": "Paused", "reason": "disk vda failed: enospc"}.items() <= host.told("state")[-1].items()
    host.group.unlimit()
    until(lambda: host.is_done(vm_id), 60)
    info = host.info(vm_id)
    assert (info["status"], info["pause_code"]) == ("Up", None)
    assert "disk vda has room again" in [one["reason"] for one in host.told("state")]
    host.machines.destroy(vm_id)
    assert shown(host, disk, end) == written(end)


def test_new_agent_sets_the_threshold_anew(host: Host) -> None:
    disk = host.disk()
    vm_id = host.started(disks=host.disks(disk))
    until(lambda: host.threshold(vm_id) == CHUNK // 2)
    host.stop()
    host.write(vm_id, 0, 12 * MIB, 9)
    assert host.threshold(vm_id) == 0 and host.room(disk) == CHUNK
    host.start()
    until(lambda: host.threshold(vm_id) > 12 * MIB)
    assert host.room(disk) > 12 * MIB + CHUNK // 2


def test_vm_that_stood_still_goes_on_under_a_new_agent(host: Host) -> None:
    end = 24 * MIB
    disk = host.disk(writer(end))
    host.group.limit(CHUNK // 2)
    vm_id = host.started(disks=host.disks(disk))
    host.wait(vm_id, "Paused")
    host.stop()
    host.group.unlimit()
    host.start()
    until(lambda: host.is_done(vm_id), 60)
    host.machines.destroy(vm_id)
    assert shown(host, disk, end) == written(end)


def test_vm_that_stood_still_goes_on_under_a_new_libvirtd(host: Host) -> None:
    end = 24 * MIB
    disk = host.disk(writer(end))
    host.group.limit(CHUNK // 2)
    vm_id = host.started(disks=host.disks(disk))
    host.wait(vm_id, "Paused")
    host.ground.stop_libvirtd()
    host.wait(vm_id, "Unknown")
    host.group.unlimit()
    host.ground.start_libvirtd()
    until(lambda: host.is_done(vm_id), 60)
    until(lambda: host.info(vm_id)["status"] == "Up")
    host.machines.destroy(vm_id)
    assert shown(host, disk, end) == written(end)


def test_sample_finds_what_no_event_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = host.disk()
    vm_id = host.started(disks=host.disks(disk))
    until(lambda: host.threshold(vm_id) == CHUNK // 2)
    with monkeypatch.context() as deaf:  # as when libvirtd is restarted at that moment
        deaf.setattr(host.machines._growth, "want", lambda *_: None)
        host.write(vm_id, 0, 12 * MIB, 9)
        until(lambda: host.threshold(vm_id) == 0)
    host.machines._sampler.sample()
    until(lambda: host.threshold(vm_id) > 12 * MIB)
    assert host.room(disk) > 12 * MIB + CHUNK // 2


def test_vm_that_was_paused_on_request_stays_so(host: Host) -> None:
    disk = host.disk()
    vm_id = host.started(disks=host.disks(disk))
    until(lambda: host.threshold(vm_id) == CHUNK // 2)
    host.machines.pause(vm_id)
    host.write(vm_id, 0, 12 * MIB, 9)
    until(lambda: host.threshold(vm_id) > 12 * MIB)
    assert host.info(vm_id)["status"] == "Paused"
    host.machines.cont(vm_id)
