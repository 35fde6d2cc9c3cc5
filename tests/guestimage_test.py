"""The guests that the demo and the tests boot: what is in them, and that half-made ones do not count."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import until
from vdsm import sizes
from vdsm.standalone import ground
from vdsm.tool import guestimage, guestrecipe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="guests are built as root")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def partition(guest: guestimage.GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root file system of the real guest, cut out of its disk."""
    path = tmp_path_factory.mktemp("guest") / "root"
    command = ["dd", f"if={guest.disk_path}", f"of={path}", "bs=1M", "skip=1", "conv=sparse", "status=none"]
    subprocess.run(command, check=True)
    yield path
    path.unlink()


def debugfs(image: Path, command: str) -> str:
    return subprocess.run(
        ["/usr/sbin/debugfs", "-R", command, image], capture_output=True, text=True, check=True
    ).stdout


def qmp(path: Path, *commands: str) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(path))
        with link.makefile("rw") as lines:
            lines.readline()
            for command in ("qmp_capabilities", *commands):
                print(json.dumps({"execute": command}), file=lines, flush=True)
                assert any("return" in json.loads(line) for line in lines)  # events may come before it


@pytest.mark.guest
def test_tiny_guest_greets_and_switches_off_at_the_power_button(cache: Path, tmp_path: Path) -> None:
    tiny = guestimage.build_tiny(cache)
    monitor = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-nodefaults", "-display", "none"]
    command += ["-serial", "stdio", "-qmp", f"unix:{monitor},server=on,wait=off"]
    command += ["-kernel", str(tiny.kernel_path), "-initrd", str(tiny.initrd_path), "-append", "console=ttyS0 quiet"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        try:
            assert any(guestrecipe.TINY_GREETING in line for line in guest.stdout)
            qmp(monitor, "system_powerdown")
            assert guest.wait(30) == 0
        finally:
            guest.kill()


def test_second_build_takes_the_first_ones_files(cache: Path) -> None:
    first = guestimage.build_data_disk(cache)
    made = first.stat().st_mtime_ns
    assert guestimage.build_data_disk(cache) == first
    assert first.stat().st_mtime_ns == made


def test_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from vdsm.tool import guestimage as g; g.build_tiny(Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ground.SOURCE) as building:
        until(lambda: list(tmp_path.glob("new-tiny-*")))
        building.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("tiny-*")) == []
    tiny = guestimage.build_tiny(tmp_path)
    assert tiny.initrd_path.stat().st_size > sizes.MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == [tiny.hash, "tiny.lock"]


def test_data_disk_carries_its_label_and_file(cache: Path) -> None:
    disk = guestimage.build_data_disk(cache)
    assert "DATA" in subprocess.check_output(["/usr/sbin/blkid", "-p", disk], text=True)
    assert debugfs(disk, "cat /planted.txt") == guestrecipe.DATA_FILES["planted.txt"]


@pytest.mark.guest
@pytest.mark.parametrize("name", sorted(guestrecipe.FILES))
def test_guest_carries_the_recipes_files(partition: Path, name: str) -> None:
    assert debugfs(partition, f"cat /{name}") == guestrecipe.FILES[name]


@pytest.mark.guest
def test_guest_has_an_identity_modules_and_the_agent(partition: Path) -> None:
    assert len(debugfs(partition, "cat /etc/machine-id").strip()) == 32
    assert debugfs(partition, "cat /etc/ssh/ssh_host_ed25519_key.pub").startswith("ssh-ed25519 ")
    release = guestimage.installed_kernel().release
    assert "virtio_console.ko" in debugfs(partition, f"ls /lib/modules/{release}/kernel/drivers/char")
    assert "qemu-ga" in debugfs(partition, "ls /usr/sbin")


@pytest.mark.guest
def test_guest_is_small(guest: guestimage.GuestImage) -> None:
    found = guest.disk_path.stat()
    assert found.st_size == sizes.GIB
    assert found.st_blocks * 512 < 600 * sizes.MIB
