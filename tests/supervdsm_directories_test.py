"""What the root helper does to directories, and what it can not be talked into."""

import collections
import contextlib
import ctypes
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import supervdsm_process as processes

from supervdsm import calls, client, contract, directories, settings

pytestmark = processes.needs_root

AGENT, OTHER, STORAGE_GID = processes.AGENT_UID, 4711, 4712


@pytest.fixture
def place() -> Iterator[Path]:
    """Holds `data`, where repositories may lie, and `victim`, an empty directory of root's: nothing may change it."""
    with processes.place() as directory:
        (directory / "data").mkdir()
        (directory / "victim").mkdir(mode=0o755)
        before = look(directory / "victim")
        yield directory
        assert look(directory / "victim") == before
        assert list((directory / "victim").iterdir()) == []


def look(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def prepare(path: Path | str, *roots: Path) -> calls.PreparedDirectory:
    context = settings.Settings(AGENT, 0, STORAGE_GID, tuple(str(root) for root in roots))
    return directories.prepare_directory(calls.PrepareDirectory(str(path)), context)


# -- what it does ----------------------------------------------------------------------------------------------------


def test_a_directory_is_made_for_the_agent(place: Path) -> None:
    path = place / "data/a"
    assert prepare(path, place / "data") == calls.PreparedDirectory(path=str(path), created=True)
    assert look(path) == (AGENT, STORAGE_GID, 0o2770)


def test_it_can_be_repeated_and_repairs_owner_and_mode(place: Path) -> None:
    path = place / "data/a"
    prepare(path, place / "data")
    (path / "record").touch()
    path.chmod(0o700)
    os.chown(path, AGENT, 0)
    assert prepare(path, place / "data") == calls.PreparedDirectory(path=str(path), created=False)
    assert look(path) == (AGENT, STORAGE_GID, 0o2770)
    assert look(path / "record")[0] == 0


def test_an_empty_directory_of_root_is_taken_over(place: Path) -> None:
    (place / "data/a").mkdir()
    assert not prepare(place / "data/a", place / "data").created
    assert look(place / "data/a") == (AGENT, STORAGE_GID, 0o2770)


def test_every_configured_directory_serves_and_deeper_ones_too(place: Path) -> None:
    (place / "data/team").mkdir()
    (place / "more").mkdir()
    for path in (place / "data/team/a", place / "more/a"):
        assert prepare(path, place / "data", place / "more").created
    assert look(place / "data/team") == (0, 0, 0o755)


def test_the_umask_of_the_caller_does_not_matter(place: Path) -> None:
    before = os.umask(0o777)
    try:
        prepare(place / "data/a", place / "data")
    finally:
        os.umask(before)
    assert look(place / "data/a") == (AGENT, STORAGE_GID, 0o2770)


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "2/a", "-other/a", "/../victim", "/a/../../victim", "/./a", "//a", "/"])
def test_only_places_under_a_configured_directory(place: Path, path: str) -> None:
    (place / "data2").mkdir()
    with pytest.raises(contract.Refused):
        prepare(f"{place}/data{path}", place / "data")
    assert list((place / "data").iterdir()) == list((place / "data2").iterdir()) == []


def test_without_configured_directories_nothing_is_allowed(place: Path) -> None:
    with pytest.raises(contract.Refused, match=r"is not under a configured directory \(none\)"):
        prepare(place / "data/a")


def link(path: Path, target: str) -> Callable[[], None]:
    return lambda: path.symlink_to(target)


HOSTILE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a link to a directory": ("a", lambda place: (place / "data/a").symlink_to(place / "victim")),
    "a relative link": ("a", lambda place: (place / "data/a").symlink_to("../victim")),
    "a link to a place inside": ("a", lambda place: (place / "data/a").symlink_to(place / "data/own")),
    "a link to nothing": ("a", lambda place: (place / "data/a").symlink_to(place / "victim/a")),
    "a link to itself": ("a", lambda place: (place / "data/a").symlink_to("a")),
    "a link of the kernel": ("a", lambda place: (place / "data/a").symlink_to("/proc/self/cwd")),
    "a link on the way": ("team/a", lambda place: (place / "data/team").symlink_to(place / "victim")),
    "a link deep on the way": ("own/x/a", lambda place: (place / "data/own/x").symlink_to(place / "victim")),
    "a file": ("a", lambda place: (place / "data/a").touch()),
    "a file on the way": ("team/a", lambda place: (place / "data/team").touch()),
    "a pipe": ("a", lambda place: os.mkfifo(place / "data/a")),
    "a device": ("a", lambda place: os.mknod(place / "data/a", stat.S_IFCHR | 0o600, os.makedev(1, 3))),
    "a link in place of the configured directory": ("a", lambda place: swap_root(place)),
}


