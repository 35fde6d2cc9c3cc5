"""clvm-1.2 towards the root helper: what is asked of it when, what its answers mean. With LVM itself: in the lab."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import supervdsm.client
from supervdsm import calls, contract
from vdsm import config, errors
from vdsm.storage import formats
from vdsm.storage.formats import blocklayout, lvmgroup, volumes

GIB = 1 << 30
NAME = "group"
STORAGE = config.Storage()


class Root(supervdsm.client.Helper):
    """The calls of one group, which answers as LVM does: failures in words only."""

    def __init__(self, *volumes: str) -> None:
        super().__init__("/run/helper.sock")
        self.sizes = dict.fromkeys(volumes, 1 << 20)
        self.free_bytes = GIB
        self.started = False
        self.in_use: list[str] = []
        self.asked: list[str] = []
        self.activated: list[str] = []
        self.global_locks = [NAME]

    def call(self, call: contract.Call[contract.R]) -> contract.R:
        self.asked.append(type(call).__name__)
        answer: Callable[[Any], Any] = getattr(self, f"_{type(call).__name__}")
        result: contract.R = answer(call)
        return result

    def _StartVolumeGroup(self, call: calls.StartVolumeGroup) -> calls.VolumeGroup:
        self.started = True
        self.activated = call.volumes
        return self._group()

    def _GetLockManager(self, call: calls.GetLockManager) -> calls.LockManager:
        return calls.LockManager(True, 3, None, {NAME: 3} if self.started else {}, self.global_locks, [])

    def _StopVolumeGroup(self, call: calls.StopVolumeGroup) -> calls.StoppedVolumeGroup:
        self.started = bool(self.in_use)
        return calls.StoppedVolumeGroup(self.in_use)

    def _MakeVolumeGroup(self, call: calls.MakeVolumeGroup) -> calls.VolumeGroup:
        return self._group()

    def _ExtendVolumeGroup(self, call: calls.ExtendVolumeGroup) -> calls.VolumeGroup:
        self.free_bytes += GIB
        return self._group()

    def _GetVolumeGroup(self, call: calls.GetVolumeGroup) -> calls.VolumeGroup:
        return self._group()

    def _group(self) -> calls.VolumeGroup:
        return calls.VolumeGroup(NAME, "uuid", 4 * GIB, self.free_bytes, 4 << 20, "sanlock", [], 0, self.started)

    def _ListVolumes(self, call: calls.ListVolumes) -> calls.Volumes:
        return calls.Volumes([self._volume(name) for name in self.sizes if name.startswith(call.prefix)])

    def _volume(self, name: str) -> calls.Volume:
        return calls.Volume(name, f"/dev/{NAME}/{name}", self.sizes[name], active=True, open=False)

    def _device(self, name: str) -> calls.VolumeDevice:
        return calls.VolumeDevice(f"/dev/{NAME}/{name}", self.sizes[name])

    def _CreateVolume(self, call: calls.CreateVolume) -> calls.VolumeDevice:
        if call.volume in self.sizes or call.size_bytes > self.free_bytes:
            raise contract.Failed("lvcreate: some words")
        self.sizes[call.volume] = call.size_bytes
        return self._device(call.volume)

    def _ExtendVolume(self, call: calls.ExtendVolume) -> calls.VolumeDevice:
        if call.size_bytes - self.sizes[call.volume] > self.free_bytes:
            raise contract.Failed("lvextend: some words")
        self.sizes[call.volume] = max(self.sizes[call.volume], call.size_bytes)
        return self._device(call.volume)

    def _ActivateVolume(self, call: calls.ActivateVolume) -> calls.VolumeDevice:
        if call.volume not in self.sizes:
            raise contract.Failed("lvchange: some words")
        return self._device(call.volume)

    def _DeactivateVolume(self, call: calls.DeactivateVolume) -> calls.DeactivatedVolume:
        return calls.DeactivatedVolume(in_use=False)


def describe(**parameters: Any) -> dict[str, Any]:
    return formats.describe("clvm-1.2", {"vg": NAME, **parameters}, "repo", 3, STORAGE)


@pytest.mark.parametrize(
    "parameters",
    [
        *({}, {"vg": 5}, {"vg": "../etc"}, {"vg": "-rf"}, {"vg": "a" * 41}, {"vg": NAME, "path": "/"}),
        *({"vg": NAME, "devices": ["/dev/sda"]}, {"vg": NAME, "devices": "/dev/mapper/x"}),
    ],
)
def test_parameters_name_a_group_and_whole_disks(parameters: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidParameters):
        formats.describe("clvm-1.2", parameters, "repo", 3, STORAGE)


def test_group_is_started_before_a_repository_is_looked_for() -> None:
    root = Root(blocklayout.SLOTS_VOLUME)
    up = formats.bring_up(root, describe(), new=False)
    assert root.asked == ["StartVolumeGroup", "GetLockManager", "ActivateVolume"] and root.started
    assert (up["helper"], up["place"]) == (root.path, f"/dev/{NAME}")
    formats.take_down(root, up)
    assert not root.started


def test_two_groups_with_the_global_lock_are_told(caplog: pytest.LogCaptureFixture) -> None:
    root = Root(blocklayout.SLOTS_VOLUME)
    formats.bring_up(root, describe(), new=False)
    assert not caplog.records
    root.global_locks.append("other")
    formats.bring_up(root, describe(), new=False)
    assert "group and other both have LVM's global lock" in caplog.text


def test_group_that_an_outage_has_taken_is_started_again_with_its_slots() -> None:
    root = Root(blocklayout.SLOTS_VOLUME)
    up = formats.bring_up(root, describe(), new=False)
    root.asked.clear()
    formats.bring_back(root, up)
    root.started = False
    formats.bring_back(root, up)
    assert root.asked == ["GetLockManager", "GetLockManager", "StartVolumeGroup"]
    assert root.activated == [blocklayout.SLOTS_VOLUME]


def test_group_without_a_repository_is_stopped_again() -> None:
    root = Root("root")
    with pytest.raises(errors.NotARepository):
        formats.bring_up(root, describe(), new=False)
    assert not root.started


def test_group_is_made_of_the_disks_of_a_new_repository() -> None:
    root = Root()
    formats.bring_up(root, describe(devices=["/dev/mapper/a"]), new=True)
    assert root.asked == ["MakeVolumeGroup", "StartVolumeGroup", "GetLockManager"]


def test_group_in_use_stays_up_and_says_by_what() -> None:
    root = Root(blocklayout.SLOTS_VOLUME)
    up = formats.bring_up(root, describe(), new=False)
    root.in_use = ["data"]
    with pytest.raises(errors.RepositoryInUse, match="data"):
        formats.take_down(root, up)


def test_extending_takes_stable_names_only() -> None:
    root = Root()
    formats.extend(root, describe(), ["/dev/mapper/a"], [])
    assert root.free_bytes == 2 * GIB
    with pytest.raises(errors.InvalidParameters):
        formats.extend(root, describe(), ["/dev/sda"], [])


def test_what_lvm_says_in_words_is_told_by_what_there_is() -> None:
    root = Root("known")
    group = lvmgroup.LvmGroup(root, NAME)
    with pytest.raises(FileExistsError):
        group.create("known", 1 << 20)
    with pytest.raises(OSError, match="no room"):
        group.create("new", 2 * GIB)
    with pytest.raises(OSError, match="no room"):
        group.extend("known", 2 * GIB)
    with pytest.raises(FileNotFoundError):
        group.activate("new")
    assert group.extend("known", 5 << 20) == 5 << 20
    assert group.volumes()["known"].size_bytes == 5 << 20 and group.space() == (4 * GIB, GIB)
    assert group.volumes("kno") == group.volumes() and group.volumes("known.") == {}


def test_a_new_volume_is_used_without_being_activated_again(tmp_path: Path) -> None:
    """Each call is a command of LVM, or two. One of a dead maker is used again, with the room that is asked for."""
    root = Root()
    users = volumes.Users(lvmgroup.LvmGroup(root, NAME), str(tmp_path))
    with users.making("new", 1 << 20):
        assert root.asked == ["CreateVolume"]
    assert root.asked[1:] == ["DeactivateVolume"]
    with users.making("new", 2 << 20):
        assert root.asked[2:] == ["CreateVolume", "ListVolumes", "ActivateVolume", "ExtendVolume"]


def test_monitor_asks_for_the_space_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever needs it for a decision at once."""
    root = Root(blocklayout.SLOTS_VOLUME)
    repo = formats.open(formats.bring_up(root, describe(), new=False))
    monkeypatch.setattr(repo, "_group", lvmgroup.LvmGroup(root, NAME))  # in a child it would be a socket's other end
    before = repo.recent_space()
    root.free_bytes = 0
    assert repo.recent_space() == before and repo.space().free_bytes == 0
    monkeypatch.setattr(blocklayout, "SPACE_S", 0.0)
    assert repo.recent_space() == repo.space()


def test_other_failures_stay_what_they_are() -> None:
    class Broken(Root):
        def _ActivateVolume(self, call: calls.ActivateVolume) -> calls.VolumeDevice:
            raise contract.Failed("lvchange: locks are lost")

        def _CreateVolume(self, call: calls.CreateVolume) -> calls.VolumeDevice:
            raise contract.Failed("lvcreate: locks are lost")

    group = lvmgroup.LvmGroup(Broken("known"), NAME)
    for act in (lambda: group.activate("known"), lambda: group.create("new", 1)):
        with pytest.raises(errors.HelperFailed, match="locks are lost"):
            act()
