"""clvm-1.2: a shared LVM volume group, for all hosts that see its disks.

connectionParameters: {"vg": name}. Formatting takes "devices" too, stable names of whole disks of which the group is
made first, and "overwrite", those of them that may hold something; without them the group is there, and empty.

LVM serialises its metadata by locks in sanlock (`lvmlockd`), so any host makes, grows and removes volumes. A group is
started on a host before anything of it is seen, and stopped when its last repository id goes.
"""

from typing import Any

from supervdsm import calls, contract
from supervdsm import client as helper_client
from vdsm import config, errors, logs, roothelper, sizes
from vdsm.storage import repository
from vdsm.storage.formats import blocklayout, lvmgroup

_log = logs.get("storage.clvm")

_PARAMETERS: dict[str, Any] = {"vg": "", "devices": [], "overwrite": []}


class Clvm(blocklayout.BlockLayout):
    format = "clvm-1.2"

    def __init__(self, description: repository.Description) -> None:
        helper = helper_client.Helper(description["helper"])
        super().__init__(description, lvmgroup.LvmGroup(helper, description["vg"]))

    @classmethod
    def describe(cls, parameters: dict[str, Any], storage: config.Storage) -> repository.Description:
        """See `Repository.describe`. Names are what the root helper takes, which decides about the disks, too."""
        group, devices, overwrite = (parameters.get(name, default) for name, default in _PARAMETERS.items())
        if parameters.keys() - _PARAMETERS.keys():
            raise _bad("clvm takes vg, and for a new group devices and overwrite")
        try:
            calls.ExtendVolumeGroup(group, devices, overwrite)
        except contract.Refused as error:
            raise _bad(error.reason) from error
        use_dir = f"{storage.volume_use_dir}/{group}"
        own = {"use_dir": use_dir, "chunk_bytes": storage.volume_chunk_mib * sizes.MIB}
        return {"place": f"/dev/{group}", "vg": group, "devices": devices, "overwrite": overwrite, **own}

    @classmethod
    def bring_up(
        cls, helper: helper_client.Helper, description: repository.Description, *, new: bool
    ) -> repository.Description:
        """The group is made, if its disks are named, and started; the volume with the slots is active."""
        group, host_id = description["vg"], description["host_id"]
        if new and description["devices"]:
            made = calls.MakeVolumeGroup(group, description["devices"], description["overwrite"], host_id)
            roothelper.call(helper, made)
        roothelper.call(helper, calls.StartVolumeGroup(group, host_id, []))
        global_locks = roothelper.call(helper, calls.GetLockManager()).global_locks
        if len(global_locks) > 1:
            _log.warning("%s both have LVM's global lock: no group can be extended", " and ".join(global_locks))
        brought_up = {**description, "helper": helper.path}
        if not new:
            try:
                lvmgroup.LvmGroup(helper, group).activate(blocklayout.SLOTS_VOLUME)
            except FileNotFoundError as error:
                cls.take_down(helper, brought_up)
                reason = f"it has no volume {blocklayout.SLOTS_VOLUME}"
                raise errors.NotARepository(
                    place=description["place"], repo_format=cls.format, reason=reason
                ) from error
        return brought_up

    @classmethod
    def take_down(cls, helper: helper_client.Helper, description: repository.Description) -> None:
        """Raises `RepositoryInUse` while a process of this host has one of the volumes open."""
        in_use = roothelper.call(helper, calls.StopVolumeGroup(description["vg"])).in_use
        if in_use:
            raise errors.RepositoryInUse(repo_id=description["place"], users=f"who has open: {', '.join(in_use)}")

    @classmethod
    def bring_back(cls, helper: helper_client.Helper, description: repository.Description) -> None:
        """A group whose locks were lost was cut off (trap 47), and stays so until it is started again."""
        group = description["vg"]
        if group not in roothelper.call(helper, calls.GetLockManager()).groups:
            slots = [blocklayout.SLOTS_VOLUME]
            roothelper.call(helper, calls.StartVolumeGroup(group, description["host_id"], slots))

    @classmethod
    def extend(
        cls, helper: helper_client.Helper, description: repository.Description, devices: list[str], overwrite: list[str]
    ) -> None:
        try:
            wanted = calls.ExtendVolumeGroup(description["vg"], devices, overwrite)
        except contract.Refused as error:
            raise errors.InvalidParameters(parameter="devices", reason=error.reason) from error
        roothelper.call(helper, wanted)


def _bad(reason: str) -> errors.InvalidParameters:
    return errors.InvalidParameters(parameter="connectionParameters", reason=reason)
