"""Repositories on volumes, seen from two hosts, through the children and workers that the agent uses.

The volumes are files (`file_volumes.py`); with LVM the same is done in the lab.
"""

import concurrent.futures
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import file_volumes, sanlock_fixture, storage_fixture
from tests.until import until
from vdsm import errors, ids, leases, record
from vdsm.storage import formats
from vdsm.storage.formats import blocklayout
from vdsm.storage.rules import models

world = storage_fixture.world
MIB = 1 << 20


class Blocks(storage_fixture.Shelf):
    """What tests do with an image's content, whose volumes must be active for it."""

    def __init__(self, repo: file_volumes.FileBlocks, session: leases.Session) -> None:
        super().__init__(repo, session)
        self.repo: file_volumes.FileBlocks = repo

    def write(self, image_id: str, pattern: int, offset: int = 0, length: int = 65536) -> None:
        self._do(image_id, f"write -P {pattern} {offset} {length}")

    def shows(self, image_id: str, pattern: int, offset: int = 0, length: int = 65536) -> None:
        self._do(image_id, f"read -P {pattern} {offset} {length}")

    def _do(self, image_id: str, command: str) -> None:
        data = self.image(image_id)["data"]
        with self.repo.reading(self.chain(image_id)):
            storage_fixture.qemu_io(Path(self.repo.data_path(data["name"])), data["format"], command)

    def chain(self, image_id: str | None) -> list[str]:
        found = []
        while image_id is not None:
            image = self.image(image_id)
            found.append(image["data"]["name"])
            image_id = image["base"]
        return found

    def active(self) -> set[str]:
        """Volumes that are active on this host, but for the repository's own."""
        place = Path(self.repo.place, f"host-{self.repo.host_id}")
        return {path.name for path in place.iterdir()} - {blocklayout.SLOTS_VOLUME}

    def copy_of(self, image_id: str, directory: Path) -> bytes:
        """What the image shows, all of it."""
        image = self.image(image_id)
        target = directory / "shown"
        data = image["data"]
        size = {"size": image["size_bytes"]} if data["format"] == models.RAW else {}
        with self.repo.reading(self.chain(image_id)):
            path = self.repo.data_path(data["name"])
            node = {"driver": data["format"], "file": {"driver": "file", "filename": path}, **size}
            subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", str(target)], check=True)
        return target.read_bytes()


@pytest.fixture(scope="module")
def made(world: storage_fixture.World) -> file_volumes.FileBlocks:
    sanlock_fixture.use(world.run_dir)
    return file_volumes.make(world.directory / "blocks", "blocks")


@pytest.fixture
def blocks(world: storage_fixture.World, made: file_volumes.FileBlocks) -> Iterator[Blocks]:
    sanlock_fixture.use(world.run_dir)
    with leases.Session() as session:
        shelf = Blocks(made, session)
        yield shelf
        for image_id in made.images():
            shelf.change(image_id, deleted=True, base=None, work=None)
        left = [image_id for image_id in made.image_ids() if not shelf.remove(image_id)]
        held = session.held()
    assert (left, made.data_names(), held, shelf.active()) == ([], [], set(), set())


Service = storage_fixture.Service


@pytest.fixture(scope="module")
def service(world: storage_fixture.World, made: file_volumes.FileBlocks) -> Iterator[Service]:
    sanlock_fixture.use(world.run_dir)
    with Service(world, file_volumes.__name__).running() as running:
        running.storage.connect_storage_repository("blocks", file_volumes.FORMAT, {"path": made.place})
        until(lambda: running.repository("blocks")["state"] == "joined")
        yield running


def job(service: Service, begun: dict[str, Any]) -> str:
    """The image, once the job that fills it is done."""
    if begun["job_id"]:
        service.ended(begun["job_id"])
    return str(begun["image_id"])


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["space", "performance"])
def test_new_disk_shows_zeros_where_old_bytes_lay(
    service: Service, blocks: Blocks, tmp_path: Path, strategy: str
) -> None:
    made = service.storage.create_virtual_disk("blocks", 5 * MIB, options={"strategy": strategy})
    assert blocks.copy_of(made["image_id"], tmp_path) == bytes(5 * MIB)
    assert blocks.image(made["image_id"])["data"]["format"] == {"space": "qcow2", "performance": "raw"}[strategy]
    assert blocks.active() == set(), "nobody uses it"


