"""checkStorageRepository and fixStorageRepository through the wire, on real data.

What an image holds is judged by a reader that is not the code under test: qemu-img, with the chain built here from the
records, into raw bytes and their checksum.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import conftest
from tests.until import until
from vdsm import ids, record, standalone
from vdsm.client import failures, transport

MIB = 1 << 20


class Shop(conftest.Images):
    """Images of a repository, with a look at what is on disk, and its fixes."""

    def __init__(self, client: transport.Client, repo_id: str, stack: standalone.Stack) -> None:
        super().__init__(client, repo_id, stack.import_dir)
        self.stack = stack
        self.place = stack.storage_dir / repo_id

    # -- what is on disk

    def record(self, image_id: str) -> dict[str, Any]:
        return record.read(record.Slot("", image_id, str(self.place / "images" / image_id), 0))

    def exists(self, image_id: str) -> bool:
        return (self.place / "images" / image_id).exists()

    def data(self) -> set[str]:
        return {path.name for path in (self.place / "data").iterdir()}

    def chain(self, image_id: str) -> str:
        """The name of the image for qemu-img: every file and format as the records have them."""
        image = self.record(image_id)
        node: dict[str, Any] = {"driver": image["data"]["format"]}
        node["file"] = {"driver": "file", "filename": str(self.place / "data" / image["data"]["name"])}
        if node["driver"] == "qcow2":
            base = image["base"]
            node["backing"] = json.loads(self.chain(base).removeprefix("json:")) if base else None
        return f"json:{json.dumps(node)}"

    def write(self, image_id: str, *commands: str) -> None:
        """Writes as a guest would; commands of qemu-io."""
        options = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(["qemu-io", *options, self.chain(image_id)], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr

    def sum(self, image_id: str) -> str:
        """SHA-256 of all that the image shows."""
        with tempfile.TemporaryDirectory() as directory:
            raw = Path(directory, "raw")
            convert = ["qemu-img", "convert", "-O", "raw", self.chain(image_id), str(raw)]
            subprocess.run(convert, check=True, capture_output=True)
            with raw.open("rb") as source:
                return hashlib.file_digest(source, "sha256").hexdigest()

    def header(self, image_id: str) -> str:
        """What the header of the image's data names as its backing."""
        path = self.place / "data" / self.record(image_id)["data"]["name"]
        asked = ["qemu-img", "info", "-U", "--output", "json", "-f", "qcow2", str(path)]
        told = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
        return str(told.get("backing-filename"))

    # -- fixes

    def check(self, **options: Any) -> list[dict[str, Any]]:
        found = self.client.call("Storage.checkStorageRepository", {"repositoryId": self.repo_id, "options": options})
        return list(found)

    def about(self, image_id: str, **options: Any) -> list[dict[str, Any]]:
        """The fixes about one image."""
        return [fix for fix in self.check(**options) if fix["imageId"] == image_id]

    def only(self, image_id: str, fix_type: str) -> dict[str, Any]:
        (found,) = self.about(image_id)
        assert found["type"] == fix_type, found
        return found

    def start(self, fix: dict[str, Any], **options: Any) -> str | None:
        given = {"repositoryId": self.repo_id, "fix": fix, "options": options}
        job_id: str | None = self.client.call("Storage.fixStorageRepository", given)["jobId"]
        return job_id

    def fixed(self, fix: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The job's info when it is done."""
        job_id = self.start(fix, **options)
        assert job_id is not None
        return conftest.done(self.client, job_id)

    def refused(self, fix: dict[str, Any], **options: Any) -> str:
        """The key of the error."""
        with pytest.raises(failures.ClientError) as caught:
            self.start(fix, **options)
        assert caught.value.data["hint"]
        return str(caught.value.data["key"])


@pytest.fixture
def shop(agent: transport.Client, repo: str, stack: standalone.Stack) -> Iterator[Shop]:
    made = Shop(agent, repo, stack)
    before = {str(fix["data"]) for fix in made.check()}
    yield made
    made.clean_up()
    left = [fix for fix in made.check() if str(fix["data"]) not in before]
    for fix in left:
        if fix["type"] == "clean":
            made.fixed(fix)
    assert [fix for fix in left if fix["type"] != "clean"] == []


@pytest.fixture(scope="module")
def second(stack: standalone.Stack) -> str:
    """Another connected repository."""
    return conftest.connect_repository(stack, "second")


class Tools:
    """Workers caught in the middle of their work."""

    def __init__(self, stack: standalone.Stack) -> None:
        self._storage = str(stack.storage_dir)

    @contextlib.contextmanager
    def stopped(self, command: str) -> Iterator[Callable[[], "Worker"]]:
        """Inside the block, what is yielded stops the `qemu-img COMMAND` that was begun there, and answers its worker.
        The images must be large enough for that to take a moment."""
        caught: list[Worker] = []
        before = {path.name for path in Path("/proc").iterdir()}

        def find() -> bool:
            for process in [path for path in Path("/proc").iterdir() if path.name not in before]:
                with contextlib.suppress(OSError):
                    words = (process / "cmdline").read_bytes().decode().split("\0")
                    if Path(words[0]).name == "qemu-img" and words[1] == command and self._storage in " ".join(words):
                        os.kill(int(process.name), signal.SIGSTOP)
                        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                        caught.append(Worker(parent, int(process.name)))
                        return True
            return False

        def stop() -> Worker:
            with prompt():
                until(find)
            return caught[0]

        try:
            yield stop
        finally:
            for worker in caught:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.tool, signal.SIGCONT)


