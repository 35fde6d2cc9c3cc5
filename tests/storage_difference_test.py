"""copyImage with a base: the difference is stored, whatever the two have in common (traps 34 to 36, 42)."""

import hashlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import storage_fixture
from tests.until import until
from vdsm import errors, ids, leases, record
from vdsm.jobs import job
from vdsm.storage import repository
from vdsm.storage.files import qemuimg
from vdsm.storage.formats import filelayout
from vdsm.storage.rules import chain
from vdsm.storage.steps import intents, removal

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service, World = storage_fixture.Shelf, storage_fixture.Service, storage_fixture.World

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def other(shelf: Shelf, world: World) -> Shelf:
    """The repository that the copies go to."""
    return Shelf(world.other, shelf.session)


def whole(shelf: Shelf, image_id: str) -> str:
    """What the image shows, read along its records."""
    images = chain.down(image_id, shelf.repo.find)
    layers = [qemuimg.Layer(shelf.repo.data_path(one["data"]["name"]), one["data"]["format"]) for one in images]
    out = Path(shelf.repo.place).parent / "whole.raw"
    try:
        subprocess.run(["qemu-img", "convert", "-O", "raw", qemuimg.source(layers), out], check=True)
        with out.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    finally:
        out.unlink(missing_ok=True)


def info(path: Path) -> dict[str, Any]:
    """What the header says."""
    command = ["qemu-img", "info", "--output", "json", "-f", "qcow2", path]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def io(shelf: Shelf, image_id: str, *commands: str) -> None:
    """Does what a guest would do."""
    given = [word for command in commands for word in ("-c", command)]
    argv = ["qemu-io", "-f", shelf.image(image_id)["data"]["format"], *given, str(shelf.data(image_id))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def copied(service: Service, source: str, base: str | None = None, to: str = "other", **options: Any) -> str:
    """The copy's id, when it is done."""
    begun = service.storage.copy_image(to, source, options=options, base_image_id=base)
    service.ended(begun["job_id"])
    return str(begun["image_id"])


# -- content ---------------------------------------------------------------------------------------------------------

# What happens between the first and the second copy.
CHANGES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "written over": ("write -P 9 1M 1M",),
    "unaligned": ("write -P 9 4999 70001", "write -P 9 3071k 3"),
    "zeros over data": ("write -z 512k 1M", "write -P 0 2M 100k"),
    "discarded": ("discard 0 1M", "discard 2M 64k"),
    "same again": ("write -P 1 0 1M",),
    "behind the old end": ("truncate 9M", "write -P 9 8M 512k"),
    "an odd end": ("truncate 8396800", "write -P 9 8392704 4096"),
    "all of it": (
        *("write -P 9 4999 70001", "write -z 512k 1M", "discard 2M 64k", "write -P 2 3M 64k"),
        *("truncate 8396800", "write -P 9 8392704 4096"),
    ),
}


@pytest.mark.parametrize(
    ("change", "base"),
    [*((change, "whole") for change in CHANGES), *(("all of it", base) for base in ("chain", "raw", "stranger"))],
)
def test_difference_shows_what_the_source_does(
    service: Service, shelf: Shelf, other: Shelf, change: str, base: str
) -> None:
    disk = shelf.disk(8 * MIB)
    io(shelf, disk, "write -P 1 0 1M", "write -P 2 1M 3M", "write -P 3 7M 1M")
    if base == "stranger":  # nothing that the two have in common is known
        first = other.disk(8 * MIB)
        io(other, first, "write -P 2 1M 3M", "write -P 7 5M 1M")
    else:
        first = copied(service, disk, strategy="performance" if base == "raw" else "space")
    if base == "chain":
        first = copied(service, shelf.snapshot(disk), first)
    io(shelf, disk, *CHANGES[change])
    shelf.change(disk, size_bytes=info(shelf.data(disk))["virtual-size"])
    before, content, base_content = shelf.image(disk), whole(shelf, disk), whole(other, first)

    second = copied(service, disk, first)

    assert whole(other, second) == content
    assert whole(other, first) == base_content
    assert shelf.image(disk) == before and whole(shelf, disk) == content
    image = other.image(second)
    assert (image["kind"], image["status"], image["generation"]) == ("disk", "optimized", 1)
    assert image["size_bytes"] == before["size_bytes"]
    if change in ("nothing", "same again"):
        assert other.repo.allocated_bytes(image["data"]["name"]) < MIB


