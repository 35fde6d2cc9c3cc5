"""As `file_volumes.py`, with loop devices: a volume has an end, behind which nobody writes, and QEMU is told ENOSPC.

Imported in the fork server of tests. The volume of the slots stays a file.
"""

import grp
import os
import subprocess
from pathlib import Path
from typing import Any

from tests import file_volumes
from vdsm import config
from vdsm.storage import formats, repository
from vdsm.storage.formats import blocklayout, volumes

FORMAT = "loops-0"


class LoopGroup(file_volumes.FileGroup):
    driver = "host_device"

    def volumes(self, prefix: str = "") -> dict[str, volumes.Volume]:
        found = super().volumes(prefix)
        return {name: volume._replace(open=volume.active and self._is_open(name)) for name, volume in found.items()}

    def create(self, name: str, size_bytes: int) -> None:
        super().create(name, size_bytes)
        (self._place / "volumes" / name).chmod(0o660)  # sanlock and QEMU have their own users

    def activate(self, name: str) -> int:
        link = self._active / name
        if name == blocklayout.SLOTS_VOLUME:
            return super().activate(name)
        if not link.is_symlink():
            device = losetup("--find", "--show", str(self._place / "volumes" / name))
            os.chown(device, -1, grp.getgrnam("kvm").gr_gid)
            Path(device).chmod(0o660)
            link.symlink_to(device)
        return super().activate(name)

    def extend(self, name: str, size_bytes: int) -> int:
        size_bytes = super().extend(name, size_bytes)
        if name != blocklayout.SLOTS_VOLUME:
            losetup("--set-capacity", self._device(name))
        return size_bytes

    def deactivate(self, name: str) -> None:
        link = self._active / name
        if name != blocklayout.SLOTS_VOLUME and link.is_symlink():
            if self._is_open(name):
                return
            losetup("--detach", self._device(name))
        super().deactivate(name)

    def remove(self, name: str) -> str:
        self.deactivate(name)
        return "in use" if (self._active / name).is_symlink() else super().remove(name)

    def _is_open(self, name: str) -> bool:
        device = self._device(name)
        return any(_leads_to(fd, device) for fd in Path("/proc").glob("[0-9]*/fd/*"))

    def _device(self, name: str) -> str:
        return str((self._active / name).readlink())


def _leads_to(link: Path, path: str) -> bool:
    try:
        return str(link.readlink()) == path
    except OSError:
        return False  # closed meanwhile


def losetup(*words: str) -> str:
    done = subprocess.run(["losetup", *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class LoopBlocks(file_volumes.FileBlocks):
    format = FORMAT

    def __init__(self, description: repository.Description) -> None:
        group = LoopGroup(description["place"], description["host_id"])
        blocklayout.BlockLayout.__init__(self, description, group)

    @classmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> repository.Description:
        return super().describe(parameters, storage)


formats._FORMATS[FORMAT] = LoopBlocks
