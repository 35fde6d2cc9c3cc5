"""How much room repositories have. Each is asked at most once at a time, so one that is stuck delays nobody."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# How long (seconds) a list waits for an answer: for the first one of a repository, and for a fresher one.
FIRST_S = 1.0
FRESHER_S = 0.02
# An answer this old (seconds) is not told any more: the storage does not answer.
AGE_S = 10.0

Space = Mapping[str, Any]


class Spaces:
    """`ask(repo_id)` blocks as long as the storage does and raises nothing; it runs in the threads of `pool`. Methods
    may be called from any thread."""

    def __init__(
        self,
        ask: Callable[[str], Space],
        pool: concurrent.futures.Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._pool = pool
        self._clock = clock
        self._lock = threading.Lock()
        self._questions: dict[str, concurrent.futures.Future[None]] = {}
        self._answers: dict[str, tuple[Space, float]] = {}

    def tell(self, repo_ids: Iterable[str]) -> dict[str, Space]:
        """What is known of each, {} where there is nothing or nothing new enough. Forgets all other repositories."""
        with self._lock:
            wanted = list(repo_ids)
            self._answers = {repo_id: self._answers[repo_id] for repo_id in wanted if repo_id in self._answers}
            open_ = {repo_id: asked for repo_id, asked in self._questions.items() if not asked.done()}
            new = {repo_id: self._pool.submit(self._answer, repo_id) for repo_id in wanted if repo_id not in open_}
            self._questions = open_ | new
            first = [asked for repo_id, asked in new.items() if repo_id not in self._answers]
        # Who has not answered an earlier call yet is not waited for again.
        concurrent.futures.wait(new.values(), FRESHER_S)
        concurrent.futures.wait(first, FIRST_S)
        return {repo_id: self._told(repo_id) for repo_id in wanted}

    def _answer(self, repo_id: str) -> None:
        space = self._ask(repo_id)
        with self._lock:
            self._answers[repo_id] = space, self._clock()

    def _told(self, repo_id: str) -> Space:
        with self._lock:
            space, told = self._answers.get(repo_id, ({}, 0.0))
        return space if self._clock() - told < AGE_S else {}
