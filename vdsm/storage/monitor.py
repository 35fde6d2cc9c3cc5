"""How each connected repository is: whether it answers and how fast, what space it has, how late this host's id is.

    unknown --> reachable <--> unreachable      looked at every `storage.monitor_s`, every RETRY_S while it is not well

Each repository has a thread and a child process of its own here. One that hangs delays no other, and takes no child
from its verbs. There is one look at a time: while its child hangs in the kernel, beyond any signal, no other follows,
and the repository stays unreachable at no cost. What a look does is `probe` of `steps/places.py`.

sanlock's daemon knows when it renewed this host's id in each lockspace. It is asked for all of them in one call, which
touches no storage.

All that is told here is from memory. What changes is told once, by the thread that noticed it.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vdsm import config, errors, logs, periodic
from vdsm.storage import ioproc, lockspaces

_log = logs.get("storage.monitor")

UNKNOWN, REACHABLE, UNREACHABLE = "unknown", "reachable", "unreachable"

# Whoever waits for a repository to come back shall not wait for a whole period (seconds).
RETRY_S = 2.0
# sanlock renews every 2 io_timeouts, gives a try one of them, and ends the holders 8 after the last that worked. Two
# tries in a row that failed are late: slow storage makes one of them now and then.
_LATE = 4
# Of a thread that is at a look, when the agent stops (seconds). It may hang; the child ends with the agent.
_STOP_S = 1.0
# The agent's own trouble with the child or the root helper says nothing of the storage.
_NO_NEWS = (errors.WorkerDied, errors.DeadlinePassed, errors.Unexpected, errors.HelperUnavailable)

Facts = dict[str, Any]
Tell = Callable[[Facts], None]


class Sight(NamedTuple):
    """What the last look saw. `since` is when the repository became what it is, in seconds since 1970; `ended` when the
    look was over, on the clock of the watch."""

    reachability: str
    since: float
    error: errors.VdsmError | None = None
    ended: float | None = None
    read_s: float | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None

    @property
    def gist(self) -> tuple[str, str | None]:
        """What is news when it changes."""
        return self.reachability, self.error.key if self.error else None


class Watch:
    """One repository. `ask` answers as `places.probe`, or raises why not. `tell` gets what has changed, as an event's
    params. After a look that failed `bring_back` brings up what is down, or raises why not. `look` and `renewed` have
    one caller each; the others may be called from any thread."""

    def __init__(
        self,
        storage: config.Storage,
        io_timeout_s: int,
        ask: Callable[[], Facts],
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        bring_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = storage
        self._io_timeout_s = io_timeout_s
        self._ask = ask
        self._tell = tell
        self._clock = clock
        self._wall = wall
        self._bring_back = bring_back
        self._sight = Sight(UNKNOWN, wall())
        self._space_low: bool | None = None
        self._renewal_age_s: float | None = None
        self._renewal_late = False

    def pause_s(self) -> float:
        """How long until the next look."""
        well = self._sight.reachability == REACHABLE
        return self._config.monitor_s if well else min(RETRY_S, self._config.monitor_s)

    def look(self) -> None:
        """Blocks as long as `ask` does, and `bring_back` behind it."""
        try:
            answer = self._ask()
        except errors.VdsmError as error:
            unknown = isinstance(error, _NO_NEWS)
            reason = error if unknown else self._obstacle() or error
            self._see(Sight(UNKNOWN if unknown else UNREACHABLE, self._wall(), reason, self._clock()))
        else:
            self._see(Sight(REACHABLE, self._wall(), None, self._clock(), **answer))
            self._weigh(answer["total_bytes"], answer["free_bytes"])

    def _obstacle(self) -> errors.VdsmError | None:
        """Why what an outage has taken down cannot be brought back yet: that tells more than the look that failed."""
        try:
            self._bring_back()
        except errors.VdsmError as error:
            return error
        return None

    def _see(self, now: Sight) -> None:
        before = self._sight
        self._sight = now._replace(since=before.since) if now.reachability == before.reachability else now
        if now.gist != before.gist:
            reason = str(now.error) if now.error else None
            self._tell({"change": "reachability", "reachability": now.reachability, "reason": reason})

    def _weigh(self, total_bytes: int, free_bytes: int) -> None:
        before = bool(self._space_low)
        limit = self._config.space_enough_percent if before else self._config.space_low_percent
        self._space_low = 100 * free_bytes < limit * total_bytes
        if self._space_low != before:
            facts = {"space_low": self._space_low, "total_bytes": total_bytes, "free_bytes": free_bytes}
            self._tell({"change": "space", **facts})

    def renewed(self, at: float | None) -> None:
        """This host's id was renewed last then, on the clock of the watch; None: it is in no lockspace, or nobody
        knows. That changes nothing about how late it is: a lockspace that was lost has an event of its own."""
        self._renewal_age_s = None if at is None else self._clock() - at
        if self._renewal_age_s is None:
            return
        before, self._renewal_late = self._renewal_late, self._renewal_age_s > _LATE * self._io_timeout_s
        if self._renewal_late != before:
            facts = {"renewal_late": self._renewal_late, "renewal_age": self._renewal_age_s}
            self._tell({"change": "renewal", **facts})

    def info(self) -> Facts:
        """As `listStorageRepositories` tells it."""
        seen = self._sight
        return {
            "reachability": seen.reachability,
            "reachability_reason": str(seen.error) if seen.error else None,
            "reachability_code": seen.error.code if seen.error else 0,
            "reachability_since": seen.since,
            "last_check": None if seen.ended is None else self._clock() - seen.ended,
            "read_latency": seen.read_s,
            "total_bytes": seen.total_bytes,
            "free_bytes": seen.free_bytes,
            "space_low": self._space_low,
            "renewal_age": self._renewal_age_s,
            "renewal_late": self._renewal_late,
        }


class _Watched(NamedTuple):
    watch: Watch
    thread: periodic.Periodic
    children: ioproc.Children


class Monitor:
    """All of them, by persistent name. Methods may be called from any thread; what is begun before `start` is looked at
    from then on. `renewals` answers as `lockspaces.renewals`."""

    def __init__(
        self, storage: config.Storage, renewals: Callable[[], Mapping[str, float]] = lockspaces.renewals
    ) -> None:
        self._config = storage
        self._ask_renewals = renewals
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}
        self._started = False
        self._renewals = periodic.Periodic("renewals", storage.monitor_s, self._renew)

    def start(self) -> None:
        with self._lock:
            self._started = True
            for watched in self._watched.values():
                watched.thread.start()
        self._renewals.start()

    def stop(self) -> None:
        """Waits a little for looks that are under way, and not for those that hang."""
        with self._lock:
            self._started = False
            all_watched = list(self._watched.values())
            self._watched.clear()
        self._renewals.stop(_STOP_S)
        for watched in all_watched:
            watched.thread.stop(0)
        deadline = time.monotonic() + _STOP_S
        for watched in all_watched:
            watched.thread.stop(max(0.0, deadline - time.monotonic()))
            watched.children.close()

    def begin(
        self,
        name: str,
        repo_id: Callable[[], str],
        children: ioproc.Children,
        io_timeout_s: int,
        tell: Tell,
        bring_back: Callable[[], None] = lambda: None,
    ) -> None:
        """Looks at the repository from now on, through `children`, which are for nothing else. `repo_id` is asked for
        the id that errors shall name; the rest as in `Watch`."""

        def told(facts: Facts) -> None:
            _log.info("repository %s: %s", repo_id(), facts)
            tell(facts)

        def ask() -> Facts:
            found: Facts = children.call("probe", {}, repo_id())
            return found

        watch = Watch(self._config, io_timeout_s, ask, told, bring_back=bring_back)
        thread = periodic.Periodic(f"monitor {repo_id()}", watch.pause_s, watch.look)
        with self._lock:
            self._watched[name] = _Watched(watch, thread, children)
            if self._started:
                thread.start()

    def end(self, name: str) -> None:
        """No further look begins, and the one under way is waited for, which its deadline bounds: nothing of it may
        keep storage in use that is taken down next. None of that name is fine."""
        with self._lock:
            watched = self._watched.pop(name, None)
        if watched is not None:
            watched.thread.stop(self._config.monitor_deadline_s)
            watched.children.close()

    def info(self, name: str) -> Facts:
        return self._watch(name).info()

    def _watch(self, name: str) -> Watch:
        """One that has seen nothing, when there is none."""
        with self._lock:
            watched = self._watched.get(name)
        return watched.watch if watched else Watch(self._config, 0, dict, lambda _: None)

    def _renew(self) -> None:
        with self._lock:
            watches = {name: watched.watch for name, watched in self._watched.items()}
        renewed = self._renewed() if watches else {}
        for name, watch in watches.items():
            watch.renewed(renewed.get(name))

    def _renewed(self) -> Mapping[str, float]:
        try:
            return self._ask_renewals()
        except errors.VdsmError as error:
            _log.warning("sanlock does not say when it renewed: %s", error)
            return {}
