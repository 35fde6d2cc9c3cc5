"""A volume that grows under a QEMU that writes it: QEMU need not be told, and no write that found no room is lost."""

from collections.abc import Iterator

import pytest

from supervdsm import calls
from tests import lab
from tests.lab import groups
from tests.lab.waiting import until

MIB = 1 << 20
NAME = "thin"
pytestmark = pytest.mark.timeout(420)


class Writer:
    """A qemu-io of the host that has a fresh qcow2 of 1 GiB open on the volume, past the page cache."""

    def __init__(self, host: lab.Host, path: str) -> None:
        self.host = host
        # The shell keeps a descriptor of the pipe, so that qemu-io reads on after each command.
        host.sh(
            f"qemu-img create -q -f qcow2 {path} 1G; rm -f /run/asked /run/said; mkfifo /run/asked;"
            f" (exec 8<>/run/asked; exec qemu-io -f qcow2 -t none {path} <&8 >/run/said 2>&1) &"
        )

    def said(self) -> str:
        return self.host.run(["cat", "/run/said"]).out

    def does(self, command: str) -> str:
        """What qemu-io says about it."""
        before = len(self.said())
        self.host.sh(f"echo '{command}' > /run/asked")
        until(lambda: " ops; " in self.said()[before:] or "failed" in self.said()[before:], 60)
        return self.said()[before:]

    def end(self) -> None:
        self.host.sh("echo quit > /run/asked")
        until(lambda: not self.host.run(["pgrep", "-x", "qemu-io"], check=False).out, 60)


@pytest.fixture
def volume(one: lab.Host) -> Iterator[str]:
    """The path of a volume of 64 MiB."""
    groups.make(one, groups.NAME, [one.luns[groups.LOCKS], one.luns[groups.DATA]])
    groups.call(one, calls.CreateVolume(groups.NAME, NAME, 64 * MIB))
    yield groups.call(one, calls.ActivateVolume(groups.NAME, NAME)).path
    groups.remove_volumes(one, groups.NAME)


def test_qemu_writes_on_in_a_volume_that_grew_under_it(one: lab.Host, volume: str) -> None:
    writer = Writer(one, volume)
    assert "wrote" in writer.does(f"write -P 1 0 {40 * MIB}")
    assert "No space left on device" in writer.does(f"write -P 2 {40 * MIB} {40 * MIB}")
    assert groups.call(one, calls.ExtendVolume(groups.NAME, NAME, 128 * MIB)).size_bytes == 128 * MIB
    assert "wrote" in writer.does(f"write -P 2 {40 * MIB} {40 * MIB}")
    writer.end()
    shown = one.run(["qemu-io", "-f", "qcow2", "-c", f"read -P 1 0 {40 * MIB}", "-c",
                     f"read -P 2 {40 * MIB} {40 * MIB}", volume]).out  # fmt: skip
    assert shown.count("read 41943040/41943040") == 2 and "failed" not in shown
