"""The root helper's contract: what is a call, what is not."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from supervdsm import calls, contract, worker
from supervdsm.calls import targets

ROOT = Path(__file__).resolve().parent.parent
TARGET = {"address": "192.0.2.1", "port": 3260, "tag": 1, "target": "iqn.2026-01.test:a"}
TIMES = {"noop_interval_s": 5, "noop_timeout_s": 5, "replacement_timeout_s": 5}
GROUP = calls.VolumeGroup("vg", "u", 9, 8, 4, "sanlock", ["/dev/mapper/3a"], missing=1, started=True)
VOLUME = calls.Volume("a.1", "/dev/vg/a.1", 4096, active=True, open=False)
DEVICE = calls.VolumeDevice("/dev/vg/a.1", 4096)
# A helper that hangs is given up after a minute, but where a storage has to write hundreds of MiB.
DEADLINES_S: dict[type[contract.Call[Any]], float] = {calls.MakeVolumeGroup: 300}
# One sample of every call with its result: a new call without one fails `test_the_list_is_closed`.
SAMPLES: list[tuple[contract.Call[Any], Any]] = [
    (
        calls.GetHardwareInfo(),
        calls.HardwareInfo("ACME", "Box", None, "S1", "u", "F", reasons={"version": "product_version is empty"}),
    ),
    (calls.PrepareDirectory(path="/srv/a"), calls.PreparedDirectory(path="/srv/a", created=True)),
    (
        calls.MountNfs(server="nas.example.com", export="/a b", version="4.2"),
        calls.NfsMount("/run/m/x", "denied", "access denied by server"),
    ),
    (calls.UnmountNfs(server="[fe80::1]", export="/", version="3", lazy=True), calls.NfsUnmount(was_mounted=False)),
    (calls.DiscoverTargets("san.example.com", 3260, "joe", "s3cret"), calls.Answer("done", "", ["192.0.2.1:3260,1 a"])),
    (calls.LoginTarget(**TARGET, **TIMES, user=None, password=None), calls.Answer("refused", "24", [])),
    (calls.LogoutTarget(**TARGET), calls.Answer("absent", "no session", [])),
    (calls.RescanHost(7), calls.Rescanned(["sda"])),
    (
        calls.GetMaps(),
        calls.Maps([targets.Map("36001", "a", "dm-0", "off", [targets.MapPath("sda", "active", "ready")])], None),
    ),
    (calls.ResizeMap("36001"), calls.MapChanged("36001")),
    (calls.RemoveMap("36001"), calls.MapChanged("36001")),
    (calls.ReadContent("nvme0n1"), calls.Content("LVM2_member", None, "p", 1 << 40, "vg", "v", ["a"])),
    (
        calls.GetLockManager(),
        calls.LockManager(True, 7, "/bin/kill", groups={"vg": 7}, global_locks=["vg"], obstacles=["none"]),
    ),
    (calls.GetVolumeGroup("vg"), GROUP),
    (calls.MakeVolumeGroup("vg", ["/dev/mapper/3a"], overwrite=["/dev/mapper/3a"], host_id=250), GROUP),
    (calls.StartVolumeGroup("vg", host_id=1, volumes=["vdsm"]), GROUP),
    (calls.StopVolumeGroup("vg"), calls.StoppedVolumeGroup(in_use=["a.1"])),
    (calls.ExtendVolumeGroup("vg", ["/dev/disk/by-id/wwn-0x5"], overwrite=[]), GROUP),
    (calls.EnableGlobalLock("vg"), calls.GlobalLock("vg")),
    (calls.ListVolumes("vg", ""), calls.Volumes([VOLUME])),
    (calls.CreateVolume("vg", "a.1", 1), DEVICE),
    (calls.ActivateVolume("vg", "a.1"), DEVICE),
    (calls.RefreshVolume("vg", "a.1"), DEVICE),
    (calls.DeactivateVolume("vg", "a.1"), calls.DeactivatedVolume(in_use=True)),
    (calls.ExtendVolume("vg", "a.1", 1), DEVICE),
    (calls.RemoveVolume("vg", "a.1"), calls.RemovedVolume("active elsewhere")),
]


def test_the_list_is_closed() -> None:
    sampled = {type(call) for call, _ in SAMPLES}
    assert sampled == set(contract.Call.by_name.values()) == worker.ROOMS.keys()
    named = {call.__name__ for call in sampled} | {call.result_type.__name__ for call in sampled}
    assert named | {calls.Volume.__name__} == set(calls.__all__)  # of which `Volumes` are


@pytest.mark.parametrize(("call", "result"), SAMPLES, ids=lambda value: type(value).__name__)
def test_calls_and_results_travel_whole(call: contract.Call[Any], result: Any) -> None:
    assert contract.decode_call(contract.encode_call(call)) == call
    assert contract.decode_reply(call, contract.encode_result(call, result)) == result


@pytest.mark.parametrize("kind", contract.Call.by_name.values(), ids=lambda kind: kind.__name__)
def test_every_call_has_a_deadline_and_says_what_it_does(kind: type[contract.Call[Any]]) -> None:
    assert math.isfinite(kind.deadline_s)
    assert 0 < kind.deadline_s <= DEADLINES_S.get(kind, 60)
    assert kind.__doc__


@pytest.mark.parametrize("kind", list(contract.HelperError.by_kind.values()), ids=lambda kind: kind.kind)
def test_errors_come_back_as_the_same_class(kind: type[contract.HelperError]) -> None:
    with pytest.raises(kind) as caught:
        contract.decode_reply(calls.GetHardwareInfo(), contract.encode_error(kind("because")))
    assert type(caught.value) is kind
    assert caught.value.reason == "because"


NOT_CALLS = {
    "not UTF-8": (b'{"call": "\xff"}', "not strict JSON"),
    "not JSON": (b"GetHardwareInfo", "not strict JSON"),
    "nothing": (b"", "not strict JSON"),
    "two documents": (b"{}{}", "not strict JSON"),
    "NaN": (b'{"call": "GetHardwareInfo", "arguments": {"a": NaN}}', "not strict JSON"),
    "infinite by size": (b'{"call": "GetHardwareInfo", "arguments": {"a": 1e999}}', "not strict JSON"),
    "endless number": (b'{"call": "GetHardwareInfo", "arguments": {"a": ' + b"1" * 5000 + b"}}", "not strict JSON"),
    "deep": (b"[" * 60000, "not strict JSON"),
    "deep and closed": (b'{"call":' + b"[" * 30000 + b"]" * 30000 + b',"arguments":{}}', "not strict JSON"),
    "member twice": (b'{"call": "PrepareDirectory", "call": "GetHardwareInfo", "arguments": {}}', "not strict JSON"),
    "argument twice": (b'{"call": "PrepareDirectory", "arguments": {"path": "/a", "path": "/b"}}', "not strict JSON"),
    "an array": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no arguments": (b'{"call": "GetHardwareInfo"}', "not a call: it has exactly the members call and arguments"),
    "one member more": (b'{"call": "GetHardwareInfo", "arguments": {}, "id": 1}', "not a call: it has exactly the"),
    "name is a number": (b'{"call": 1, "arguments": {}}', "not a call: call is a name and arguments are an object"),
    "arguments in a list": (b'{"call": "PrepareDirectory", "arguments": ["/a"]}', "not a call: call is a name"),
    "unknown call": (b'{"call": "Run", "arguments": {"argv": ["sh"]}}', "unknown call"),
    "a class that is no call": (b'{"call": "Call", "arguments": {}}', "unknown call"),
    "unknown field": (b'{"call": "GetHardwareInfo", "arguments": {"path": "/a"}}', "unknown field 'path'"),
    "a class attribute": (b'{"call": "GetHardwareInfo", "arguments": {"deadline_s": 9}}', "unknown field 'deadline_s'"),
    "missing field": (b'{"call": "PrepareDirectory", "arguments": {}}', "missing field 'path'"),
    "null for a text": (b'{"call": "PrepareDirectory", "arguments": {"path": null}}', "path: str expected, not Non"),
    "number for a text": (b'{"call": "PrepareDirectory", "arguments": {"path": 7}}', "path: str expected, not int"),
    "list for a text": (b'{"call": "PrepareDirectory", "arguments": {"path": ["/a"]}}', "path: str expected, not lis"),
    "lone surrogate": (b'{"call": "PrepareDirectory", "arguments": {"path": "/\\ud800"}}', "path must be an absolute"),
}


@pytest.mark.parametrize(("data", "reason"), NOT_CALLS.values(), ids=NOT_CALLS.keys())
def test_what_is_not_a_call_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(contract.Refused) as caught:
        contract.decode_call(data)
    assert caught.value.reason.startswith(reason)


BAD_PATHS = ["", "/", "a", "a/b", "./a", "/a/", "//a", "/a//b", "/a/./b", "/a/..", "/../a", "/a\0b", "/a\nb", "/a\x7f"]


@pytest.mark.parametrize("path", [*BAD_PATHS, "/\ud800", "/" + "a" * 4095, "/" + "\u00fc" * 2048], ids=ascii)
def test_a_path_addresses_one_place(path: str) -> None:
    with pytest.raises(contract.Refused, match="path must be an absolute path"):
        calls.PrepareDirectory(path=path)


@pytest.mark.parametrize("path", ["/a", "/a b/c", "/.a", "/a..", "/...", "/d\u00fcne", "/" + "a" * 4094], ids=ascii)
def test_ordinary_paths_pass(path: str) -> None:
    assert calls.PrepareDirectory(path=path).path == path


BAD_TARGETS = {
    "address": ["", "san", "fe80::1%eth0", "192.0.2.1:3260", "192.0.2.1\n", "../etc"],
    "port": [0, 65536, -1],
    "tag": [-1, 65536],
    "target": ["", "a", "iqn.", "iqn.2026-01.Test:a", "iqn.2026-01.test/../../a", "iqn.2026-01.test:a\n", "iqn.a b"],
    "user": ["", "a b", "a\nnode.startup = automatic", "\u00e4", "a" * 256],
    "password": ["", "a b", "a\n", "\u00e4", "a" * 256],
    "noop_interval_s": [0, 601],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_TARGETS.items() for value in values], ids=ascii
)
def test_what_goes_into_open_iscsis_files_is_plain(field: str, value: Any) -> None:
    good = {**TARGET, **TIMES, "user": "joe", "password": "x"}
    with pytest.raises(contract.Refused, match=f"{field} must be") as caught:
        calls.LoginTarget(**{**good, field: value})
    assert "node.startup" not in caught.value.reason


@pytest.mark.parametrize("disk", ["", "..", "sda/..", "sda1 ", "-a", "a--b", "SDA", "a" * 40], ids=ascii)
def test_a_disk_is_a_name_and_no_path(disk: str) -> None:
    with pytest.raises(contract.Refused, match="disk must be"):
        calls.ReadContent(disk)


def test_a_secret_is_not_shown() -> None:
    call = calls.DiscoverTargets("192.0.2.1", 3260, "joe", "s3cret")
    assert "s3cret" not in repr(call)
    _, sent = contract.parse_call(contract.encode_call(call))
    assert sent["password"] == "s3cret"
    assert contract.concealed(sent) == {**sent, "password": "(not shown)"}
    assert contract.concealed({"password": None, "path": "/a"}) == {"password": None, "path": "/a"}


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "..", "a" * 41, "a\n", "\u00e4"], ids=ascii)
def test_a_volume_group_has_a_plain_name(name: str) -> None:
    with pytest.raises(contract.Refused, match="group must be"):
        calls.GetVolumeGroup(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "a" * 81, "lvmlock"], ids=ascii)
def test_a_volume_has_a_plain_name_and_is_none_of_lvms_own(name: str) -> None:
    with pytest.raises(contract.Refused, match="volume must be"):
        calls.RemoveVolume("vg", name)


@pytest.mark.parametrize(
    "path",
    [
        *("/dev/sda", "/dev/dm-1", "/dev/mapper/", "/dev/mapper/..", "/dev/mapper/../sda", "/dev/mapper/a/b", "3a"),
        *("/dev/disk/by-path/a", "/dev/mapper/a,b", "/dev/mapper/a|b", " /dev/mapper/a"),
    ],
)
def test_a_disk_is_named_by_a_name_that_stays(path: str) -> None:
    with pytest.raises(contract.Refused, match=r"devices\[0\] must be a device by a stable name"):
        calls.ExtendVolumeGroup("vg", [path], [])


@pytest.mark.parametrize("number", [0, -1, 251])
def test_a_host_id_fits_all_sector_sizes(number: int) -> None:
    with pytest.raises(contract.Refused, match="host_id must be 1 to 250"):
        calls.StartVolumeGroup("vg", number, [])


NOT_REPLIES = [
    b"",
    b"[]",
    b"{}",
    b'{"result": 1}',
    b'{"result": {"path": "/srv/a"}}',
    b'{"result": {"path": "/srv/a", "created": 1}}',
    b'{"result": {"path": "/srv/a", "created": true, "more": 1}}',
    b'{"result": {"path": "/srv/a", "created": true}, "error": {"kind": "refused", "reason": "x"}, "x": 1}',
    b'{"error": {"kind": "exec", "reason": "x"}}',
    b'{"error": {"kind": ["refused"], "reason": "x"}}',
    b'{"error": 1}',
]


@pytest.mark.parametrize("data", NOT_REPLIES, ids=repr)
def test_an_odd_reply_is_a_failure(data: bytes) -> None:
    with pytest.raises(contract.Failed, match="the reply is not of this contract"):
        contract.decode_reply(SAMPLES[1][0], data)


def test_a_room_that_gives_another_result_is_at_fault() -> None:
    with pytest.raises(TypeError, match="GetHardwareInfo must give a HardwareInfo"):
        contract.encode_result(calls.GetHardwareInfo(), SAMPLES[1][1])


# -- lists and objects in fields: no call of the first ones has any --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    name: str


@dataclasses.dataclass(frozen=True)
class Whole:
    parts: list[Part]


@pytest.fixture
def assemble() -> Iterator[type[contract.Call[Whole]]]:
    """A call that is on the list for one test."""

    @dataclasses.dataclass(frozen=True)
    class Assemble(contract.Call[Whole], deadline_s=1):
        """Assemble."""

        paths: list[contract.AbsolutePath]

    yield Assemble
    del contract.Call.by_name["Assemble"]


def test_lists_and_objects_travel_whole(assemble: Any) -> None:
    call, result = assemble(paths=["/a", "/b"]), Whole([Part("x"), Part("y")])
    assert contract.decode_call(contract.encode_call(call)) == call
    assert contract.decode_reply(call, contract.encode_result(call, result)) == result


@pytest.mark.parametrize(
    ("paths", "reason"),
    [("/a", "paths: list"), (["/a", 1], r"paths\[1\]: str expected"), (["/a", "b"], r"paths\[1\] must be an absolute")],
    ids=["no list", "a number", "a relative path"],
)
def test_each_of_a_list_is_checked(assemble: Any, paths: object, reason: str) -> None:
    with pytest.raises(contract.Refused, match=reason):
        assemble(paths=paths)


@pytest.mark.parametrize(
    "parts", [{}, [{}], ["x"], [{"name": 1}], [{"name": "x", "more": 1}], [[{"name": "x"}]]], ids=repr
)
def test_objects_that_are_odd_are_a_failure(assemble: Any, parts: object) -> None:
    with pytest.raises(contract.Failed, match="the reply is not of this contract"):
        contract.decode_reply(assemble(paths=[]), json.dumps({"result": {"parts": parts}}).encode())


NAMES = strategies.sampled_from(["call", "arguments", "result", "error", "kind", "reason", "path", "created", "/a", ""])
TEXTS = NAMES | strategies.sampled_from(list(contract.Call.by_name)) | strategies.text(max_size=5)
DOCUMENTS = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | TEXTS,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(NAMES | TEXTS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = strategies.dictionaries(TEXTS, DOCUMENTS, max_size=2)
CALLS = strategies.fixed_dictionaries({"call": TEXTS, "arguments": ARGUMENTS})
FRAMES = strategies.binary(max_size=64) | (DOCUMENTS | CALLS).map(lambda document: json.dumps(document).encode())


@hypothesis.given(FRAMES)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_call_or_refused(data: bytes) -> None:
    try:
        call = contract.decode_call(data)
    except contract.Refused as error:
        assert error.reason.isprintable()
        assert len(error.reason) < 300
    else:
        assert contract.decode_call(contract.encode_call(call)) == call


@hypothesis.given(FRAMES, strategies.sampled_from([call for call, _ in SAMPLES]))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_result_or_an_error(data: bytes, call: contract.Call[Any]) -> None:
    try:
        result = contract.decode_reply(call, data)
    except contract.HelperError:
        return
    assert type(result) is call.result_type


def test_the_list_prints_itself() -> None:
    command = [sys.executable, "-P", "-m", "supervdsm", "--list"]
    printed = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in printed.splitlines() if line and not line.startswith(" ")]
    assert sorted(names) == sorted(type(call).__name__ for call, _ in SAMPLES)
    assert "PrepareDirectory  (deadline 10 s)\n    Make a directory under a configured one" in printed
    assert "argument  path: str, an absolute path without" in printed
    assert "result    manufacturer: str | None\n" in printed
    assert "result    reasons: dict[str, str]\n" in printed


def test_the_helper_runs_on_the_standard_library_alone() -> None:
    names = [*sorted(path.stem for path in (ROOT / "supervdsm").glob("[!_]*.py")), "calls"]
    program = f"""
import importlib, sys
sys.path.append({str(ROOT)!r})
before = set(sys.modules)
for name in {[*names, "__main__"]}:
    importlib.import_module("supervdsm." + name)
roots = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(roots - set(sys.stdlib_module_names) - {{"supervdsm"}}))
"""
    command = ["/usr/bin/python3", "-I", "-S", "-c", program]  # neither site packages nor the agent's environment
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
