"""A shared volume group in a lab: made once for the session, started in a host by its root helper."""

from typing import Any

from supervdsm import calls, contract
from tests.lab import host, lun

# With this name LVM's devices match the pattern of the LUNs: a logical volume could pass for a disk.
NAME = "lunar"


def call(owner: host.Host, request: contract.Call[Any]) -> Any:
    """What the host's root helper answers; raises its `HelperError`."""
    return owner.helper().call(request)


def make(owner: host.Host, name: str, disks: list[lun.Lun]) -> None:
    """The group is there afterwards, started in this host. Its locks are on the first disk, which is filled by them;
    made anew only when it is not there."""
    owner.start_helper()
    first, *others = [disk.path for disk in disks]
    try:
        has = call(owner, calls.GetVolumeGroup(name)).devices
    except contract.Failed:
        has = call(owner, calls.MakeVolumeGroup(name, [first], overwrite=[first], host_id=owner.number)).devices
    start(owner, name)
    if not set(others) <= set(has):
        call(owner, calls.ExtendVolumeGroup(name, others, overwrite=others))


def start(owner: host.Host, name: str) -> calls.VolumeGroup:
    owner.start_helper()
    started: calls.VolumeGroup = call(owner, calls.StartVolumeGroup(name, owner.number, []))
    return started


def remove_volumes(owner: host.Host, name: str) -> None:
    """Nobody uses any of them."""
    for volume in call(owner, calls.ListVolumes(name)).volumes:
        assert call(owner, calls.RemoveVolume(name, volume.name)).obstacle == "", volume


def wipe(disk: lun.Lun) -> None:
    """Nothing that was on the disk is recognised any more. No host uses it."""
    disk.owner.run(["dd", "if=/dev/zero", f"of={disk.path}", "bs=1M", "count=2", "oflag=direct", "status=none"])
