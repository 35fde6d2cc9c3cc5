"""What root does for a repository's storage: done before anybody looks, undone when nobody needs it any more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import sanlock_fixture, storage_fixture
from tests.until import until
from vdsm import errors, events, ids
from vdsm.storage import connected, formats, ioproc, repository
from vdsm.storage.formats import localfs

world, service = storage_fixture.world, storage_fixture.service
Service = storage_fixture.Service

LOCAL = "localfs-1.0"


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was brought up and taken down, and between that the calls of children. localfs has nothing to take down,
    and formats that have need a lab: so it is told here that it has."""
    told: list[str] = []
    call = ioproc.Children.call

    def bring_up(helper: object, description: repository.Description, *, new: bool) -> repository.Description:
        told.append("format up" if new else "up")
        return description

    def called(children: ioproc.Children, function: str, *given: Any) -> Any:
        told.append(function)
        return call(children, function, *given)

    monkeypatch.setattr(localfs.LocalFs, "bring_up", bring_up)
    monkeypatch.setattr(localfs.LocalFs, "take_down", lambda helper, description: told.append("down"))
    monkeypatch.setattr(ioproc.Children, "call", called)
    return told


@pytest.fixture
def connections(service: Service) -> Iterator[connected.Connections]:
    """Of an agent of its own, which never polls: nothing but the test is heard."""
    made = connected.Connections(service.settings, events.EventLog(), service.server, storage_fixture.Root())
    yield made
    made.stop()


@pytest.fixture
def place(world: storage_fixture.World) -> Path:
    path = world.directory / f"ground-{ids.new()[:8]}"
    path.mkdir()
    return path


def formatted(place: Path) -> dict[str, str]:
    formats.open(storage_fixture.describe(place, place.name)).format_(sanlock_fixture.IO_TIMEOUT_S)
    return {"path": str(place)}


def test_format_stands_on_its_ground_alone(connections: connected.Connections, place: Path, done: list[str]) -> None:
    connections.format(LOCAL, {"path": str(place)}, sanlock_fixture.IO_TIMEOUT_S)
    assert done == ["format up", "format_repository", "down"]


def test_connect_that_fails_leaves_nothing_up(connections: connected.Connections, place: Path, done: list[str]) -> None:
    with pytest.raises(errors.NotARepository):
        connections.connect("none", LOCAL, {"path": str(place)})
    assert done == ["up", "header", "down"]


def test_ground_is_left_with_the_last_id(connections: connected.Connections, place: Path, done: list[str]) -> None:
    parameters = formatted(place)
    for repo_id in ("first", "second"):
        connections.connect(repo_id, LOCAL, parameters)
    with pytest.raises(errors.RepositoryExists):  # fails after its ground was up, on which another stands
        (place.parent / f"{place.name}-copy").mkdir()
        copy = place.parent / f"{place.name}-copy" / "repository"
        copy.write_bytes((place / "repository").read_bytes())
        connections.connect("first", LOCAL, {"path": str(copy.parent)})
    assert done == ["up", "header", "up", "header", "up", "header", "down"]
    del done[:]
    membership = connections.get("first").membership
    until(lambda: membership.poll() or membership.state == "joined")
    connections.disconnect("first", lambda connection: [])
    assert done == []
    connections.disconnect("second", lambda connection: [])
    assert done == ["leave_lockspace", "down"]


def test_ground_that_stays_up_is_no_failure(
    connections: connected.Connections, place: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else uses it: the repository is disconnected all the same."""

    def busy(helper: object, description: repository.Description) -> None:
        done.append("busy")
        raise errors.HelperFailed(call="Take", reason="it is in use")

    monkeypatch.setattr(localfs.LocalFs, "take_down", busy)
    connections.connect("held", LOCAL, formatted(place))
    membership = connections.get("held").membership
    until(lambda: membership.poll() or membership.state == "joined")
    connections.disconnect("held", lambda connection: [])
    assert done[-1] == "busy"
    with pytest.raises(errors.NoSuchRepository):
        connections.get("held")


def test_ground_is_changed_by_one_at_a_time(
    connections: connected.Connections, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second id for it, while the first is being connected, could have it taken down under its feet."""
    parameters = formatted(place)
    refused: list[dict[str, Any]] = []

    def bring_up(helper: object, description: repository.Description, *, new: bool) -> repository.Description:
        if not refused:
            with pytest.raises(errors.RepositoryInUse) as caught:
                connections.connect("second", LOCAL, parameters)
            refused.append(caught.value.facts)
        return description

    monkeypatch.setattr(localfs.LocalFs, "bring_up", bring_up)
    connections.connect("first", LOCAL, parameters)
    assert [facts["repo_id"] for facts in refused] == [str(place)]
    connections.connect("second", LOCAL, parameters)
    membership = connections.get("first").membership
    until(lambda: membership.poll() or membership.state == "joined")
    for repo_id in ("first", "second"):
        connections.disconnect(repo_id, lambda connection: [])
