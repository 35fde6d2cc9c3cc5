"""A shared LUN as one host sees it, and what can go wrong with it there.

Users of a LUN take `path`, a device of the device mapper over the raw disk. A fault is another table of that device,
put under its users while they run, and concerns this host alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.lab import host

SECTOR_BYTES = 512
MIB = 1 << 20


class Lun:
    """LUN `index` in one host."""

    def __init__(self, owner: host.Host, index: int) -> None:
        self.index = index
        self.name = f"lun{index}"
        self.path = f"/dev/mapper/{self.name}"
        self.owner = owner
        self._disk = f"/dev/ubd{chr(ord('a') + index)}"
        self._faulty = False

    def cut(self) -> None:
        """Every read and write fails with EIO."""
        self._switch("error")

    def hang(self) -> None:
        """Reads and writes wait until `heal`; who waits cannot even be killed."""
        self._faulty = True
        self._dmsetup("suspend", "--noflush", "--nolockfs", self.name)

    def delay(self, delay_ms: int) -> None:
        """Every read and write takes so much longer."""
        self._module("dm-delay")
        self._switch(f"delay {self._disk} 0 {delay_ms}")

    def flake(self, up_s: int, down_s: int) -> None:
        """Sound for `up_s`, failing with EIO for `down_s`, in turn."""
        self._module("dm-flakey")
        self._switch(f"flakey {self._disk} 0 {up_s} {down_s}")

    def dust(self, *sectors: int) -> None:
        """Reading these sectors fails with EIO, until they are written."""
        self._module("dm-dust")
        self._switch(f"dust {self._disk} 0 {SECTOR_BYTES}")
        for sector in sectors:
            self._dmsetup("message", self.name, "0", "addbadblock", str(sector))
        self._dmsetup("message", self.name, "0", "enable")

    def shrink(self, size_mib: int) -> None:
        """Only its first part is there, until `heal`."""
        self._switch(f"linear {self._disk} 0", size_mib * MIB // SECTOR_BYTES)

    def heal(self) -> None:
        """Sound and whole again; nothing when it is."""
        if self._faulty:
            self._switch(f"linear {self._disk} 0")
            self._faulty = False

    def forget(self) -> None:
        """The host has been booted: its LUNs are sound."""
        self._faulty = False

    def _switch(self, target: str, sectors: int | None = None) -> None:
        """`noflush`: what hangs under the old table goes on under the new one."""
        self._faulty = True
        if sectors is None:
            sectors = int(self.owner.run(["blockdev", "--getsz", self._disk]).out)
        self._dmsetup("load", self.name, "--table", f"0 {sectors} {target}")
        self._dmsetup("suspend", "--noflush", "--nolockfs", self.name)
        self._dmsetup("resume", self.name)

    def _module(self, name: str) -> None:
        self.owner.run(["modprobe", name])

    def _dmsetup(self, *arguments: str) -> None:
        self.owner.run(["dmsetup", *arguments], environment={"DM_DISABLE_UDEV": "1"})
