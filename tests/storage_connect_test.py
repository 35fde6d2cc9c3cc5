"""Connecting repositories: what answers when, names, lockspaces, and who is in the way of a disconnect."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import supervdsm.client
from tests import loopfs, sanlock_fixture, storage_fixture, supervdsm_process
from tests.until import until
from vdsm import config, errors, events, ids, leases, storage
from vdsm.jobs import pool, registry
from vdsm.storage import formats, lockspaces

world, shelf, service = storage_fixture.world, storage_fixture.shelf, storage_fixture.service
Shelf, Service = storage_fixture.Shelf, storage_fixture.Service

LOCAL = "localfs-1.0"
SLOW_S = 4  # io_timeout: joining takes three times that
DEADLINE_S = 3.0


@pytest.fixture
def fresh(service: Service, world: storage_fixture.World) -> Iterator[str]:
    """The name of a formatted directory that nobody has joined."""
    with formatted(service, world, sanlock_fixture.IO_TIMEOUT_S) as name:
        yield name


@pytest.fixture
def slow(service: Service, world: storage_fixture.World) -> Iterator[str]:
    """The same, and joining it takes long enough for a test to look at that."""
    with formatted(service, world, SLOW_S) as name:
        yield name


@contextlib.contextmanager
def formatted(service: Service, world: storage_fixture.World, io_timeout_s: int) -> Iterator[str]:
    name = f"fresh-{ids.new()[:8]}"
    place = world.directory / name
    place.mkdir()
    formats.open(storage_fixture.describe(place, name)).format_(io_timeout_s)
    yield name
    for found in service.storage.list_storage_repositories():
        if found["place"] == str(place):
            service.storage.disconnect_storage_repository(found["repo_id"])


def connect(service: Service, world: storage_fixture.World, name: str, repo_id: str) -> dict[str, object]:
    return service.storage.connect_storage_repository(repo_id, LOCAL, {"path": str(world.directory / name)})


def told(service: Service, repo_id: str) -> list[str]:
    happened, _ = service.events.since(service.events.instance_id, 0)
    events_of_it = [event.params for event in happened if (event.topic, event.subject) == ("repository", repo_id)]
    return [params["state"] for params in events_of_it if params["change"] == "state"]


def test_connect_answers_before_the_lockspace_is_joined(
    service: Service, world: storage_fixture.World, slow: str
) -> None:
    answer = connect(service, world, slow, "new")
    assert (answer["state"], answer["repo_format"]) == ("joining", LOCAL)
    assert 0 < float(str(answer["seconds_left"])) <= 3 * SLOW_S

    assert service.storage.list_images("new") == [], "reads work"
    gate = service.storage.gate(["new"])
    wait = gate()
    assert wait is not None and "joining" in wait.reason and wait.seconds_left
    began = time.monotonic()
    with pytest.raises(errors.LeaseNotReady) as refused:
        service.storage.create_virtual_disk("new", 4096)
    assert time.monotonic() - began > 1.5, "writes wait, and then say so"
    assert refused.value.facts["repo_id"] == "new"

    until(lambda: service.repository("new")["state"] == "joined")
    assert gate() is None
    assert service.repository("new")["seconds_left"] is None
    disk = service.storage.create_virtual_disk("new", 4096)["image_id"]
    service.storage.remove_image("new", disk)
    service.storage.disconnect_storage_repository("new")
    assert told(service, "new") == ["joining", "joined", "disconnected"]


def test_list_tells_space_and_place(service: Service, world: storage_fixture.World) -> None:
    until(lambda: service.repository("main")["last_check"] is not None)
    found = service.repository("main")
    assert (found["place"], found["name"]) == (world.main.place, world.main.name)
    assert 0 < found["free_bytes"] < found["total_bytes"]


def test_one_directory_under_two_names_is_one_lockspace(
    service: Service, world: storage_fixture.World, shelf: Shelf
) -> None:
    """Leaving it with the first name would kill the holders of leases under the second (trap 13)."""
    disk = shelf.disk()
    service.connect("main", "alias")
    with leases.Session() as vm, vm.holding([shelf.repo.slot(disk).data_lease()], 1):
        assert service.storage.get_image("alias", disk)["image_id"] == disk
        service.storage.disconnect_storage_repository("alias")
        assert leases.state(shelf.repo.lockspace()) == "joined"
        assert vm.held()
    assert service.storage.get_image("main", disk)["repo_id"] == "main"
    with pytest.raises(errors.NoSuchRepository):
        service.storage.get_image("alias", disk)


def test_connecting_again_is_fine_and_another_place_is_not(
    service: Service, world: storage_fixture.World, fresh: str
) -> None:
    before = service.repository("main")["name"]
    service.connect("main", "main")
    with pytest.raises(errors.RepositoryExists):
        connect(service, world, fresh, "main")
    assert service.repository("main")["name"] == before


def test_copied_repository_is_not_taken_for_the_original(
    service: Service, world: storage_fixture.World, tmp_path: Path
) -> None:
    """Same name, another place: its leases are not the ones that others take."""
    copy = world.directory / "copy"
    for name in ("images", "vms", "data"):
        (copy / name).mkdir(parents=True)
    (copy / "repository").write_bytes(Path(world.main.place, "repository").read_bytes())
    with pytest.raises(errors.RepositoryExists):
        connect(service, world, "copy", "copied")


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_place_without_a_repository(service: Service, world: storage_fixture.World, what: str) -> None:
    place = world.directory / f"no repository, {what}"
    if what == "empty":
        place.mkdir(exist_ok=True)
    with pytest.raises(errors.NotARepository):
        connect(service, world, place.name, "none")
    with pytest.raises(errors.NoSuchRepository):
        service.storage.list_images("none")


def test_unknown_repositories_and_formats(service: Service) -> None:
    with pytest.raises(errors.NoSuchRepository):
        service.storage.disconnect_storage_repository("nobody")
    with pytest.raises(errors.UnknownFormat):
        service.storage.connect_storage_repository("x", "nfs-9", {})
    with pytest.raises(errors.PathNotAllowed):
        service.storage.connect_storage_repository("x", LOCAL, {"path": "/etc"})
    gate = service.storage.gate(["nobody"])
    with pytest.raises(errors.NoSuchRepository):
        gate()


def test_disconnect_names_the_vm_in_the_way(service: Service, world: storage_fixture.World, fresh: str) -> None:
    service.connect(fresh, "busy")
    disk = service.storage.create_virtual_disk("busy", 4096)["image_id"]
    service.storage.set_holder_lookup(lambda image_id: "VM web" if image_id == disk else None)
    try:
        with pytest.raises(errors.RepositoryInUse) as refused:
            service.storage.disconnect_storage_repository("busy")
        assert refused.value.facts == {"repo_id": "busy", "users": "VM web"}
    finally:
        service.storage.set_holder_lookup(lambda image_id: None)
    assert service.repository("busy")["state"] == "joined"


def test_disconnect_is_refused_while_anybody_holds_a_lease(
    service: Service, world: storage_fixture.World, fresh: str
) -> None:
    """A process that this agent knows nothing of: leaving would have it killed."""
    service.connect(fresh, "held")
    disk = service.storage.create_virtual_disk("held", 4096)["image_id"]
    lease = service.storage.plan_disk(disk, "held", True).leases[0]
    with leases.Session() as stranger, stranger.holding([lease], 1):
        with pytest.raises(errors.RepositoryInUse):
            service.storage.disconnect_storage_repository("held")
        assert service.repository("held")["state"] == "joined"
        assert stranger.held()
    assert service.storage.create_virtual_disk("held", 4096)


def test_lockspace_that_was_lost_is_joined_again(
    service: Service, world: storage_fixture.World, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the time that the repository's own io_timeout says: a join that does not name it leaves sanlock's default of
    10 s on storage, and the next join takes 20 (trap 53)."""
    monkeypatch.setattr(lockspaces, "CHECK_S", 0.2)
    monkeypatch.setattr(lockspaces, "RETRY_S", 0.2)
    service.connect(fresh, "lost")
    name = service.repository("lost")["name"]
    space = leases.Lockspace(name, str(world.directory / fresh / "repository"), 0, 1)
    leases.leave(space)
    until(lambda: service.repository("lost")["state"] != "joined")
    until(lambda: service.repository("lost")["state"] == "joined", 60)
    assert renewed_by(service, "lost") == "io_timeout=1"


