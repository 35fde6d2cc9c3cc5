"""Disks of a host: what is told of them, one that hangs, and events that come in crowds."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervdsm import calls
from supervdsm.calls import targets
from tests import sysfs_sample
from tests.until import until
from vdsm import forkserver
from vdsm.storage import devicelist, devices, scans, sysblock

GUID = "360014051ab0000000000001000000000"
EMPTY = calls.Content(None, None, None, None, None, None, [])


@pytest.fixture(scope="module")
def server() -> Iterator[forkserver.ForkServer]:
    started = forkserver.ForkServer([sysblock.__name__], "ERROR")
    yield started
    started.stop()


@pytest.fixture
def tree(tmp_path: Path) -> sysfs_sample.Tree:
    return sysfs_sample.host(tmp_path)


def ground(tree: sysfs_sample.Tree, **more: Any) -> devicelist.Ground:
    disks = {name: sysblock.read_disk(tree.sys, name) for name in sysblock.disk_names(tree.sys)}
    scan = scans.Scan(disks, sysblock.read_sessions(tree.sys), {})
    known = {"maps": multipath(), "links": {}, "mounted": {}, "contents": {}}
    return devicelist.Ground(scan, **{**known, **more})


def multipath(queueing: str = "off", checker: str = "ready", kernel: str = "active") -> calls.Maps:
    paths = [targets.MapPath("sda", "active", "ready"), targets.MapPath("sdb", kernel, checker)]
    return calls.Maps([targets.Map(GUID, "36001", "dm-0", queueing, paths)], None)


def told(found: devicelist.Ground) -> dict[str, devicelist.Answer]:
    return {
        one["name"]: one for one in (devicelist.describe(disk, found) for disk in devicelist.candidates(found.scan))
    }


# -- what is told ------------------------------------------------------------------------------------------------------


def test_paths_volumes_and_loop_devices_are_no_disks_of_their_own(tree: sysfs_sample.Tree) -> None:
    assert told(ground(tree)).keys() == {"dm-0", "sdc", "nvme0n1"}


def test_a_map_is_told_with_its_paths_and_sessions(tree: sysfs_sample.Tree) -> None:
    found = told(ground(tree))["dm-0"]
    expected = {"guid": GUID, "devtype": "iSCSI", "path": "/dev/mapper/36001", "capacity": 256 << 20, "stable": True}
    expected |= {"vendor": "LIO-ORG", "product": "IBLOCK", "revision": "4.0", "serial": "1ab0000000000001"}
    assert {name: found[name] for name in expected} == expected
    assert [(path["physdev"], path["state"], path["lun"]) for path in found["pathstatus"]] == [
        ("sda", "active", "7"),
        ("sdb", "active", "7"),
    ]
    assert [(session["address"], session["gives_up_s"]) for session in found["pathlist"]] == [
        ("10.66.1.1", 15),
        ("10.66.2.1", 15),
    ]
    assert found["problems"] == []


def test_other_disks_have_the_ids_that_multipath_would_give_them(tree: sysfs_sample.Tree) -> None:
    found = told(ground(tree))
    assert (found["sdc"]["guid"], found["sdc"]["devtype"]) == ("3500a0b8000000001", "FCP")
    assert (found["sdc"]["logicalblocksize"], found["sdc"]["capacity"]) == (4096, 1 << 30)
    assert (found["nvme0n1"]["guid"], found["nvme0n1"]["devtype"]) == ("eui.0025385b", "other")


def test_without_an_id_the_kernels_name_has_to_do(tree: sysfs_sample.Tree) -> None:
    tree.disk("vda", "252:0", 2048)
    found = told(ground(tree))["vda"]
    assert (found["guid"], found["stable"], found["path"]) == ("vda", False, "/dev/vda")


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        (multipath(checker="faulty"), "1 of 2 paths do not carry I/O: sdb"),
        (multipath(kernel="failed"), "1 of 2 paths do not carry I/O: sdb"),
        (multipath("on"), "without paths its I/O waits for ever (no_path_retry): it must fail within 60 s"),
        (multipath("60 chk"), "without paths its I/O waits for about 300 s (no_path_retry): it must fail within 60 s"),
        (multipath("60 sec"), "without paths its I/O waits for about 60 s (no_path_retry): it must fail within 60 s"),
        (calls.Maps([], "multipathd: it is not there"), "its paths are not checked: multipathd: it is not there"),
    ],
    ids=["checked and faulty", "failed in use", "queues", "queues long", "queues as long as a lease", "no multipathd"],
)
def test_what_a_shared_repository_must_not_have_is_told(
    tree: sysfs_sample.Tree, maps: calls.Maps, problem: str
) -> None:
    assert told(ground(tree, maps=maps))["dm-0"]["problems"] == [problem]


@pytest.mark.parametrize("queueing", ["off", "-", "4 chk", "20 sec"])
def test_io_that_fails_in_time_is_no_problem(tree: sysfs_sample.Tree, queueing: str) -> None:
    assert told(ground(tree, maps=multipath(queueing)))["dm-0"]["problems"] == []


@pytest.mark.parametrize(
    ("replacement_s", "words"), [(120, "is given up after 130 s"), (-1, "is never given up"), (50, "after 60 s")]
)
def test_a_session_that_waits_too_long_is_told(tmp_path: Path, replacement_s: int, words: str) -> None:
    tree = sysfs_sample.Tree(tmp_path)
    tree.disk("sda", "8:0", 2048)
    tree.scsi("sda", "0:0:0:0", "platform/host0/session4")
    tree.session(4, 0, "192.0.2.7", replacement_s)
    (problem,) = told(ground(tree))["sda"]["problems"]
    assert problem.startswith("a lost connection to 192.0.2.7 ")
    assert words in problem


def test_a_path_that_is_offline_is_failed_whoever_says_otherwise(tree: sysfs_sample.Tree) -> None:
    tree.write("block/sdb/device/state", "transport-offline\n")
    states = {path["physdev"]: path["state"] for path in told(ground(tree))["dm-0"]["pathstatus"]}
    assert states == {"sda": "active", "sdb": "failed"}


@pytest.mark.parametrize(
    ("content", "mounted", "status", "used_by"),
    [
        (EMPTY, {}, "free", []),
        ("it was not read", {}, "unknown", []),
        ("it was not read", {"8:32": "/data"}, "used", ["mounted at /data"]),
        (calls.Content("ext4", None, None, None, None, None, []), {}, "used", ["holds ext4"]),
        (calls.Content(None, "gpt", None, None, None, None, []), {}, "used", ["has a partition table (gpt)"]),
        (
            calls.Content("LVM2_member", None, "p", 9, "shelf", "v", ["t"]),
            {},
            "used",
            ["physical volume of shelf"],
        ),
        (calls.Content("LVM2_member", None, "p", 9, None, None, []), {}, "used", ["physical volume of no group"]),
    ],
    ids=["empty", "not read", "mounted", "file system", "partition table", "in a group", "in no group"],
)
def test_only_a_disk_that_was_read_and_is_empty_is_free(
    tree: sysfs_sample.Tree, content: calls.Content | str, mounted: dict[str, str], status: str, used_by: list[str]
) -> None:
    found = told(ground(tree, contents={"sdc": content}, mounted=mounted))["sdc"]
    assert (found["status"], found["used_by"]) == (status, used_by)


def test_use_through_what_lies_on_a_disk_counts(tree: sysfs_sample.Tree) -> None:
    found = told(ground(tree, mounted={"254:1": "/srv", "259:1": "/boot"}))
    assert found["dm-0"]["used_by"] == ["below shelf-board", "mounted at /srv"]
    assert found["nvme0n1"]["used_by"] == ["mounted at /boot", "split into partitions"]


# -- a disk that hangs -------------------------------------------------------------------------------------------------


def test_a_disk_that_hangs_costs_itself(tree: sysfs_sample.Tree, server: forkserver.ForkServer) -> None:
    """A file of /sys that does not answer is here a pipe that nobody writes into."""
    size = tree.sys / "block" / "sdb" / "size"
    size.unlink()
    os.mkfifo(size)
    scanner = scans.Scanner(server, tree.sys, disk_s=1.0)
    found = scanner.scan()
    assert found.disks.keys() == {"dm-0", "dm-1", "nvme0n1", "sda", "sdc"}
    assert "does not tell of it within 1 s" in found.silent["sdb"]
    assert [session.number for session in found.sessions] == [2, 3]
    size.unlink()
    size.write_text("524288\n")
    until(lambda: "sdb" in scanner.scan().disks)  # once what hung is gone


def test_a_disk_that_is_going_is_told_as_such(tree: sysfs_sample.Tree, server: forkserver.ForkServer) -> None:
    (tree.sys / "block" / "sdc" / "size").unlink()
    found = scans.Scanner(server, tree.sys).scan()
    assert "sdc" not in found.disks
    assert "No such file" in found.silent["sdc"]


# -- events ------------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes the kernel send events: run the tests as root")


def provoke(name: str, times: int) -> None:
    """Has the kernel say that a disk has changed."""
    for _ in range(times):
        Path(f"/sys/block/{name}/uevent").write_text("change")


def some_disk() -> str:
    found = sysblock.disk_names(Path("/sys"))
    return found[0] if found else pytest.skip("this machine has no disk but loop devices")


@needs_root
def test_a_crowd_of_events_is_one_change() -> None:
    changes: list[int] = []
    told_of = threading.Event()

    def changed() -> None:
        changes.append(1)
        told_of.set()

    watch = devices.Watch(devices.Udev().monitors(), changed)
    watch.start()
    try:
        provoke(some_disk(), 200)
        assert told_of.wait(30)
        told_of.clear()
        provoke(some_disk(), 1)
        assert told_of.wait(30)
    finally:
        watch.stop()
    assert len(changes) == 2


@needs_root
def test_loop_devices_change_nothing() -> None:
    kernel, _ = devices.Udev().monitors()
    watch = devices.Watch([kernel], lambda: None)
    provoke("loop0", 1)
    provoke(some_disk(), 1)
    provoke("loop0", 1)
    assert [watch.matters(kernel) for _ in range(3)] == [False, True, False]
