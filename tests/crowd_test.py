"""A repository with many images, and the last of the 250 hosts: verbs cost what they cost in an empty one.

Listing and checking read every record; what they cost for each image is told, not bounded.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import file_volumes, proof, sanlock_fixture, second_host, storage_fixture
from tests.storage_fixture import Service, Shelf
from tests.until import until
from vdsm import ids, leases

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service

LAST_HOST = leases.MAX_HOSTS
MANY, TORTURE_MANY = 300, 2000
ROUNDS, TORTURE_ROUNDS = 8, 50
WORSE = 2.0
CROWDED, EMPTY = "main", "other"

Costs = dict[str, dict[str, list[float]]]  # seconds by verb and repository


class Lives:
    """The lives of images in two repositories, in turn, with what each verb took."""

    def __init__(self, service: Service, crowded: str = CROWDED, empty: str = EMPTY) -> None:
        self._service = service
        self._crowded, self._empty = crowded, empty
        self.costs: Costs = {}

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            for repo_id in (self._crowded, self._empty):
                self._live(repo_id)

    def _live(self, repo_id: str) -> None:
        storage = self._service.storage
        made = self.timed("createVirtualDisk", repo_id, lambda: storage.create_virtual_disk(repo_id, 1 << 20))
        disk = made["image_id"]
        snapshot = self.timed("createSnapshot", repo_id, lambda: storage.create_snapshot(repo_id, disk))["image_id"]
        self.timed("getImage", repo_id, lambda: storage.get_image(repo_id, disk))
        self.timed("getImageStatus", repo_id, lambda: storage.get_image_status(repo_id, disk))
        self.timed("setImageUserData", repo_id, lambda: storage.set_image_user_data(repo_id, disk, {"name": "one"}))
        self.timed("resizeVirtualDisk", repo_id, lambda: storage.resize_virtual_disk(repo_id, disk, 2 << 20))
        copy = self.timed("copyImage", repo_id, lambda: self._copied(repo_id, disk))
        for image_id in (copy, disk, snapshot):
            self.timed("removeImage", repo_id, lambda image_id=image_id: storage.remove_image(repo_id, image_id))

    def _copied(self, repo_id: str, image_id: str) -> str:
        copy = self._service.storage.copy_image(repo_id, image_id)
        self._service.ended(copy["job_id"])
        return str(copy["image_id"])

    def timed(self, verb: str, repo_id: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        answer = call()
        self.costs.setdefault(verb, {}).setdefault(repo_id, []).append(time.perf_counter() - began)
        return answer

    def ratios(self, typical: Callable[[list[float]], float]) -> dict[str, float]:
        """By verb, what it typically took in the crowded repository, as a share of what it took in the empty one."""
        return {
            verb: typical(by_repo[self._crowded]) / typical(by_repo[self._empty])
            for verb, by_repo in self.costs.items()
            if self._empty in by_repo
        }


def crowd(shelf: Shelf, count: int) -> None:
    for _ in range(count):
        shelf.disk()


@pytest.mark.timeout(300)
def test_many_images_make_no_verb_slower(service: Service, shelf: Shelf) -> None:
    crowd(shelf, MANY)
    lives = Lives(service)
    lives.run(ROUNDS)
    assert len(service.storage.list_images(CROWDED)) == MANY
    ratios = lives.ratios(min)  # a few calls of milliseconds: the medians are the machine's other work
    assert max(ratios.values()) <= WORSE, ratios


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_two_thousand_images_make_no_verb_slower(service: Service, shelf: Shelf) -> None:
    with proof.writing("crowded-repository", None) as told:
        crowd(shelf, TORTURE_MANY)
        told |= measured(Lives(service), service.storage, CROWDED)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_two_thousand_images_on_volumes_make_no_verb_slower(
    world: storage_fixture.World, with_volumes: Service
) -> None:
    """What slots and their table cost; the volumes are files, and what LVM takes is seen in the lab."""
    sanlock_fixture.use(world.run_dir)
    crowded, empty = (file_volumes.make(world.directory / name, name) for name in ("crowded", "spare"))
    Path(crowded.place, "size").write_text(str(TORTURE_MANY * 8 * file_volumes.EXTENT_BYTES))
    for repo in (crowded, empty):
        with_volumes.storage.connect_storage_repository(repo.repo_id, file_volumes.FORMAT, {"path": repo.place})
        until(lambda repo=repo: with_volumes.repository(repo.repo_id)["state"] == "joined")
    with proof.writing("crowded-volumes", None) as told, leases.Session() as session:
        crowd(Shelf(crowded, session), TORTURE_MANY)
        told |= measured(Lives(with_volumes, "crowded", "spare"), with_volumes.storage, "crowded")


def measured(lives: Lives, storage: Any, crowded: str) -> dict[str, object]:
    """Fails when a verb is too slow in the one with `TORTURE_MANY` images."""
    lives.run(TORTURE_ROUNDS)
    listed = lives.timed("listImages", crowded, lambda: storage.list_images(crowded))
    checked = lives.timed("checkStorageRepository", crowded, lambda: storage.check_storage_repository(crowded))
    told: dict[str, object] = {"images": len(listed), "findings": len(checked), "rounds": TORTURE_ROUNDS}
    told["ids of hosts that a lease has room for"] = LAST_HOST
    for verb in ("listImages", "checkStorageRepository"):
        told[f"{verb}, milliseconds for each image"] = round(lives.costs[verb][crowded][0] / len(listed) * 1e3, 3)
    ratios = lives.ratios(statistics.median)
    told |= {f"{verb} against the empty one, medians": round(ratio, 2) for verb, ratio in ratios.items()}
    assert max(ratios.values()) <= WORSE, ratios
    return told


@pytest.fixture
def with_volumes(world: storage_fixture.World) -> Iterator[Service]:
    sanlock_fixture.use(world.run_dir)
    with Service(world, file_volumes.__name__).running() as running:
        yield running


@pytest.fixture
def last(service: Service, shelf: Shelf) -> Iterator[second_host.SecondHost]:
    """The host with the highest id."""
    repo = shelf.repo
    made = second_host.SecondHost(repo, storage_fixture.describe(Path(repo.place), CROWDED), LAST_HOST)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_the_last_host_does_as_the_first(service: Service, shelf: Shelf, last: second_host.SecondHost) -> None:
    disk = shelf.disk()
    snapshot = {"image_id": ids.new(), "disk_id": disk, "generation": None, "user_data": {}, "digest": "a snapshot"}
    made = last("create_snapshot", snapshot)["image_id"]
    assert shelf.image(disk)["base"] == made
    assert shelf.image(made)["writer"]["host_id"] == LAST_HOST
    last("remove_image", {"image_id": disk, "generation": None})
    shelf.remove(made)
    assert shelf.files() == set()