def renewed_by(service: Service, repo_id: str) -> str:
    """What sanlock says of the time-out by which it renews the host id."""
    told = subprocess.run(["sanlock", "client", "status", "-D"], capture_output=True, text=True, check=True).stdout
    of_lockspace = told.partition(f"s {service.repository(repo_id)['name']}:")[2].split("\ns ")[0]
    return next(word for word in of_lockspace.split() if word.startswith("io_timeout="))


def test_host_id_of_another_host_is_refused_by_name(tmp_path: Path, world: storage_fixture.World) -> None:
    """sanlock gives up on an id that another host renews; here it gives up sooner, the place being gone."""
    space = leases.Lockspace(ids.new(), str(tmp_path / "gone"), 0, 1)
    told: list[str] = []
    membership = lockspaces.Membership(space, 1, "otherhost", told.append)
    membership.join()
    assert "otherhost" in membership.reason and membership.seconds_left > 10
    until(lambda: membership.poll() or membership.state == "left")
    with pytest.raises(errors.HostIdTaken) as refused:
        membership.wait("repo", 0)
    assert refused.value.facts == {"host_id": 1, "holder": "otherhost"}
    assert told == ["joining", "left"]


def test_hanging_place_is_probed_by_few_and_connects_later(
    service: Service, world: storage_fixture.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try would leave another process behind that nobody can kill, if they were not counted."""
    with loopfs.mounted(64 << 20) as place:
        settings = config.Config(
            host=service.settings.host,
            storage=config.Storage(localfs_dirs=(str(place.parent),), io_children=2, io_deadline_s=DEADLINE_S),
        )
        root = storage_fixture.Root()
        connections = storage.connected.Connections(settings, events.EventLog(), service.server, root)
        parameters = {"path": str(place)}
        loopfs.freeze(place)
        for _ in range(2):
            with pytest.raises(errors.RepositoryStuck):
                connections.format(LOCAL, parameters, 1)
        began = time.monotonic()
        with pytest.raises(errors.RepositoryStuck):
            connections.format(LOCAL, parameters, 1)
        assert time.monotonic() - began < DEADLINE_S, "refused at once, not at its deadline"
        loopfs.thaw(place)
        until(lambda: _formats(connections, parameters))
        connections.stop()


def _formats(connections: storage.connected.Connections, parameters: dict[str, object]) -> bool:
    try:
        connections.format(LOCAL, parameters, 1)
    except errors.RepositoryStuck:
        return False
    except errors.NotEmpty:  # one of the killed ones had come that far
        return True
    return True


# -- formatting through the root helper ------------------------------------------------------------------------------


@supervdsm_process.needs_root
def test_formatting_prepares_the_directory_through_the_root_helper(
    service: Service, world: storage_fixture.World
) -> None:
    with supervdsm_process.running() as helper:
        settings = config.Config(host=service.settings.host, storage=config.Storage(localfs_dirs=(str(helper.data),)))
        jobs = registry.Registry(pool.Pool(service.server), service.events)
        agent = storage.Storage(settings, service.events, service.server, jobs, supervdsm.client.Helper(helper.socket))
        place = helper.data / "new"
        made = agent.format_storage_repository(LOCAL, {"path": str(place)}, {"ioTimeout": 1})
        assert made["io_timeout_s"] == 1 and (place / "repository").exists()
        assert (place / "images").stat().st_gid == place.stat().st_gid != 0
        with pytest.raises(errors.NotEmpty):
            agent.format_storage_repository(LOCAL, {"path": str(place)}, {"ioTimeout": 1})
        for options in ({"ioTimeout": 0}, {"ioTimeout": True}, {"other": 1}):
            with pytest.raises(errors.InvalidParameters):
                agent.format_storage_repository(LOCAL, {"path": str(helper.data / "x")}, options)


def test_formatting_without_the_root_helper_says_so(service: Service, world: storage_fixture.World) -> None:
    with pytest.raises(errors.HelperUnavailable):
        service.storage.format_storage_repository(LOCAL, {"path": str(world.directory / "x")})


def test_lockspace_is_renewed_with_the_time_out_it_was_made_with(
    service: Service, world: storage_fixture.World, fresh: str
) -> None:
    """sanlock's own default is 10 s: a host that joined by that would be watched for ten times as long (trap 53)."""
    connect(service, world, fresh, "timed")
    until(lambda: service.repository("timed")["state"] == "joined")
    assert renewed_by(service, "timed") == "io_timeout=1"


def test_children_that_may_be_registered_are_counted(
    service: Service, world: storage_fixture.World, fresh: str
) -> None:
    """sanlock serves nobody beyond some 1000 registrations, whoever they are (trap 7)."""
    before = service.storage.most_registrations()
    connect(service, world, fresh, "counted")
    one_more = service.storage.most_registrations()
    assert one_more - before == config.Storage().io_children
    connect(service, world, fresh, "counted-again")
    assert service.storage.most_registrations() == one_more
