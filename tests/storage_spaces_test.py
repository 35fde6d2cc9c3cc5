"""What a list of repositories says of their space when one of them hangs."""

import concurrent.futures
import threading
import time
from collections.abc import Iterator

import pytest

from tests.until import until
from vdsm.storage import spaces


class Storage:
    """Two repositories, of which `slow` answers when it is let go."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list[str] = []
        self.free_bytes = 7
        self.going = threading.Event()
        self.going.set()
        self.threads = concurrent.futures.ThreadPoolExecutor(4)
        self.spaces = spaces.Spaces(self.ask, self.threads, lambda: self.now)

    def ask(self, repo_id: str) -> spaces.Space:
        self.asked.append(repo_id)
        if repo_id == "slow":
            self.going.wait(20)
        return {"free_bytes": self.free_bytes}

    def tell(self) -> dict[str, spaces.Space]:
        return self.spaces.tell(["quick", "slow"])


@pytest.fixture
def storage() -> Iterator[Storage]:
    made = Storage()
    yield made
    made.going.set()
    made.threads.shutdown()


def test_stuck_repository_keeps_its_last_answer_for_a_while(storage: Storage) -> None:
    known = {"free_bytes": 7}
    assert storage.tell() == {"quick": known, "slow": known}
    storage.going.clear()
    storage.free_bytes = 5
    until(lambda: storage.tell() == {"quick": {"free_bytes": 5}, "slow": known})
    storage.now += spaces.AGE_S
    until(lambda: storage.tell() == {"quick": {"free_bytes": 5}, "slow": {}})
    storage.going.set()
    until(lambda: storage.tell()["slow"] == {"free_bytes": 5})


def test_stuck_repository_is_asked_once_and_waited_for_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.going.clear()
    monkeypatch.setattr(spaces, "FIRST_S", 0.01)
    storage.tell()
    monkeypatch.setattr(spaces, "FIRST_S", 30.0)
    began = time.monotonic()
    assert storage.tell()["slow"] == {}
    assert time.monotonic() - began < 10
    assert storage.asked.count("slow") == 1
