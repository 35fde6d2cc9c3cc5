"""A shared LVM group as the root helper serves it: started on this host, its locks in sanlock (`supervdsm/calls`)."""

import errno

from supervdsm import calls
from supervdsm import client as helper_client
from vdsm import errors, roothelper
from vdsm.storage.formats import volumes


class LvmGroup(volumes.Group):
    """A shared LVM group that is started on this host, by the root helper."""

    driver = "host_device"

    def __init__(self, helper: helper_client.Helper, name: str) -> None:
        self._helper = helper
        self._name = name

    def path(self, name: str) -> str:
        return f"/dev/{self._name}/{name}"

    def volumes(self, prefix: str = "") -> dict[str, volumes.Volume]:
        found = roothelper.call(self._helper, calls.ListVolumes(self._name, prefix)).volumes
        return {volume.name: volumes.Volume(volume.size_bytes, volume.active, volume.open) for volume in found}

    def space(self) -> tuple[int, int]:
        found = roothelper.call(self._helper, calls.GetVolumeGroup(self._name))
        return found.size_bytes, found.free_bytes

    def create(self, name: str, size_bytes: int) -> None:
        try:
            roothelper.call(self._helper, calls.CreateVolume(self._name, name, size_bytes))
        except errors.HelperFailed:
            if name in self.volumes(name):
                raise FileExistsError(errno.EEXIST, "the volume exists", name) from None
            self._refuse_full(size_bytes)
            raise

    def extend(self, name: str, size_bytes: int) -> int:
        try:
            return roothelper.call(self._helper, calls.ExtendVolume(self._name, name, size_bytes)).size_bytes
        except errors.HelperFailed:
            self._refuse_full(size_bytes - self.volumes(name)[name].size_bytes)
            raise

    def _refuse_full(self, wanted_bytes: int) -> None:
        """LVM tells in words only; what it had to do then says what they mean."""
        _, free_bytes = self.space()
        if free_bytes < wanted_bytes:
            raise OSError(errno.ENOSPC, "the volume group has no room")

    def activate(self, name: str) -> int:
        try:
            return roothelper.call(self._helper, calls.ActivateVolume(self._name, name)).size_bytes
        except errors.HelperFailed:
            if name not in self.volumes(name):
                raise FileNotFoundError(errno.ENOENT, "no such volume", name) from None
            raise

    def deactivate(self, name: str) -> None:
        roothelper.call(self._helper, calls.DeactivateVolume(self._name, name))

    def remove(self, name: str) -> str:
        return roothelper.call(self._helper, calls.RemoveVolume(self._name, name)).obstacle