@pytest.mark.parametrize("strategy", ["space", "performance"])
def test_disk_grows_with_zeros(service: Service, blocks: Blocks, tmp_path: Path, strategy: str) -> None:
    disk = service.storage.create_virtual_disk("blocks", MIB, options={"strategy": strategy})["image_id"]
    blocks.write(disk, 7, 0, MIB)
    service.storage.resize_virtual_disk("blocks", disk, 9 * MIB)
    assert blocks.copy_of(disk, tmp_path) == b"\x07" * MIB + bytes(8 * MIB)


@pytest.mark.parametrize("strategy", ["space", "performance"])
@pytest.mark.parametrize(("source", "target"), [("main", "blocks"), ("blocks", "main"), ("blocks", "blocks")])
def test_copy_between_formats_shows_the_same(
    service: Service, blocks: Blocks, tmp_path: Path, source: str, target: str, strategy: str
) -> None:
    disk = service.storage.create_virtual_disk(source, 3 * MIB, options={"strategy": strategy})["image_id"]
    localfs = storage_fixture.Shelf(service.world.main, blocks.session)
    shelves = {"main": localfs, "blocks": blocks}
    shelves[source].write(disk, 9, MIB, MIB)
    snapshot = service.storage.create_snapshot(source, disk)["image_id"]
    shelves[source].write(disk, 5, 0, 65536)
    copies = [
        job(service, service.storage.copy_image(target, image_id, options={"strategy": strategy}))
        for image_id in ((disk,) if source == target else (snapshot, disk))
    ]
    shelves[target].shows(copies[-1], 5, 0, 65536)
    for copy in copies:
        shelves[target].shows(copy, 9, MIB, MIB)
        shelves[target].shows(copy, 0, 2 * MIB, MIB)
    if "main" in (source, target):
        service.world.empty()


def test_copy_that_failed_half_way_leaves_old_bytes_that_the_next_one_does_not_show(
    service: Service, blocks: Blocks, tmp_path: Path
) -> None:
    disk = service.storage.create_virtual_disk("blocks", 4 * MIB, options={"strategy": "performance"})["image_id"]
    target = ids.new()
    with blocks.repo.making(models.data_name(target), 4 * MIB) as path:
        Path(path).write_bytes(b"x" * 4 * MIB)
    begun = service.storage.copy_image("blocks", disk, options={"strategy": "performance", "image_id": target})
    assert blocks.copy_of(job(service, begun), tmp_path) == bytes(4 * MIB)
    left = [
        name
        for name in blocks.repo.data_names()
        if name not in {i["data"]["name"] for i in blocks.repo.images().values()}
    ]
    for name in left:
        blocks.repo.remove_data(name)


def test_difference_is_stored_to_a_base_on_volumes(service: Service, blocks: Blocks) -> None:
    localfs = storage_fixture.Shelf(service.world.main, blocks.session)
    disk = localfs.disk(4 * MIB)
    localfs.write(disk, 1, 0, MIB)
    first = job(service, service.storage.copy_image("blocks", disk))
    localfs.write(disk, 2, 2 * MIB, MIB)
    second = job(service, service.storage.copy_image("blocks", disk, base_image_id=first))
    assert blocks.image(second)["base"]
    blocks.shows(second, 1, 0, MIB)
    blocks.shows(second, 2, 2 * MIB, MIB)
    blocks.shows(first, 0, 2 * MIB, MIB)
    again = job(service, service.storage.copy_image("main", second))
    localfs.shows(again, 2, 2 * MIB, MIB)
    service.world.empty()


@pytest.mark.parametrize("strategy", ["space", "performance"])
def test_import_of_a_file_that_ends_within_a_block(
    service: Service, blocks: Blocks, world: storage_fixture.World, tmp_path: Path, strategy: str
) -> None:
    (world.import_dir / "odd.raw").write_bytes(b"q" * (MIB + 512))
    begun = service.storage.import_image(
        "blocks", str(world.import_dir / "odd.raw"), "raw", options={"strategy": strategy}
    )
    assert blocks.copy_of(job(service, begun), tmp_path) == b"q" * (MIB + 512) + bytes(3584)


def test_export_has_the_images_size(service: Service, blocks: Blocks, world: storage_fixture.World) -> None:
    disk = service.storage.create_virtual_disk("blocks", MIB, options={"strategy": "performance"})["image_id"]
    blocks.write(disk, 3, 0, 4096)
    target = world.export_dir / "out.raw"
    service.ended(service.storage.export_image("blocks", disk, str(target), "raw")["job_id"])
    assert target.read_bytes() == b"\x03" * 4096 + bytes(MIB - 4096)
    target.unlink()


