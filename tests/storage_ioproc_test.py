"""Repository I/O in children: answers, errors, deadlines, and storage that hangs for real."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import loopfs, sanlock_fixture, storage_fixture
from tests.until import opened, running, until
from vdsm import errors, forkserver, leases
from vdsm.storage import ioproc

DEADLINE_S = 5.0
SHORT_S = 0.3


@pytest.fixture(scope="module")
def server() -> Iterator[forkserver.ForkServer]:
    started = forkserver.ForkServer(["tests.storage_children"], "ERROR")
    yield started
    started.stop()


@pytest.fixture
def make(server: forkserver.ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Makes the children of a repository that is no more than a directory."""
    monkeypatch.setattr(ioproc, "_TARGET", "tests.storage_children:serve")  # the real ones serve only storage's verbs
    made: list[ioproc.Children] = []

    def children(place: Path = tmp_path, places: int = 2) -> ioproc.Children:
        description = storage_fixture.describe(place, "test")
        made.append(ioproc.Children(server, description, places, DEADLINE_S))
        return made[-1]

    yield children
    for one in made:
        one.close()


def call(children: ioproc.Children, function: str, deadline_s: float | None = None, **argument: Any) -> Any:
    return children.call(function, argument, "test", deadline_s)


def test_child_answers_again_and_again(make: Any) -> None:
    children = make()
    pids = {call(children, "pid") for _ in range(5)}
    assert len(pids) == 1, "an idle child is used again"


def test_calls_run_side_by_side_up_to_the_places(make: Any) -> None:
    children = make(places=2)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(call(children, "sleep", seconds=0.3))) for _ in range(4)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["slept"] * 4
    assert time.monotonic() - began > 0.6, "two places, four calls"


def test_named_errors_come_back_as_they_are(make: Any) -> None:
    with pytest.raises(errors.NoSuchImage) as refused:
        call(make(), "fail", how="named")
    assert refused.value.facts == {"image_id": "x", "where": "test"}


def test_nothing_of_a_stuck_child_is_left_open_after_the_end(make: Any) -> None:
    """Neither of one that was stuck before it, nor of one whose call it has cut short."""
    before = opened(os.getpid())

    def call_it(children: ioproc.Children) -> None:
        with pytest.raises(errors.RepositoryStuck):
            call(children, "sleep", 0.5, seconds=60)

    for stuck_first in (True, False):
        children = make()
        calling = threading.Thread(target=call_it, args=[children])
        calling.start()
        if stuck_first:
            calling.join()
        else:
            until(children.in_use)
        children.close()
        calling.join()
    assert {
        link for link in opened(os.getpid()) - before if "pidfd" in link or "pipe" in link or "socket" in link
    } == set()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, errors.RepositoryFull),
        (errno.EDQUOT, errors.RepositoryFull),
        (errno.EIO, errors.StorageFailed),
    ],
)
def test_errors_of_the_storage_get_a_name(make: Any, number: int, expected: type[errors.VdsmError]) -> None:
    with pytest.raises(expected):
        call(make(), "fail", how="storage", errno=number)


def test_unexpected_failures_tell_nothing_of_the_inside(make: Any) -> None:
    children = make()
    with pytest.raises(errors.Unexpected) as failed:
        call(children, "fail", how="unexpected")
    assert "secret" not in str(failed.value)
    assert call(children, "pid")


def test_unknown_functions_are_not_called(make: Any) -> None:
    with pytest.raises(errors.Unexpected):
        call(make(), "system")


def test_child_that_dies_fails_its_call_alone(make: Any) -> None:
    children = make(places=1)
    with pytest.raises(errors.WorkerDied):
        call(children, "die")
    assert call(children, "pid")


def test_late_child_is_killed_and_replaced(make: Any) -> None:
    children = make(places=1)
    late = call(children, "pid")
    with pytest.raises(errors.RepositoryStuck):
        call(children, "sleep", SHORT_S, seconds=30)
    until(lambda: not running(late))
    assert call(children, "pid") != late


def test_idle_child_that_died_is_not_asked(make: Any, server: forkserver.ForkServer) -> None:
    children = make(places=1)
    idle = call(children, "pid")
    os.kill(idle, signal.SIGKILL)
    until(lambda: not running(idle))
    until(lambda: call(children, "pid") != idle)


def test_all_end_with_their_children(make: Any) -> None:
    children = make()
    child = call(children, "pid")
    children.close()
    until(lambda: not running(child))


def test_registration_with_a_dead_daemon_is_noticed() -> None:
    """Otherwise the first call after sanlock's restart would fail for nothing."""
    with sanlock_fixture.running():
        session = leases.Session()
        assert ioproc.answers(session)
    assert not ioproc.answers(session)
    session.close()


def test_frozen_storage_costs_its_own_children_and_nobody_else(make: Any) -> None:
    """ext4 frozen under the writer: it is in D state, where no signal ends it."""
    with loopfs.mounted(16 << 20) as place:
        sick, well = make(place, places=2), make(places=1)
        assert call(sick, "touch") == "touched"
        loopfs.freeze(place)
        late: list[errors.RepositoryStuck] = []

        def touch() -> None:
            with pytest.raises(errors.RepositoryStuck) as refused:
                call(sick, "touch", 1.0)
            late.append(refused.value)

        threads = [threading.Thread(target=touch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(late) == 2
        began = time.monotonic()
        with pytest.raises(errors.RepositoryStuck):
            call(sick, "pid", 60.0)
        assert time.monotonic() - began < 30, "refused at once, not at its deadline"
        assert call(well, "pid"), "another repository has not noticed"
        loopfs.thaw(place)
        until(lambda: not sick.in_use())
        assert call(sick, "touch") == "touched"
