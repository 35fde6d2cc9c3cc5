"""docs/repository-format.md says what is on disk: a reader written from it alone reads samples and what is written now.

The reader knows the page and nothing of the agent. What it finds in records is compared with the page's tables, field
by field; what the agent's own code finds in the samples is compared with what the reader does.
"""

import gzip
import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from tests.storage_fixture import describe
from tests.until import until
from vdsm import errors, ids, record, standalone
from vdsm.client import transport
from vdsm.storage import formats
from vdsm.storage.rules import findings, models, verdicts
from vdsm.virt import sysprep, template

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "repository-format.md").read_text()
SAMPLES = ROOT / "tests" / "data" / "formats" / "localfs-1.0"
EXPECTED: dict[str, Any] = json.loads((SAMPLES / "expected.json").read_text())
RECORDS = sorted(name for name, content in EXPECTED.items() if content is not None)
KINDS = {"repository": "the header", "images": "an image", "vms": "a VM"}

# -- the reader: sizes and offsets from the page, nothing from the agent

MIB = 1 << 20
AREAS = (2 * MIB, 2 * MIB + (32 << 10))
LARGEST = (32 << 10) - 56


def read(slot: bytes) -> dict[str, Any] | None:
    """The record of a slot file. Fails when a version is not in the area for its parity."""
    areas = [valid(slot[at : at + (32 << 10)]) for at in AREAS]
    found = [payload for payload in areas if payload is not None]
    assert all(areas.index(payload) == payload["version"] % 2 for payload in found)
    return max(found, key=lambda one: int(one["version"]), default=None)


def valid(area: bytes) -> dict[str, Any] | None:
    if len(area) < 56 or area[:8] != b"VDSMREC1":
        return None
    version, length = struct.unpack_from("<QI", area, 8)
    payload = area[56 : 56 + length]
    if length > LARGEST or hashlib.sha256(area[:24] + payload).digest() != area[24:56]:
        return None
    content: dict[str, Any] = json.loads(payload)
    return content if content["version"] == version else None


def names_of_lease(area: bytes) -> tuple[int, str, str]:
    """(magic, lockspace, resource) of a sanlock area."""
    (magic,) = struct.unpack_from("<I", area)
    lockspace, resource = (area[at : at + 48].rstrip(b"\0").decode() for at in (56, 104))
    return magic, lockspace, resource


def in_doubt(slot: bytes, found: dict[str, Any]) -> bool:
    """Whether nobody who owned the record lease wrote this record."""
    writer = found["writer"]
    if "lease_version" not in writer:
        return False
    host_id, generation, version = struct.unpack_from("<QQQ", slot, MIB + 32)
    same = writer["host_id"] == host_id and writer["host_generation"] in (None, generation)
    return writer["lease_version"] > version or (writer["lease_version"] == version and not same)


# -- the page's tables


def _rows(heading: str, columns: int) -> list[list[str]]:
    """The cells of the table whose first column is headed so."""
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found is not None, heading
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]
    assert all(len(row) in (columns, columns - 1) for row in rows), rows
    return rows


def _fields(heading: str) -> dict[str, str]:
    """{dotted name of a field: its type}."""
    return {name.strip("`"): kind.removesuffix("|").strip() for name, kind, *_ in _rows(heading, 3)}


TABLES = {kind: _fields(f"field of {kind}") for kind in KINDS.values()}
WORK = _fields("field of work")
STATES = [row[0].strip("`") for row in _rows("state of work", 3)]
NAMES: dict[str, list[set[str]]] = {}
for _kind, _where, *_named in _rows("kind of work", 3):
    # What stands behind a colon or in brackets describes the name before it.
    said = re.findall(r"`(\w+)`:", _named[0]) if _named else []
    NAMES.setdefault(_kind.strip("`"), []).append(set(said))
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
TYPES: dict[str, Callable[[Any], bool]] = {
    "UUID": lambda value: isinstance(value, str) and re.fullmatch(UUID, value) is not None,
    "data name": lambda value: isinstance(value, str) and re.fullmatch(UUID + r"\.[0-9a-f]{8}", value) is not None,
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "null": lambda value: value is None,
    "any": lambda value: True,
}