@pytest.mark.parametrize("strategy", ["space", "performance"])
@pytest.mark.parametrize("grown", [False, True], ids=["same size", "grown"])
def test_merge_of_a_deleted_snapshot(
    service: Service, blocks: Blocks, tmp_path: Path, strategy: str, grown: bool
) -> None:
    disk = service.storage.create_virtual_disk("blocks", 2 * MIB, options={"strategy": strategy})["image_id"]
    blocks.write(disk, 1, 0, MIB)
    snapshot = service.storage.create_snapshot("blocks", disk)["image_id"]
    blocks.write(disk, 2, MIB, 65536)
    if grown:
        service.storage.resize_virtual_disk("blocks", disk, 6 * MIB)
    shown = blocks.copy_of(disk, tmp_path)
    service.storage.remove_image("blocks", snapshot)
    (fix,) = [found for found in service.storage.check_storage_repository("blocks") if found["type"] == "merge"]
    service.ended(service.storage.fix_storage_repository("blocks", fix)["job_id"])
    assert blocks.copy_of(disk, tmp_path) == shown
    assert blocks.image(disk)["base"] is None and len(blocks.repo.data_names()) == 1
    assert blocks.active() == set()


def test_optimize_makes_raw_data(service: Service, blocks: Blocks, tmp_path: Path) -> None:
    disk = service.storage.create_virtual_disk("blocks", 2 * MIB, options={"strategy": "performance"})["image_id"]
    service.storage.create_snapshot("blocks", disk)
    blocks.write(disk, 4, MIB, 65536)
    shown = blocks.copy_of(disk, tmp_path)
    (fix,) = service.storage.check_storage_repository("blocks")
    assert fix["type"] == "optimize"
    service.ended(service.storage.fix_storage_repository("blocks", fix)["job_id"])
    assert blocks.image(disk)["data"]["format"] == "raw" and blocks.copy_of(disk, tmp_path) == shown


def test_full_group_is_told_and_nothing_is_left(service: Service, blocks: Blocks) -> None:
    with pytest.raises(errors.RepositoryFull):
        service.storage.create_virtual_disk("blocks", file_volumes.GROUP_BYTES, options={"strategy": "performance"})
    assert blocks.repo.data_names() == [] and blocks.repo.images() == {}


def test_base_is_not_split_again_when_nothing_was_written_since(service: Service, blocks: Blocks) -> None:
    """A volume takes its room whether anything is in it or not."""
    base = service.storage.create_virtual_disk("blocks", MIB)["image_id"]
    disk = service.storage.create_virtual_disk("blocks", MIB)["image_id"]
    for _ in range(2):
        job(service, service.storage.copy_image("blocks", disk, base_image_id=base))
    hidden = [image for image in blocks.repo.images().values() if image["deleted"]]
    assert len(hidden) == 1


