"""A shared volume group in a lab: made once for the session, started in a host by its root helper."""

import concurrent.futures
from typing import Any

from supervdsm import calls, contract
from tests.lab import host, lun

# With this name LVM's devices match the pattern of the LUNs: a logical volume could pass for a disk.
NAME = "lunar"
# LUNs: with the group's locks alone, with its data, to make it larger with; another one.
LOCKS, DATA, SPARE, OTHER = 3, 4, 5, 2
MIB = 1 << 20


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
    for volume in call(owner, calls.ListVolumes(name, "")).volumes:
        assert call(owner, calls.RemoveVolume(name, volume.name)).obstacle == "", volume


def wipe(disk: lun.Lun) -> None:
    """Nothing that was on the disk is recognised any more. No host uses it."""
    disk.owner.run(["dd", "if=/dev/zero", f"of={disk.path}", "bs=1M", "count=2", "oflag=direct", "status=none"])


class Group:
    """The group of a test, in both hosts."""

    name = NAME

    def call(self, owner: host.Host, kind: Any, *arguments: Any) -> Any:
        return call(owner, kind(self.name, *arguments))

    def create(self, owner: host.Host, volume: str, size_bytes: int = 64 * MIB) -> None:
        """Active nowhere."""
        self.call(owner, calls.CreateVolume, volume, size_bytes)
        self.call(owner, calls.DeactivateVolume, volume)

    def activate(self, owner: host.Host, volume: str) -> str:
        """The path of its device."""
        path: str = self.call(owner, calls.ActivateVolume, volume).path
        return path

    def volumes(self, owner: host.Host, prefix: str = "") -> dict[str, calls.Volume]:
        return {volume.name: volume for volume in self.call(owner, calls.ListVolumes, prefix).volumes}

    def left(self, *hosts: host.Host) -> list[dict[str, calls.Volume] | None]:
        """As `volumes`, of each host; None: it is not started there, or the host has been booted since."""

        def look(owner: host.Host) -> dict[str, calls.Volume] | None:
            joined = f"s lvm_{self.name}:" in owner.run(["sanlock", "client", "status"], check=False).out
            try:
                return self.volumes(owner) if joined else None
            except contract.HelperError:
                return None

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(look, hosts))

    def remove(self, owner: host.Host, volume: str) -> str:
        """Why not, or nothing."""
        obstacle: str = self.call(owner, calls.RemoveVolume, volume).obstacle
        return obstacle