def fits(value: Any, kind: str) -> bool:
    """Whether the value is of a type as the page spells it."""
    for one in kind.removesuffix(", may be missing").split(" or "):
        if one in TYPES:
            if TYPES[one](value):
                return True
        elif value == json.loads(one):
            return True
    return False


def compare(found: dict[str, Any], table: dict[str, str], prefix: str = "") -> Iterator[str]:
    """What the record has and the page does not, the other way round, or in another type."""
    here = {name.removeprefix(prefix): kind for name, kind in table.items() if name.startswith(prefix)}
    direct = {name: kind for name, kind in here.items() if "." not in name}
    for name in found.keys() | direct.keys():
        if name not in direct:
            yield f"{prefix}{name} is not on the page"
        elif name not in found:
            if not direct[name].endswith("may be missing"):
                yield f"{prefix}{name} is missing"
        elif not fits(found[name], direct[name]):
            yield f"{prefix}{name} is {found[name]!r}, not {direct[name]}"
    for group in {name.partition(".")[0] for name in here if "." in name} & found.keys():
        yield from compare(found[group], table, f"{prefix}{group}.")


def wrong(directory: str, found: dict[str, Any]) -> list[str]:
    """How a record differs from what the page says of it."""
    differences = list(compare(found, TABLES[KINDS[directory]]))
    work = found.get("work")
    if work is not None:
        differences += compare(work, WORK)
        if work["state"] not in STATES or work["kind"] not in NAMES:
            differences.append(f"work {work['kind']} {work['state']} is not on the page")
        elif work["names"] and not any(work["names"].keys() <= named for named in NAMES[work["kind"]]):
            differences.append(f"names of {work['kind']}: {sorted(work['names'])}")
    return differences


# -- samples


def sample(name: str) -> bytes:
    return gzip.decompress((SAMPLES / f"{name}.gz").read_bytes())


def directory_of(name: str) -> str:
    return {"image": "images", "vm": "vms", "repository": "repository"}[name.partition("-")[0]]