@contextlib.contextmanager
def prompt() -> Iterator[None]:
    """Inside the block this thread runs as soon as it can: on a busy machine the tool could end unseen."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:  # not granted here: then the machine must not be too busy
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class Worker(NamedTuple):
    pid: int
    tool: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def tools(stack: standalone.Stack) -> Tools:
    return Tools(stack)


NO_FIX = {"AutoFix": "false"}  # as a client that knows only strings sends it


# -- clean -------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_all_is_well(shop: Shop) -> None:
    disk = shop.disk()
    shop.snapshot(disk)
    before = {path: path.stat().st_mtime_ns for path in shop.place.glob("*/*")}
    assert shop.about(disk) == []
    assert {path: path.stat().st_mtime_ns for path in shop.place.glob("*/*")} == before


def test_removed_without_autofix_is_only_flagged_and_cleaned_by_a_fix(shop: Shop) -> None:
    disk = shop.disk(4 * MIB, options={"strategy": "performance"})
    shop.client.call("Storage.removeImage", {"repositoryId": shop.repo_id, "imageId": disk, "options": NO_FIX})
    assert disk not in shop.ids() and shop.exists(disk)

    fix = shop.only(disk, "clean")
    assert fix["bytes"] == 4 * MIB and disk in fix["description"]
    info = shop.fixed(fix)

    assert info["kind"] == "cleanImage" and info["entity"]["id"] == disk
    assert not shop.exists(disk) and not [name for name in shop.data() if name.startswith(disk)]
    assert shop.start(fix) is None  # nothing is left to do


def test_orphan_data_is_cleaned_whether_its_slot_is_there_or_not(shop: Shop) -> None:
    disk, stranger = shop.disk(), ids.new()
    for name in (f"{disk}.00000000", f"{stranger}.11111111"):
        (shop.place / "data" / name).write_bytes(bytes(8192))
    kept = shop.sum(disk)
    for image_id in (disk, stranger):
        fix = shop.only(image_id, "clean")
        assert fix["bytes"] == 8192
        shop.fixed(fix)
    assert {f"{disk}.00000000", f"{stranger}.11111111"} & shop.data() == set()
    assert shop.sum(disk) == kept and not shop.exists(stranger)


# -- mend --------------------------------------------------------------------------------------------------------------


def test_copy_without_autofix_is_made_by_a_fix(shop: Shop, agent: transport.Client) -> None:
    disk = shop.disk(4 * MIB)
    shop.write(disk, "write -P 7 1M 64k")
    copy = agent.call("Storage.copyImage", {"targetRepoId": shop.repo_id, "imageId": disk, "options": NO_FIX})
    shop.made.append(copy["imageId"])
    assert copy["jobId"] is None
    status = shop.status(copy["imageId"])
    assert (status["status"], status["work"]["state"]) == ("broken", "wanted")

    info = shop.fixed(shop.only(copy["imageId"], "mend"))

    assert info["kind"] == "copyImage"
    assert shop.sum(copy["imageId"]) == shop.sum(disk)
    assert shop.status(copy["imageId"])["status"] == "optimized" and shop.about(copy["imageId"]) == []


def test_difference_without_autofix_is_made_by_a_fix(shop: Shop, agent: transport.Client) -> None:
    disk = shop.disk(16 * MIB)
    shop.write(disk, "write -P 7 0 8M")
    base = shop.snapshot(disk)
    shop.write(disk, "write -P 8 1M 64k")
    given = {"targetRepoId": shop.repo_id, "imageId": disk, "baseImageId": base, "options": NO_FIX}
    copy = agent.call("Storage.copyImage", given)["imageId"]
    shop.made.append(copy)
    shop.fixed(shop.only(copy, "mend"))
    assert shop.record(copy)["base"] == base and shop.sum(copy) == shop.sum(disk)
    assert (shop.place / "data" / shop.record(copy)["data"]["name"]).stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("fate", ["removed", "resized"])
def test_copy_without_its_source_is_only_removed(shop: Shop, agent: transport.Client, second: str, fate: str) -> None:
    """Nobody is offered what fails each time; the way out is said, and works."""
    disk = shop.disk(4 * MIB)
    elsewhere = Shop(agent, second, shop.stack)
    copy = agent.call("Storage.copyImage", {"targetRepoId": second, "imageId": disk, "options": NO_FIX})["imageId"]
    elsewhere.made.append(copy)
    assert elsewhere.only(copy, "mend")["obstacle"] is None
    if fate == "removed":
        shop.remove(disk)
    else:
        agent.call("Storage.resizeVirtualDisk", {"repositoryId": shop.repo_id, "imageId": disk, "size": 5 * MIB})

    fix = elsewhere.only(copy, "mend")
    assert disk in fix["obstacle"] and "removeImage" in fix["description"]
    before = elsewhere.record(copy)
    with pytest.raises(failures.ClientError) as caught:
        elsewhere.start(fix)
    assert caught.value.data["key"] == "cannot_mend" and disk in str(caught.value)
    assert "removeImage" in caught.value.data["hint"] and elsewhere.record(copy) == before

    agent.call("Storage.removeImage", {"repositoryId": second, "imageId": copy, "options": NO_FIX})
    elsewhere.fixed(elsewhere.only(copy, "clean"))
    assert not elsewhere.exists(copy) and elsewhere.about(copy) == []
    elsewhere.clean_up()


def test_disk_without_autofix_is_made_by_a_fix(shop: Shop) -> None:
    disk = shop.disk(MIB, options={**NO_FIX, "strategy": "performance"})
    assert shop.status(disk)["status"] == "broken" and not [name for name in shop.data() if name.startswith(disk)]
    shop.fixed(shop.only(disk, "mend"))
    image = shop.record(disk)
    assert (image["status"], image["data"]["format"], image["generation"]) == ("optimized", "raw", 1)
    assert shop.sum(disk) == hashlib.sha256(bytes(MIB)).hexdigest()


def test_snapshot_without_autofix_is_made_by_a_fix_of_its_disk(shop: Shop) -> None:
    disk = shop.disk(MIB)
    shop.write(disk, "write -P 3 0 64k")
    before = shop.sum(disk)
    snapshot = shop.snapshot(disk, options=NO_FIX)
    assert {shop.status(image_id)["status"] for image_id in (disk, snapshot)} == {"broken"}
    assert shop.about(snapshot) == []  # it is finished with its disk, never cleaned

    shop.fixed(shop.only(disk, "mend"))

    image = shop.record(disk)
    assert image["base"] == snapshot and shop.about(disk) == []
    assert (image["work"]["state"], image["work"]["names"]) == ("done", {})  # nobody takes it for one to be finished
    assert shop.sum(disk) == shop.sum(snapshot) == before
    assert {shop.status(image_id)["status"] for image_id in (disk, snapshot)} == {"optimized"}


def test_import_without_autofix_is_made_by_a_fix(shop: Shop, agent: transport.Client) -> None:
    path = shop.import_dir / f"{ids.new()}.raw"
    path.write_bytes(b"imported" * 8192)
    path.chmod(0o644)
    try:
        given = {"targetRepoId": shop.repo_id, "path": str(path), "format": "raw", "options": NO_FIX}
        disk = agent.call("Storage.importImage", given)["imageId"]
        shop.made.append(disk)
        shop.fixed(shop.only(disk, "mend"))
    finally:
        path.unlink()
    assert shop.sum(disk) == hashlib.sha256(b"imported" * 8192).hexdigest()


def test_failed_copy_is_made_by_a_fix(shop: Shop, agent: transport.Client, tools: "Tools") -> None:
    """Its worker is killed in the middle; so is that of the first fix."""
    disk = shop.disk(128 * MIB)
    shop.write(disk, "write -P 9 0 128M")
    with tools.stopped("convert") as stopped:
        copy = agent.call("Storage.copyImage", {"targetRepoId": shop.repo_id, "imageId": disk})
        shop.made.append(copy["imageId"])
        worker = stopped()
        assert shop.about(copy["imageId"]) == []  # somebody is at it
        worker.kill()
    assert conftest.wait_job(agent, copy["jobId"])["status"] == "failed"
    fix = shop.only(copy["imageId"], "mend")
    with tools.stopped("convert") as stopped:
        again = shop.start(fix)
        assert again is not None
        worker = stopped()
        assert shop.refused(fix) == "image_busy"
        worker.kill()
    assert conftest.wait_job(agent, again)["status"] == "failed"
    assert shop.refused(fix) == "fix_outdated"  # it was about another job's work
    shop.fixed(shop.only(copy["imageId"], "mend"))
    assert shop.sum(copy["imageId"]) == shop.sum(disk)


# -- merge -------------------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """lower <- deleted <- top: the one in the middle was removed."""

    lower: str
    deleted: str
    top: str


def stacked(shop: Shop, large: str, much_mib: int = 3) -> Stack:
    """`large` says who holds most: the "deleted" one, or the "top"; the other one holds two thirds of that."""
    disk = shop.disk((much_mib + 8) * MIB)
    shop.write(disk, "write -P 1 0 2M", "write -P 2 7M 64k")
    lower = shop.snapshot(disk)
    much, little = f"write -P 3 1M {much_mib}M", f"write -P 4 1M {much_mib * 2 // 3}M"
    shop.write(disk, much if large == "deleted" else little, "write -z 0 4k", "write -P 5 100k 3k")
    middle = shop.snapshot(disk)
    shop.write(disk, little if large == "deleted" else much, "write -z 1M 4k", "discard 7M 64k", "write -P 6 6M 512")
    shop.remove(middle)
    return Stack(lower, middle, disk)


@pytest.mark.parametrize(("large", "kept"), [("deleted", "deleted"), ("top", "top")], ids=["push", "pull"])
def test_deleted_image_is_merged_with_the_one_on_it(shop: Shop, large: str, kept: str) -> None:
    stack = stacked(shop, large)
    before, lower = shop.sum(stack.top), shop.sum(stack.lower)
    names = {"top": shop.record(stack.top)["data"]["name"], "deleted": shop.record(stack.deleted)["data"]["name"]}
    fix = shop.only(stack.deleted, "merge")
    assert stack.top in fix["description"] and fix["bytes"] is None

    info = shop.fixed(fix)

    assert info["entity"]["id"] == stack.top
    image = shop.record(stack.top)
    assert (image["base"], image["status"], image["data"]["name"]) == (stack.lower, "optimized", names[kept])
    assert shop.sum(stack.top) == before and shop.sum(stack.lower) == lower
    assert not shop.exists(stack.deleted)
    assert not (set(names.values()) - {names[kept]}) & shop.data()
    assert shop.header(stack.top) == shop.record(stack.lower)["data"]["name"]
    assert shop.start(fix) is None
    assert shop.about(stack.top) == []


@pytest.mark.parametrize("large", ["deleted", "top"])
def test_lowest_image_is_merged_with_one_that_has_grown(shop: Shop, agent: transport.Client, large: str) -> None:
    disk = shop.disk(4 * MIB, options={"strategy": "performance"})
    shop.write(disk, "write -P 1 0 1M")
    snapshot = shop.snapshot(disk)
    agent.call("Storage.resizeVirtualDisk", {"repositoryId": shop.repo_id, "imageId": disk, "size": 6 * MIB})
    shop.write(disk, "write -P 2 512k 64k", "write -P 3 5M 64k")
    if large == "top":
        shop.write(disk, "write -P 4 0 6M")
    before = shop.sum(disk)
    shop.remove(snapshot)
    shop.fixed(shop.only(snapshot, "merge"))
    assert shop.sum(disk) == before and shop.record(disk)["base"] is None
    assert shop.record(disk)["data"]["format"] == ("raw" if large == "deleted" else "qcow2")
    assert shop.about(snapshot) == []


def test_those_above_a_merged_image_show_what_they_did(shop: Shop) -> None:
    """A push switches the data of an image that others lie on; their headers name the new one."""
    disk = shop.disk(4 * MIB)
    shop.write(disk, "write -P 1 0 3M")
    lower = shop.snapshot(disk)
    shop.write(disk, "write -P 2 1M 64k")
    upper = shop.snapshot(disk)
    shop.write(disk, "write -P 3 2M 64k")
    clone = shop.disk(0, baseSnapshotId=upper)
    shop.write(clone, "write -P 4 0 64k")
    shop.remove(lower)
    before = {image_id: shop.sum(image_id) for image_id in (disk, clone, upper)}
    data = shop.record(lower)["data"]

    shop.fixed(shop.only(lower, "merge"))

    assert shop.record(upper)["data"] == data and shop.record(upper)["base"] is None
    assert {image_id: shop.sum(image_id) for image_id in (disk, clone, upper)} == before
    assert shop.header(disk) == shop.header(clone) == data["name"]


def test_nothing_is_merged_below_a_running_vm(shop: Shop, machines: conftest.Machines) -> None:
    stack = stacked(shop, "top")
    fix = shop.only(stack.deleted, "merge")
    vm_id = machines.started(disks=[{"imageId": stack.top, "repoId": shop.repo_id}])
    before = shop.record(stack.top)
    assert shop.refused(fix) == "image_in_use"
    assert shop.record(stack.top) == before and shop.exists(stack.deleted)
    machines.destroy(vm_id)
    shop.fixed(fix)


@pytest.mark.parametrize(("large", "tool"), [("deleted", "commit"), ("top", "rebase")], ids=["push", "pull"])
def test_merge_that_was_killed_is_done_again(
    shop: Shop, agent: transport.Client, tools: "Tools", large: str, tool: str
) -> None:
    stack = stacked(shop, large, 96)
    before = shop.sum(stack.top)
    with tools.stopped(tool) as stopped:
        job_id = shop.start(shop.only(stack.deleted, "merge"))
        assert job_id is not None
        worker = stopped()
        assert shop.about(stack.deleted) == shop.about(stack.top) == []
        worker.kill()
    assert conftest.wait_job(agent, job_id)["status"] == "failed"
    assert shop.sum(stack.top) == before and shop.status(stack.top)["status"] == "optimized"
    shop.fixed(shop.only(stack.deleted, "merge"))
    assert shop.sum(stack.top) == before and not shop.exists(stack.deleted)


def test_half_merged_snapshot_is_not_brought_back(
    shop: Shop, agent: transport.Client, tools: "Tools", second: str
) -> None:
    """A push has written into its data: what it showed is lost (trap 38)."""
    disk = shop.disk(128 * MIB)
    shop.write(disk, "write -P 1 0 96M")
    snapshot = shop.snapshot(disk)
    shop.write(disk, "write -P 2 0 64M")
    away = agent.call("Storage.copyImage", {"targetRepoId": second, "imageId": snapshot})
    conftest.done(agent, away["jobId"])
    shop.remove(snapshot)
    with tools.stopped("commit") as stopped:
        job_id = shop.start(shop.only(snapshot, "merge"))
        assert job_id is not None
        stopped().kill()
    conftest.wait_job(agent, job_id)
    with pytest.raises(failures.ClientError) as caught:
        agent.call("Storage.copyImage", {"targetRepoId": shop.repo_id, "imageId": snapshot})
    assert caught.value.data["key"] == "image_not_usable"
    shop.fixed(shop.only(snapshot, "merge"))
    agent.call("Storage.removeImage", {"repositoryId": second, "imageId": snapshot})


# -- optimize ----------------------------------------------------------------------------------------------------------


def test_degraded_image_becomes_raw_without_a_base(shop: Shop) -> None:
    disk = shop.disk(4 * MIB, options={"strategy": "performance"})
    shop.write(disk, "write -P 1 0 1M")
    snapshot = shop.snapshot(disk)
    shop.write(disk, "write -P 2 1M 64k")
    assert shop.status(disk)["status"] == "degraded"
    old, before = shop.record(disk)["data"]["name"], shop.sum(disk)
    shop.remove(snapshot)  # goes with the last one that needs it
    (fix,) = shop.about(disk)
    assert fix["type"] == "optimize"

    shop.fixed(fix)

    image = shop.record(disk)
    assert (image["status"], image["data"]["format"], image["base"]) == ("optimized", "raw", None)
    assert shop.sum(disk) == before
    assert old not in shop.data() and not shop.exists(snapshot)
    assert shop.start(fix) is None


def test_optimizing_that_was_killed_leaves_the_image_as_it_was(
    shop: Shop, agent: transport.Client, tools: "Tools"
) -> None:
    snapshot = shop.snapshot(shop.disk(128 * MIB))
    disk = shop.disk(0, baseSnapshotId=snapshot, options={"strategy": "performance"})
    shop.write(disk, "write -P 2 1M 100M")
    before, names = shop.sum(disk), shop.data()
    with tools.stopped("convert") as stopped:
        job_id = shop.start(shop.only(disk, "optimize"))
        assert job_id is not None
        worker = stopped()
        assert shop.status(disk)["status"] == "degraded" and shop.sum(disk) == before
        worker.kill()
    assert conftest.wait_job(agent, job_id)["status"] == "failed"
    assert (shop.sum(disk), shop.data()) == (before, names)
    shop.fixed(shop.only(disk, "optimize"))
    assert shop.sum(disk) == before and shop.status(disk)["status"] == "optimized"


# -- what comes back from a caller -------------------------------------------------------------------------------------


def changed(fix: dict[str, Any], /, **data: Any) -> dict[str, Any]:
    return {**fix, "data": {**fix["data"], **data}}


def test_forged_fixes_are_refused_and_harm_nothing(shop: Shop, second: str) -> None:
    disk, victim = shop.disk(MIB), shop.disk(MIB)
    shop.client.call("Storage.removeImage", {"repositoryId": shop.repo_id, "imageId": disk, "options": NO_FIX})
    fix = shop.only(disk, "clean")
    before = shop.record(victim)
    guard = {"generation": before["generation"], "job_id": None}
    forged = {
        "bad_fix": [
            {**fix, "data": {}},
            {**fix, "type": "mend"},
            changed(fix, fix="eraseEverything"),
            changed(fix, entity="../repository"),
            changed(fix, repo=ids.new()),
            changed(fix, guard="none"),
            changed(fix, extra=1),
        ],
        "fix_outdated": [
            changed(fix, entity=victim, guard=guard),
            {**changed(fix, entity=victim, guard=guard, fix="mergeImage"), "type": "merge"},
            {**changed(fix, entity=ids.new(), guard=guard, fix="optimizeImage"), "type": "optimize"},
            changed(fix, guard={**fix["data"]["guard"], "generation": 99}),
        ],
    }
    for key, fixes in forged.items():
        for one in fixes:
            assert shop.refused(one) == key, one
    assert shop.start({**changed(fix, entity=victim, guard=guard, fix="copyImage"), "type": "mend"}) is None
    elsewhere = Shop(shop.client, second, shop.stack)
    assert elsewhere.refused(fix) == "bad_fix"
    assert shop.record(victim) == before and shop.exists(disk)
    shop.fixed(fix)


def test_fix_of_an_image_that_has_changed_is_outdated(shop: Shop, agent: transport.Client) -> None:
    disk = shop.disk(MIB)
    snapshot = shop.snapshot(disk)
    shop.remove(snapshot)
    fix = shop.only(snapshot, "merge")
    shop.snapshot(disk)  # the one above is another now
    assert shop.refused(fix) == "fix_outdated"


def test_same_fix_as_the_same_job_is_started_once(shop: Shop) -> None:
    disk = shop.disk(MIB, options=NO_FIX)
    fix, job_id = shop.only(disk, "mend"), ids.new()
    assert shop.start(fix, jobId=job_id) == shop.start(fix, jobId=job_id) == job_id
    conftest.done(shop.client, job_id)
    assert shop.record(disk)["generation"] == 1


def test_events_tell_of_a_fix(shop: Shop, stack: standalone.Stack) -> None:
    disk = shop.disk(MIB, options=NO_FIX)
    fix = shop.only(disk, "mend")
    with transport.connect(f"ws://127.0.0.1:{stack.tcp_port}") as client:
        client.subscribe(["image"])
        shop.fixed(fix)
        seen: list[str] = []
        while "done" not in seen:
            event = client.next_event(30)
            assert event is not None, seen
            if event["subject"] == disk:
                assert event["data"]["fix"] == "createVirtualDisk"
                seen.append(event["data"]["change"])
    assert seen == ["begun", "done"]


# -- two repositories --------------------------------------------------------------------------------------------------


def test_snapshot_goes_to_another_repository_and_comes_back(shop: Shop, agent: transport.Client, second: str) -> None:
    """Its id survives; deleted and whole, the one that is still there is taken back."""
    disk = shop.disk(MIB)
    shop.write(disk, "write -P 8 0 64k")
    snapshot = shop.snapshot(disk)
    elsewhere = Shop(agent, second, shop.stack)
    copy = agent.call("Storage.copyImage", {"targetRepoId": second, "imageId": snapshot, "options": NO_FIX})
    assert copy == {"imageId": snapshot, "jobId": None}
    elsewhere.made.append(snapshot)
    elsewhere.fixed(elsewhere.only(snapshot, "mend"))
    assert elsewhere.sum(snapshot) == shop.sum(snapshot)

    shop.remove(snapshot)
    data = shop.record(snapshot)["data"]
    fix = shop.only(snapshot, "merge")
    back = agent.call("Storage.copyImage", {"targetRepoId": shop.repo_id, "imageId": snapshot})
    assert back == {"imageId": snapshot, "jobId": None}
    assert snapshot in shop.ids() and shop.record(snapshot)["data"] == data
    assert shop.refused(fix) == "fix_outdated"
    elsewhere.clean_up()


def test_where_an_image_is_looked_for_can_be_said(shop: Shop, agent: transport.Client, second: str) -> None:
    snapshot = shop.snapshot(shop.disk(MIB))
    copy = {"targetRepoId": second, "imageId": snapshot}
    elsewhere = Shop(agent, second, shop.stack)
    for options in ({"participatingRepositories": [second]}, {"imageHints": {snapshot: second}}):
        with pytest.raises(failures.ClientError) as caught:
            agent.call("Storage.copyImage", {**copy, "options": options})
        assert caught.value.data["key"] == "no_such_image"
    generation = shop.record(snapshot)["generation"]
    with pytest.raises(failures.ClientError) as caught:
        agent.call("Storage.copyImage", {**copy, "options": {"generation": generation + 1}})
    assert caught.value.data["key"] == "generation_mismatch"
    asked = {"participatingRepositories": [shop.repo_id, second], "imageHints": {snapshot: shop.repo_id}}
    made = agent.call("Storage.copyImage", {**copy, "options": {**asked, "generation": generation}})
    conftest.done(agent, made["jobId"])
    elsewhere.made.append(snapshot)
    elsewhere.clean_up()
