"""checkStorageRepository and fixStorageRepository through the wire, on real data.

What an image holds is judged by a reader that is not the code under test: qemu-img, with the chain built here from the
records, into raw bytes and their checksum.
"""

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import conftest
from vdsm import ids, record, standalone
from vdsm.client import failures, transport

MIB = 1 << 20


class Shop(conftest.Images):
    """Images of a repository, with a look at what is on disk, and its fixes."""

    def __init__(self, client: transport.Client, repo_id: str, stack: standalone.Stack) -> None:
        super().__init__(client, repo_id, stack.import_dir)
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