def swap_root(place: Path) -> None:
    (place / "data").rename(place / "old")
    (place / "data").symlink_to("victim")


@pytest.mark.parametrize(("name", "plant"), HOSTILE.values(), ids=HOSTILE.keys())
def test_links_and_files_are_refused(place: Path, name: str, plant: Callable[[Path], object]) -> None:
    prepare(place / "data/own", place / "data")
    plant(place)
    with pytest.raises(contract.Refused, match="is a link or a file, not a directory"):
        prepare(place / "data" / name, place / "data")


def test_directories_of_others_are_refused_and_left_alone(place: Path) -> None:
    (place / "data/full/inside").mkdir(parents=True)
    (place / "data/other").mkdir()
    os.chown(place / "data/other", OTHER, OTHER)
    for name, reason in (("full", "belongs to root and is not empty"), ("other", f"belongs to user {OTHER}")):
        before = look(place / "data" / name)
        with pytest.raises(contract.Refused, match=reason):
            prepare(place / "data" / name, place / "data")
        assert look(place / "data" / name) == before


@pytest.mark.parametrize("name", ["no/a", "x" * 256], ids=["no parent", "long name"])
def test_what_cannot_be_made_fails(place: Path, name: str) -> None:
    with pytest.raises((contract.Failed, OSError)):
        prepare(place / "data" / name, place / "data")
    assert list((place / "data").iterdir()) == []


# -- races -----------------------------------------------------------------------------------------------------------

RENAME_EXCHANGE = 2
ROUNDS = 1500


def exchange_for_ever(first: str, second: str, stop: Event) -> None:
    """What a taken-over agent would do: swaps two names, atomically and as fast as it can."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    while not stop.is_set():
        assert renameat2(-100, first.encode(), -100, second.encode(), RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def swapping(first: Path, second: Path) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    attacker = context.Process(target=exchange_for_ever, args=(str(first), str(second), stop))
    attacker.start()
    try:
        yield
    finally:
        stop.set()
        attacker.join(30)
        assert attacker.exitcode == 0
        attacker.close()


@pytest.mark.parametrize(
    ("swapped", "asked"),
    [("data/team/a", "data/team/a"), ("data/team", "data/team/a"), ("data", "data/team/a")],
    ids=["the directory", "its parent", "the configured directory"],
)
def test_a_link_swapped_in_at_any_moment_leads_nowhere(place: Path, swapped: str, asked: str) -> None:
    (place / "data/team/a").mkdir(parents=True)
    # Through the link the same names lead to a directory that would pass the check of the owner.
    inside = place / "trap" / Path(asked).relative_to(swapped)
    inside.mkdir(parents=True, exist_ok=True)
    before = look(inside)
    (place / "link").symlink_to(place / "trap")
    outcomes: collections.Counter[str] = collections.Counter()
    with swapping(place / swapped, place / "link"):
        deadline = time.monotonic() + 60
        while sum(outcomes.values()) < ROUNDS or len(outcomes) < 2:
            assert time.monotonic() < deadline, outcomes
            try:
                prepare(place / asked, place / "data")
                outcomes["done"] += 1
            except contract.Refused:
                outcomes["refused"] += 1
    # Both happened, so the names were really swapped under the calls.
    assert outcomes.keys() == {"done", "refused"}
    assert look(inside) == before


def test_calls_at_once_agree(place: Path) -> None:
    results = []
    start = threading.Barrier(8)

    def one() -> None:
        start.wait(10)
        results.append(prepare(place / "data/a", place / "data"))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(result.created for result in results) == [False] * 7 + [True]
    assert look(place / "data/a") == (AGENT, STORAGE_GID, 0o2770)


def test_the_race_through_the_helper_itself() -> None:
    with processes.running() as helper:
        victim = helper.place / "victim"
        victim.mkdir()
        before = look(victim)
        (helper.data / "a").mkdir()
        (helper.place / "link").symlink_to(victim)
        caller = client.Helper(helper.socket)
        with swapping(helper.data / "a", helper.place / "link"):
            deadline, outcomes = time.monotonic() + 60, []
            while len(outcomes) < 100 or set(outcomes) != {"done", "refused"}:
                assert time.monotonic() < deadline, set(outcomes)
                try:
                    caller.call(calls.PrepareDirectory(f"{helper.data}/a"))
                    outcomes.append("done")
                except contract.Refused:
                    outcomes.append("refused")
        assert look(victim) == before
        assert [line["outcome"] for line in helper.lines()] == outcomes
