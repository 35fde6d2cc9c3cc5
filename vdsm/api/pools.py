"""Threads for verbs that block: bounded, and one set for each repository and for each VM with hook scripts, so that
nothing queues behind storage, nor behind a script."""

import collections
import threading
from collections.abc import Callable

from vdsm import errors, logs

logger = logs.get("api.pools")

Work = Callable[[], object]

# Verbs that touch no repository: the root helper, which answers in milliseconds unless it is sick.
GENERAL_THREADS = 8
GENERAL_QUEUE = 100
# Verbs that wait for libvirt. When it hangs they wait for its deadline, and nobody else waits with them.
MACHINE_THREADS = 8
MACHINE_QUEUE = 100
# Verbs about disks and targets. A portal that does not answer holds a login for half a minute.
DISK_THREADS = 8
DISK_QUEUE = 32
# Calls of one repository that may wait for its threads. More would only find the callers' deadlines passed.
REPOSITORY_QUEUE = 64
# Repositories with a call under way at once, known or not: ids come from callers, so their number needs a limit.
REPOSITORIES = 64
# Threads for the verbs of one VM that wait for its hook scripts, and calls that may wait for those. Scripts hold a
# thread until their deadline at worst: others shall not notice, and an impatient caller shall still destroy the VM.
HOOKED_THREADS = 4
HOOKED_QUEUE = 16
# VMs with such a call under way at once.
HOOKED = 64
# A thread without work ends after this long (seconds); the next call starts one in 0.1 ms.
IDLE_S = 10.0


class BoundedPool:
    """At most `threads` daemon threads and `queue` waiting pieces of work. Threads start when needed."""

    def __init__(self, name: str, threads: int, queue: int, idle_s: float = IDLE_S) -> None:
        self.name = name
        self._limit = threads
        self._queue = queue
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._waiting: collections.deque[Work] = collections.deque()
        self._load = 0  # pieces of work taken and not ended
        self._threads = 0
        self._closed = False

    @property
    def unused(self) -> bool:
        """No work, and no thread that could have some."""
        return not self._threads and not self._load

    def submit(self, work: Work) -> None:
        """Runs `work` in one of the threads, now or later. Never blocks; raises `errors.Overloaded` when it is full."""
        with self._changed:
            if self._load >= self._limit + self._queue:
                raise errors.Overloaded(what=f"calls waiting in pool {self.name}", limit=self._queue)
            if self._load >= self._threads < self._limit:
                threading.Thread(target=self._serve, name=self.name, daemon=True).start()
                self._threads += 1
            self._load += 1
            self._waiting.append(work)
            self._changed.notify()

    def close(self) -> None:
        """Lets the threads end once the work they have is done. Returns at once: work may hang."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except BaseException:  # the pool's border: a thread outlives its work
                logger.exception("work in pool %s", self.name)
            with self._changed:
                self._load -= 1

    def _next(self) -> Work | None:
        """The next piece of work, or None when this thread shall end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, self._idle_s)
            if self._waiting:
                return self._waiting.popleft()
            self._threads -= 1
            return None


class Family:
    """Pools by key, each made when it is first asked for, `limit` at most with work. All methods from any thread."""

    def __init__(self, name: str, threads: int, queue: int, limit: int, what: str) -> None:
        self._name = name
        self._threads = threads
        self._queue = queue
        self._limit = limit
        self._what = what
        self._lock = threading.Lock()
        self._pools: dict[str, BoundedPool] = {}

    def get(self, key: str) -> BoundedPool:
        """Raises `errors.Overloaded` beyond the limit."""
        with self._lock:
            pool = self._pools.get(key)
            if pool is None:
                self._forget_unused()
                pool = BoundedPool(f"{self._name} {key}", self._threads, self._queue)
                self._pools[key] = pool
            return pool

    def drop(self, key: str) -> None:
        """Forgets a pool: what runs there goes on or hangs alone, the next call gets fresh threads."""
        with self._lock:
            pool = self._pools.pop(key, None)
        if pool is not None:
            pool.close()

    def close(self) -> None:
        """Lets all threads end after their work, without waiting for them."""
        with self._lock:
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            pool.close()

    def _forget_unused(self) -> None:
        if len(self._pools) < self._limit:
            return
        self._pools = {key: pool for key, pool in self._pools.items() if not pool.unused}
        if len(self._pools) >= self._limit:
            raise errors.Overloaded(what=self._what, limit=self._limit)


class Pools:
    """The general pool, those of VMs and of disks, one for each repository, and one for each VM whose hook scripts
    verbs wait for."""

    def __init__(self, repository_threads: int) -> None:
        self.general = BoundedPool("general", GENERAL_THREADS, GENERAL_QUEUE)
        self.machines = BoundedPool("machines", MACHINE_THREADS, MACHINE_QUEUE)
        self.disks = BoundedPool("disks", DISK_THREADS, DISK_QUEUE)
        self._repositories = Family(
            "repo", repository_threads, REPOSITORY_QUEUE, REPOSITORIES, "repositories with calls under way"
        )
        self._hooked = Family("hooked", HOOKED_THREADS, HOOKED_QUEUE, HOOKED, "VMs with hook scripts under way")
        self.repository = self._repositories.get
        self.hooked = self._hooked.get
        self.drop = self._repositories.drop

    def close(self) -> None:
        """Lets all threads end after their work, without waiting for them."""
        self.general.close()
        self.machines.close()
        self.disks.close()
        self._repositories.close()
        self._hooked.close()