def test_only_what_differs_is_stored(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk(64 * MIB)
    io(shelf, disk, "write -P 1 0 48M")
    shelf.snapshot(disk)
    first = copied(service, disk)
    io(shelf, disk, "write -P 2 10M 1M", "write -P 1 20M 8M")  # the second writes what is there
    second = copied(service, disk, first)
    stored = service.storage.get_image("other", second)["stored_size"]
    assert MIB <= stored < 2 * MIB
    assert whole(other, second) == whole(shelf, disk)


def test_header_names_the_base_and_nothing_else(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk(4 * MIB)
    first = copied(service, shelf.snapshot(disk))
    io(shelf, disk, "write -P 4 0 1M")
    second = copied(service, disk, first)
    header = info(other.data(second))
    assert header["backing-filename"] == other.image(first)["data"]["name"]
    assert header["backing-filename-format"] == other.image(first)["data"]["format"]
    assert header["full-backing-filename"] == str(other.data(first))


def test_headers_of_the_base_are_not_asked(service: Service, shelf: Shelf, other: Shelf, world: World) -> None:
    """Records rule (trap 42): a header in the base's chain names a stranger's file."""
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    first = copied(service, shelf.snapshot(disk))
    io(shelf, disk, "write -P 2 1M 64k")
    middle = copied(service, shelf.snapshot(disk), first)
    stranger = world.directory / "stranger"
    stranger.write_bytes(b"\xee" * 4 * MIB)
    relabel = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", stranger, "-F", "raw", other.data(middle)]
    subprocess.run(relabel, check=True)
    io(shelf, disk, "write -P 3 2M 64k")

    last = copied(service, disk, middle)

    assert whole(other, last) == whole(shelf, disk)
    assert other.repo.allocated_bytes(other.image(last)["data"]["name"]) < MIB
    stranger.unlink()


def test_deep_base_is_named_layer_by_layer(service: Service, shelf: Shelf, other: Shelf) -> None:
    """Deeper than what a header could name at once."""
    disk = other.disk(4 * MIB)
    layers = [f"write -P {number} {number * 64}k 64k" for number in range(1, 11)]
    for layer in layers:
        io(other, disk, layer)
        base = other.snapshot(disk)
    source = shelf.disk(4 * MIB)
    io(shelf, source, *layers, "write -P 99 0 4k")
    copy = copied(service, source, base)
    assert whole(other, copy) == whole(shelf, source)
    assert other.repo.allocated_bytes(other.image(copy)["data"]["name"]) < 512 * KIB


def test_base_and_source_may_be_in_one_repository(service: Service, shelf: Shelf) -> None:
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    snapshot = shelf.snapshot(disk)
    io(shelf, disk, "write -P 2 1M 1M")
    before = shelf.image(disk)
    copy = copied(service, disk, snapshot, to="main")
    assert (shelf.image(copy)["base"], shelf.image(disk)) == (snapshot, before)
    assert whole(shelf, copy) == whole(shelf, disk)


# -- the base --------------------------------------------------------------------------------------------------------


def test_disk_as_base_is_split_and_may_be_written_and_removed(service: Service, shelf: Shelf, other: Shelf) -> None:
    """Its data becomes a hidden snapshot; both lie on that (trap 35)."""
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    first = copied(service, disk)
    io(shelf, disk, "write -P 2 1M 64k")
    before, known = other.image(first), service.storage.list_images("other")

    second = copied(service, disk, first)

    hidden = other.image(second)["base"]
    assert other.image(first)["base"] == hidden
    assert (other.image(hidden)["deleted"], other.image(hidden)["status"]) == (True, "optimized")
    assert other.image(hidden)["data"] == before["data"]
    assert len(service.storage.list_images("other")) == len(known) + 1
    content = whole(other, second)
    io(other, first, "write -P 8 0 4M")
    assert whole(other, second) == content == whole(shelf, disk)
    service.storage.remove_image("other", first)
    assert whole(other, second) == content
    service.storage.remove_image("other", second)
    assert other.files() == set()


def test_disk_that_was_not_written_since_is_split_once(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    first = copied(service, disk)
    second, third = copied(service, disk, first), copied(service, disk, first)
    assert other.image(second)["base"] == other.image(third)["base"] == other.image(first)["base"]
    io(other, first, "write -z 0 4k")
    fourth = copied(service, disk, first)
    assert other.image(fourth)["base"] == other.image(first)["base"] != other.image(third)["base"]
    for copy in (second, third, fourth):
        assert whole(other, copy) == whole(shelf, disk)


def test_base_in_use_is_refused_with_nothing_begun(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk, base = shelf.disk(), other.disk()
    before, files = other.image(base), other.files()
    with leases.Session() as vm, vm.holding([other.repo.slot(base).data_lease()], 1):
        service.storage.set_holder_lookup(lambda image_id: "VM web (4711)" if image_id == base else None)
        with pytest.raises(errors.ImageInUse) as refused:
            service.storage.copy_image("other", disk, base_image_id=base)
        service.storage.set_holder_lookup(lambda image_id: None)
    assert refused.value.facts == {"image_id": base, "holder": "VM web (4711)"}
    assert (other.image(base), other.files()) == (before, files)


def bad_base(case: str, service: Service, shelf: Shelf, other: Shelf, disk: str) -> str:
    if case == "missing":
        return ids.new()
    if case == "not here":
        return shelf.snapshot(shelf.disk())
    if case == "itself":
        return disk
    if case == "broken":
        return str(other.begin_copy()["image_id"])
    base = other.disk(2 * MIB if case == "larger" else MIB)
    if case == "deleted":
        base = other.snapshot(base)
        other.remove(base)
    return base


@pytest.mark.parametrize(
    ("case", "refusal"),
    [
        ("missing", errors.NoSuchImage),
        ("not here", errors.NoSuchImage),
        ("broken", errors.ImageBusy),
        ("deleted", errors.ImageNotUsable),
        ("larger", errors.InvalidParameters),
        ("itself", errors.InvalidParameters),
    ],
)
def test_bad_base_is_refused_with_nothing_begun(
    service: Service, shelf: Shelf, other: Shelf, case: str, refusal: type[errors.VdsmError]
) -> None:
    disk = shelf.disk()
    base = bad_base(case, service, shelf, other, disk)
    to = "main" if case == "itself" else "other"
    files = shelf.files() | other.files()
    with pytest.raises(refusal) as refused:
        service.storage.copy_image(to, disk, base_image_id=base)
    assert base in str(refused.value.facts) or refused.value.facts["parameter"] == "baseImageId"
    assert shelf.files() | other.files() == files


def test_for_speed_the_whole_is_stored_and_the_base_left_alone(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    first = copied(service, disk)
    before = other.image(first)
    second = copied(service, disk, first, strategy="performance")
    image = other.image(second)
    assert (image["base"], image["data"]["format"], image["status"]) == (None, "raw", "optimized")
    assert other.image(first) == before
    with pytest.raises(errors.NoSuchImage):
        service.storage.copy_image("other", disk, options={"strategy": "performance"}, base_image_id=ids.new())


def test_same_request_again_is_the_same_copy(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk()
    first, chosen = copied(service, disk), {"image_id": ids.new(), "job_id": ids.new()}
    copied(service, disk, first, **chosen)
    files = other.files()
    again = service.storage.copy_image("other", disk, options=chosen, base_image_id=first)
    assert (again, other.files()) == ({**chosen, "job_id": None}, files)
    with pytest.raises(errors.ImageExists):
        service.storage.copy_image("other", disk, options=chosen)


def test_base_is_held_until_the_record_names_it(shelf: Shelf, other: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed and cleaned between the check and the record, it would be gone under the copy (trap 36)."""
    disk = shelf.disk()
    base = shelf.snapshot(disk)
    shelf.remove(disk)  # nobody else needs it
    create, tried = record.create, []

    def late(slot: record.Slot, fields: record.Record) -> record.Record:
        with leases.Session() as remover:
            tried.append(removal.remove_image(shelf.repo, remover, {"image_id": base, "generation": None})["cleaned"])
        return create(slot, fields)

    monkeypatch.setattr(record, "create", late)
    copy = shelf.begin_copy(base=base)["image_id"]
    monkeypatch.undo()
    assert tried == [[]]
    assert shelf.image(copy)["base"] == base and shelf.repo.find(base) is not None


# -- killed ----------------------------------------------------------------------------------------------------------

STEPS: dict[str, tuple[object, str, int]] = {
    "before the hidden snapshot's slot": (filelayout.FileLayout, "allocate", 1),
    "before its record": (record, "create", 1),
    "before the base's intent": (repository.Repository, "update", 1),
    "before the overlay": (filelayout.FileLayout, "making", 1),
    "before the snapshot is done": (repository.Repository, "update", 2),
    "before the base is done": (repository.Repository, "update", 3),
    "before the target's slot": (filelayout.FileLayout, "allocate", 2),
    "before the target's record": (record, "create", 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_request_that_is_killed_leaves_the_base_whole(shelf: Shelf, step: str) -> None:
    base = shelf.disk(2 * MIB)
    io(shelf, base, "write -P 1 0 1M")
    content = whole(shelf, base)
    asked = {"image_id": ids.new(), "base": base, "size_bytes": 2 * MIB}

    def inside() -> None:
        with leases.Session() as session:
            storage_fixture.dies_before(*STEPS[step])
            Shelf(shelf.repo, session).begin_copy(**asked)

    storage_fixture.killed(inside)

    intents.roll_forward(shelf.repo, shelf.session, {"image_id": base})
    assert (shelf.image(base)["status"], whole(shelf, base)) == ("optimized", content)
    assert shelf.repo.find(asked["image_id"]) is None
    shelf.begin_copy(**asked)
    hidden = shelf.image(asked["image_id"])["base"]
    assert hidden == shelf.image(base)["base"] and whole(shelf, hidden) == content
    shelf.change(asked["image_id"], work=None)
    for image_id in (asked["image_id"], base):
        shelf.remove(image_id)
    for image_id in shelf.repo.images():  # one that nobody came to need is deleted from the start
        removal.clean(shelf.repo, shelf.session, image_id)
    assert (shelf.repo.images(), shelf.repo.data_names()) == ({}, [])


@pytest.fixture
def large(service: Service, shelf: Shelf) -> Iterator[tuple[str, str]]:
    """(a disk, a base in the other repository): comparing them takes long enough to be met on the way."""
    disk = shelf.disk(256 * MIB, strategy="performance")
    io(shelf, disk, "write -P 1 0 256M")
    base = copied(service, disk)
    io(shelf, disk, "write -P 2 0 128M")
    yield disk, base


def mended(service: Service, image_id: str) -> job.Info:
    """The job of the fix that a check offers for the broken image, as it has ended."""
    (found,) = [fix for fix in service.storage.check_storage_repository("other") if fix["image_id"] == image_id]
    assert found["type"] == "mend"
    fix = {"type": found["type"], "data": found["data"]}
    return service.ended(service.storage.fix_storage_repository("other", fix)["job_id"])


def test_copy_of_a_source_that_has_grown_since_is_not_mended(service: Service, shelf: Shelf, other: Shelf) -> None:
    disk = shelf.disk()
    base = copied(service, disk)
    begun = service.storage.copy_image("other", disk, options={"auto_fix": False}, base_image_id=base)
    service.storage.resize_virtual_disk("main", disk, 2 * MIB)
    with pytest.raises(errors.CannotMend):
        mended(service, begun["image_id"])
    assert other.image(begun["image_id"])["status"] == "broken"


@pytest.mark.parametrize("end", ["killed", "aborted"])
def test_difference_that_ends_half_way_leaves_the_base_whole(
    service: Service, shelf: Shelf, other: Shelf, large: tuple[str, str], end: str
) -> None:
    disk, base = large
    content = whole(other, base)
    begun = service.storage.copy_image("other", disk, base_image_id=base)
    until(lambda: service.jobs.get(begun["job_id"])["stage_name"] == "copy")
    if end == "killed":
        (worker,) = leases.local_pids(other.repo.slot(begun["image_id"]).data_lease())
        os.kill(worker, signal.SIGKILL)
        service.ended(begun["job_id"], "failed")
        image = other.image(begun["image_id"])
        assert (image["status"], image["work"]["state"]) == ("broken", "failed")
        assert image["work"]["names"]["source"] == {"repo": shelf.repo.name, "image_id": disk}
        assert whole(other, base) == content
        mended(service, begun["image_id"])
        assert other.image(begun["image_id"])["status"] == "optimized"
        assert whole(other, begun["image_id"]) == whole(shelf, disk)
        service.storage.remove_image("other", begun["image_id"])
    else:
        service.jobs.abort(begun["job_id"])
        service.ended(begun["job_id"], "aborted")
    assert other.repo.find(begun["image_id"]) is None
    assert whole(other, base) == content
    assert len(other.repo.data_names()) == 2  # the base's, and its hidden snapshot's


def test_half_made_difference_is_made_anew(service: Service, shelf: Shelf, other: Shelf) -> None:
    """Its worker died: what is there is never opened, only replaced."""
    disk = shelf.disk(4 * MIB)
    io(shelf, disk, "write -P 1 0 1M")
    base = copied(service, shelf.snapshot(disk))
    io(shelf, disk, "write -P 2 1M 1M")
    asked = {"image_id": ids.new(), "job_id": ids.new()}
    other.begin_copy(**asked, base=base, size_bytes=4 * MIB)
    half = Path(other.repo.data_path(other.image(asked["image_id"])["data"]["name"]))
    half.write_bytes(b"QFI\xfb" + random.randbytes(200_000))

    layers = chain.down(disk, shelf.repo.find)
    argument = {"target": service.storage.description("other"), "source": service.storage.description("main")}
    service.jobs.add(
        job.JobRequest(
            kind="copyImage",
            job_id=asked["job_id"],
            job_type="storage",
            description="a test",
            entity={"type": "image", "id": asked["image_id"], "repo_id": "other"},
            argument={**argument, "image_id": asked["image_id"], "layers": layers},
        )
    )
    service.ended(asked["job_id"])
    assert whole(other, asked["image_id"]) == whole(shelf, disk)