@pytest.fixture(scope="module")
def shelf() -> Iterator[Path]:
    """For files that are read with direct I/O."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_reads_as_it_did(name: str) -> None:
    assert read(sample(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", RECORDS)
def test_a_sample_is_what_the_page_says(name: str) -> None:
    assert wrong(directory_of(name), EXPECTED[name]) == []


@pytest.mark.parametrize("name", EXPECTED)
def test_the_agent_reads_a_sample_like_the_page(shelf: Path, name: str) -> None:
    (shelf / "slot").write_bytes(sample(name))
    slot = record.Slot("space", "name", str(shelf / "slot"), 0)
    if EXPECTED[name] is None:
        with pytest.raises(errors.NoRecord):
            record.read(slot)
    else:
        assert record.read(slot) == EXPECTED[name]


@pytest.mark.parametrize("name", RECORDS)
def test_the_agent_writes_a_samples_record_byte_for_byte(name: str) -> None:
    written = record.encode(dict(reversed(EXPECTED[name].items())))
    at = AREAS[EXPECTED[name]["version"] % 2]
    assert sample(name)[at : at + len(written)] == written


def test_the_agent_sees_a_repository_of_samples(shelf: Path) -> None:
    place = shelf / "repo"
    put = {"image-disk": "images", "image-fenced": "images", "vm-sysprep": "vms"}
    for directory in ("images", "vms", "data"):
        (place / directory).mkdir(parents=True)
    (place / "repository").write_bytes(sample("repository"))
    for name, directory in put.items():
        (place / directory / EXPECTED[name]["id"]).write_bytes(sample(name))
    (place / "images" / ids.new()).write_bytes(sample("image-empty"))
    (place / "images" / ids.new()).write_bytes(sample("image-short"))
    seen = formats.open(describe(place, "samples"))
    assert {**seen.header(), "place": None} == {**EXPECTED["repository"], "place": None}
    assert seen.images() == {EXPECTED[name]["id"]: EXPECTED[name] for name in ("image-disk", "image-fenced")}
    assert list(seen.vms().values()) == [EXPECTED["vm-sysprep"]]
    assert len(seen.image_ids()) == 4


def test_another_format_is_left_alone(shelf: Path) -> None:
    place = shelf / "newer"
    place.mkdir()
    area = record.encode({**EXPECTED["repository"], "format": "localfs-1.1"})
    slot = sample("repository")
    (place / "repository").write_bytes(slot[: AREAS[1]] + area + slot[AREAS[1] + len(area) :])
    with pytest.raises(errors.NotARepository, match=r"localfs-1\.1"):
        formats.open(describe(place, "newer")).header()


@pytest.mark.parametrize("name", ["repository", "image-disk", "vm-ended"])
def test_leases_lie_where_the_page_says(name: str) -> None:
    check_leases(directory_of(name), sample(name), EXPECTED["repository"]["name"])


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "repository"])
def test_a_sample_was_written_by_an_owner_of_its_lease(name: str) -> None:
    assert not in_doubt(sample(name), EXPECTED[name])


def test_a_writer_is_compared_as_the_page_says() -> None:
    """The owner of the lease wrote last; of what else it could say, only an older version is right."""
    slot, found = sample("image-written"), EXPECTED["image-written"]
    writer = found["writer"]
    wrong = ({"lease_version": writer["lease_version"] + 1}, {"host_id": 2}, {"host_generation": 3})
    assert [in_doubt(slot, {"writer": {**writer, **said}}) for said in wrong] == [True, True, True]
    assert not in_doubt(slot, {"writer": {**writer, "host_id": 2, "lease_version": writer["lease_version"] - 1}})


def check_leases(directory: str, slot: bytes, space: str) -> None:
    first, second = names_of_lease(slot), names_of_lease(slot[MIB:])
    if directory == "repository":
        assert first[:2] == (0x12212010, space)
        assert second == (0x06152010, space, "repository.record")
    else:
        found = read(slot)
        assert found is not None
        assert first == (0x06152010, space, found["id"])
        assert second == (0x06152010, space, f"{found['id']}.record")


def test_samples_show_all_there_is() -> None:
    """Each field, state, kind of work and name on the page is in a sample: nothing on it is only words."""
    works = [EXPECTED[name]["work"] for name in RECORDS if EXPECTED[name].get("work")]
    assert {work["state"] for work in works} == set(STATES)
    assert {work["kind"] for work in works} == NAMES.keys()
    shown = {(work["kind"], frozenset(work["names"])) for work in works}
    told = {(kind, frozenset(names)) for kind, ways in NAMES.items() for names in ways}
    assert told <= shown
    for directory, kind in KINDS.items():
        fields = {name for sampled in RECORDS if directory_of(sampled) == directory for name in EXPECTED[sampled]}
        assert {name for name in TABLES[kind] if "." not in name} == fields
    written = {name.removeprefix("writer.") for name in TABLES["an image"] if name.startswith("writer.")}
    assert EXPECTED["image-written"]["writer"].keys() == written


def test_kinds_of_work_are_those_of_the_agent() -> None:
    """Of each job that has a record; and what the jobs on VMs name, which only real guests show."""
    of_records = {*findings.FINISHED, findings.MERGE_IMAGE, findings.OPTIMIZE_IMAGE, findings.RELINK_IMAGE}
    of_vms = {findings.MEND_VM, sysprep.KIND, template.KIND}
    assert {*of_records, *of_vms, findings.END_WORK, "clean"} == NAMES.keys()
    change = {"hidden": ids.new(), "data": "name"}
    assert (
        set(sysprep.names([{"image_id": "one", "change": change, "repository": {"name": "space"}}])) in NAMES["sysprep"]
    )
    copy = {"fields": {"id": "one", "data": {"name": "name"}}, "target": {"name": "space"}}
    assert set(template.names([copy])) in NAMES["makeTemplate"]


def test_states_are_those_of_the_agent() -> None:
    known = {*models.OPEN, models.WANTED, "done", "failed", "aborted", "interrupted", "fenced"}
    assert set(STATES) == known
    assert {verdicts.DONE, verdicts.FAILED, verdicts.ABORTED, verdicts.INTERRUPTED, verdicts.FENCED} <= known


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        (lambda area: b"\0" + area[1:], False),
        (lambda area: area[:8] + b"\xff" + area[9:], False),
        (lambda area: area[:16] + b"\xff\xff\xff\x7f" + area[20:], False),
        (lambda area: area[:20] + b"\x01" + area[21:], False),
        (lambda area: area[:24] + bytes(32) + area[56:], False),
        (lambda area: area[:60] + b"\0" + area[61:], False),
        (lambda area: area[:-1] + b"\xff", True),
    ],
    ids=["magic", "version", "length", "reserved", "checksum", "payload", "behind"],
)
def test_both_readers_agree_on_damage(spoil: Callable[[bytes], bytes], kept: bool) -> None:
    at = AREAS[EXPECTED["image-disk"]["version"] % 2]
    area = spoil(sample("image-disk")[at : at + (32 << 10)])
    assert valid(area) == record.decode(area) == (EXPECTED["image-disk"] if kept else None)


# -- what is written now


def test_what_is_written_now_is_what_the_page_says(
    stack: standalone.Stack,
    agent: transport.Client,
    repo: str,
    images: conftest.Images,
    machines: conftest.Machines,
) -> None:
    place = stack.storage_dir / repo
    disk = images.disk(userData={"any": ["thing", None]})
    below = images.snapshot(disk)
    fast = images.disk(options={"strategy": "performance"})
    noted = images.disk(options={"AutoFix": False})
    imported = images.bytes(b"content" * 1000)
    copied = agent.call("Storage.copyImage", {"targetRepoId": repo, "imageId": imported})
    images.made.append(copied["imageId"])
    conftest.done(agent, copied["jobId"])
    images.remove(below)
    images.made.remove(below)
    system = images.disk()
    vm = machines.started(disks=[{"repoId": repo, "imageId": system}], leaseRepoId=repo)
    running = look(place)
    machines.destroy(vm)
    until(lambda: look(place)["vms", vm]["forgotten"], 60)
    ended = look(place)
    assert {directory for directory, _ in running} == {"repository", "images", "vms"}
    assert {("images", one) for one in (disk, below, fast, noted, imported, system)} <= running.keys()
    for seen in (running, ended):
        assert {where: problems for where, found in seen.items() if (problems := wrong(where[0], found))} == {}
    assert running["images", below]["deleted"] and running["images", disk]["base"] == below
    assert running["images", noted]["work"]["state"] == "wanted"
    assert running["vms", vm]["exit_code"] is None and ended["vms", vm]["exit_code"] is not None


def look(place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """All records of a repository as the page says they are to be found, with their leases and data looked at."""
    files = [place / "repository", *(path for name in ("images", "vms") for path in (place / name).iterdir())]
    header = read((place / "repository").read_bytes())
    assert header is not None
    found = {}
    for path in files:
        slot = path.read_bytes()
        content = read(slot)
        if content is not None:
            directory = path.name if path.name == "repository" else path.parent.name
            assert len(slot) == 2162688 and path.stat().st_mode & 0o7777 == 0o660
            check_leases(directory, slot, header["name"])
            assert path.name in ("repository", content.get("id"))
            assert path.name == "repository" or not in_doubt(slot, content)
            found[directory, path.name] = content
            if content.get("status") in ("optimized", "degraded") and "data" in content:
                assert (place / "data" / content["data"]["name"]).is_file()
    return found