def test_making_volumes_may_take_longer_than_reading(
    service: Service, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands of LVM wait for those of other hosts."""
    children = service.storage._connections.get("blocks").children
    monkeypatch.setattr(children, "_deadline_s", 0.5)  # nobody wants to wait longer
    group = file_volumes.FileGroup(blocks.repo.place, 2)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        with group._metadata():
            making = thread.submit(service.storage.create_virtual_disk, "blocks", MIB)
            with pytest.raises(errors.RepositoryStuck):
                service.storage.list_images("blocks")
            assert not making.done()
        assert blocks.image(making.result(30)["image_id"])["status"] == "optimized"


# -- slots and leases --------------------------------------------------------------------------------------------------


def test_leases_of_vms(service: Service, blocks: Blocks) -> None:
    vm_id = ids.new()
    info = service.storage.create_lease("blocks", vm_id)
    assert info["path"].endswith("/vdsm") and info["offset"] % (3 * MIB) == 0 and info["offset"] > 0
    with pytest.raises(errors.IdTaken):
        service.storage.create_virtual_disk("blocks", MIB, options={"image_id": vm_id})
    held = [blocks.repo.vm_slot(vm_id).data_lease()]
    with leases.Session() as vm, vm.holding(held, 1), pytest.raises(errors.LeaseHeld):
        service.storage.delete_lease("blocks", vm_id)
    service.storage.delete_lease("blocks", vm_id)
    assert blocks.repo.vm_ids() == []
    with pytest.raises(errors.NoSuchLease):
        service.storage.lease_info("blocks", vm_id)


def test_slot_that_was_given_to_another_is_not_taken_for_the_old_one(
    blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = blocks.disk()
    slot = blocks.repo.slot(gone)
    blocks.remove(gone)
    other = blocks.disk()
    assert (blocks.repo.slot(other).path, blocks.repo.slot(other).offset) == (slot.path, slot.offset)
    for lease in (slot.data_lease(), slot.record_lease()):
        with pytest.raises(errors.LeaseFailed) as refused:
            blocks.session.acquire([lease], 1)
        assert refused.value.facts["errno"] in leases.WRONG_NAME
    with monkeypatch.context() as late:  # it was looked up a moment before
        late.setattr(blocks.repo, "slot", lambda image_id: slot)
        assert blocks.repo.find(gone) is None
        with pytest.raises(errors.NoSuchImage):
            blocks.repo.update(blocks.session, gone, lambda known: known)
        with pytest.raises(errors.NoSuchImage), blocks.repo.owning(blocks.session, exclusive=[gone]):
            pass


def test_slots_are_given_out_and_taken_back_by_one_at_a_time(blocks: Blocks) -> None:
    """Trap 51: two hosts that look for a free slot at the same moment find the same one."""
    slot, new = blocks.repo.allocate(blocks.session, ids.new()), ids.new()
    with (
        leases.Session() as other,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
        blocks.session.holding([slot.data_lease()], 1),
    ):
        for change in (
            lambda: blocks.repo.allocate(blocks.session, new),
            lambda: blocks.repo.free(blocks.session, slot),
        ):
            with other.holding([blocks.repo.lease()], 1):
                before = blocks.repo.image_ids()
                changed = thread.submit(change)
                with pytest.raises(concurrent.futures.TimeoutError):
                    changed.result(0.5)
                assert blocks.repo.image_ids() == before
            changed.result(10)
    assert blocks.repo.image_ids() == [new]
    last = blocks.repo.slot(new)
    with blocks.session.holding([last.data_lease()], 1):
        blocks.repo.free(blocks.session, last)


def test_slot_is_not_taken_back_under_a_writer_of_its_record(blocks: Blocks) -> None:
    slot = blocks.repo.allocate(blocks.session, ids.new())
    with leases.Session() as writer, concurrent.futures.ThreadPoolExecutor(1) as thread:
        with blocks.session.holding([slot.data_lease()], 1), writer.holding([slot.record_lease()], 1):
            taken_back = thread.submit(blocks.repo.free, blocks.session, slot)
            with pytest.raises(concurrent.futures.TimeoutError):
                taken_back.result(0.5)
            assert slot.name in blocks.repo.image_ids()
            writer.release([slot.record_lease()])
            taken_back.result(10)
        assert blocks.repo.image_ids() == []
        with pytest.raises(errors.LeaseFailed):
            writer.acquire([slot.record_lease()], 1)


def test_new_slot_has_nothing_of_what_lay_there_before(blocks: Blocks) -> None:
    """As after another repository on the same devices."""
    made = [blocks.repo.allocate(blocks.session, ids.new())]
    while blocks.repo._table().unused()[1]:
        made.append(blocks.repo.allocate(blocks.session, ids.new()))
    last = made[-1]
    record.create(last, {"id": last.name})
    with Path(last.path).open("r+b") as volume:
        volume.seek(last.offset)
        old = volume.read(blocklayout.SLOT_BYTES)
        volume.seek(last.offset + blocklayout.SLOT_BYTES)
        volume.write(old)
    made.append(blocks.repo.allocate(blocks.session, ids.new()))
    assert made[-1].offset == last.offset + blocklayout.SLOT_BYTES
    with pytest.raises(errors.NoRecord):
        record.read(made[-1])
    for slot in made:
        with blocks.session.holding([slot.data_lease(), slot.record_lease()], 1):
            blocks.repo.free(blocks.session, slot)


def test_slots_grow_for_both_hosts(blocks: Blocks) -> None:
    """More slots than the volume was made for; what another host has made is seen when it is asked for."""
    other = formats.open({**file_volumes.describe(Path(blocks.repo.place), "blocks", 2), "name": blocks.repo.name})
    group = file_volumes.FileGroup(blocks.repo.place, 2)
    group.activate(blocklayout.SLOTS_VOLUME)
    made = [ids.new() for _ in range(blocklayout.SLOTS_AT_ONCE + 3)]
    for vm_id in made:
        blocks.repo.allocate_vm(blocks.session, vm_id)
    assert sorted(other.vm_ids()) == sorted(made)
    places = {other.vm_slot(vm_id).offset for vm_id in made}
    assert len(places) == len(made) and max(places) >= blocklayout.SLOTS_AT_ONCE * 3 * MIB
    for vm_id in made:
        slot = other.vm_slot(vm_id)
        assert other.find_vm(vm_id) is None, "a new slot has no record of old bytes"
        with blocks.session.holding([slot.data_lease()], 1):
            blocks.repo.free(blocks.session, slot)
    group.deactivate(blocklayout.SLOTS_VOLUME)
    assert blocks.repo.vm_ids() == []


# -- volumes -----------------------------------------------------------------------------------------------------------


def test_volume_that_is_active_elsewhere_stays_listed(service: Service, blocks: Blocks) -> None:
    disk = blocks.disk()
    name = blocks.image(disk)["data"]["name"]
    elsewhere = file_volumes.FileGroup(blocks.repo.place, 2)
    elsewhere.activate(name)
    service.storage.remove_image("blocks", disk)
    (fix,) = service.storage.check_storage_repository("blocks")
    assert (fix["type"], fix["image_id"]) == ("clean", disk) and blocks.repo.data_names() == [name]
    elsewhere.deactivate(name)
    service.ended(service.storage.fix_storage_repository("blocks", fix)["job_id"])
    assert blocks.repo.data_names() == [] and blocks.repo.images() == {}


def test_who_comes_last_deactivates(blocks: Blocks) -> None:
    name = blocks.image(blocks.disk())["data"]["name"]
    with blocks.repo.reading([name]):
        with blocks.repo.reading([name]):
            assert blocks.active() == {name}
        assert blocks.active() == {name}, "taken from under its other user"
        with pytest.raises(errors.ImageInUse):
            blocks.repo.remove_data(name)
    assert blocks.active() == set()


def test_what_a_dead_process_left_active_is_found(blocks: Blocks) -> None:
    name = blocks.image(blocks.disk())["data"]["name"]

    def dies() -> None:
        with blocks.repo.reading([name]):
            storage_fixture.os.kill(storage_fixture.os.getpid(), 9)

    storage_fixture.killed(dies)
    assert blocks.active() == {name}
    assert blocks.repo.sweep() == [name]
    assert blocks.active() == set()


def test_disks_of_a_vm_stay_until_it_has_them_open_no_more(service: Service, blocks: Blocks) -> None:
    disk = service.storage.create_virtual_disk("blocks", MIB, options={"strategy": "performance"})["image_id"]
    service.storage.create_snapshot("blocks", disk)
    plan = service.storage.plan_disk(disk, None, writable=True)
    assert plan.is_volume and set(plan.names) == set(blocks.chain(disk))
    assert [link["size_bytes"] for link in plan.backing] == [MIB] and blocks.active() == set()
    with service.storage.keeping([plan]):
        assert {plan.path, *(link["path"] for link in plan.backing)} == set(map(blocks.repo.data_path, blocks.active()))
        assert blocks.repo.sweep() == [], "it is being started"
    opened = [file_volumes.FileGroup(blocks.repo.place, 1).opened / name for name in plan.names]
    for path in opened:
        path.touch()
    assert blocks.repo.sweep() == [] and len(blocks.active()) == 2, "QEMU has them open"
    for path in opened:
        path.unlink()
    assert set(blocks.repo.sweep()) == set(plan.names)


# -- format ------------------------------------------------------------------------------------------------------------


def test_format_takes_only_an_empty_group(blocks: Blocks, world: storage_fixture.World, tmp_path: Path) -> None:
    with pytest.raises(errors.NotEmpty, match=blocks.repo.name):
        formats.open(file_volumes.describe(Path(blocks.repo.place), "again")).format_(1)
    strange = tmp_path / "strange"
    file_volumes.FileGroup(str(strange), 1).create("root", MIB)
    with pytest.raises(errors.NotEmpty, match="root"):
        formats.open(file_volumes.describe(strange, "strange")).format_(1)


def test_format_that_died_is_done_anew(world: storage_fixture.World, tmp_path: Path) -> None:
    sanlock_fixture.use(world.run_dir)
    place = tmp_path / "died"

    def dies() -> None:
        storage_fixture.dies_before(record, "create")
        formats.open(file_volumes.describe(place, "died")).format_(1)

    storage_fixture.killed(dies)
    repo = formats.open(file_volumes.describe(place, "died"))
    with pytest.raises(errors.NotARepository):
        repo.header()
    header = repo.format_(1)
    assert repo.header()["name"] == header["name"] and repo.image_ids() == []
