"""This host's membership in the lockspaces of connected repositories.

    left --join--> joining --(3 x io_timeout, longer after a crash)--> joined
     ^                |                                                  |
     +--(refused)-----+--------------(storage lost, sanlock restarted)---+      tried again every RETRY_S

sanlock's daemon knows the truth; what stands here is what one thread last asked it, several times a second while
something joins, every CHECK_S otherwise. It is asked without touching storage, so the thread cannot hang with it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from vdsm import errors, leases, logs, programs

_log = logs.get("storage.lockspaces")

CHECK_S = 5.0
RETRY_S = 5.0
# Joining a lockspace whose host id is free takes 3 x io_timeout. When the id carries the name of another host, sanlock
# watches it for 14 x io_timeout, to see whether that host lives.
_JOIN, _JOIN_AFTER_ANOTHER = 3, 14
# How long (seconds) the daemon may take to tell of itself. It does so in milliseconds, or not at all.
_STATUS_S = 10.0
_RENEWED = "renewal_last_success="

Tell = Callable[[str], None]

JOINING, JOINED, LEAVING, LEFT = "joining", "joined", "leaving", "left"


class Membership:
    """One lockspace. Methods may be called from any thread.

    `holder` is the name that the host id's place carried when it is not this host's. `changed(state)` is called after
    each change, in the thread that noticed it.
    """

    def __init__(
        self,
        lockspace: leases.Lockspace,
        io_timeout_s: int,
        holder: str | None,
        changed: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lockspace = lockspace
        self._io_timeout_s = io_timeout_s
        self._join_s = (_JOIN_AFTER_ANOTHER if holder else _JOIN) * io_timeout_s
        self._holder = holder
        self._on_change = changed
        self._clock = clock
        self._changed = threading.Condition()
        self._state = LEFT
        self._reason = ""
        self._since = time.time()
        self._joining_since = self._asked = clock()

    @property
    def state(self) -> str:
        return self._state

    @property
    def reason(self) -> str:
        """Why this host is not in it (yet); empty when it is."""
        return self._reason

    @property
    def since(self) -> float:
        """When it came into its state, in seconds since 1970."""
        return self._since

    @property
    def seconds_left(self) -> float:
        """Estimate of what is left of joining, at least a second: that it takes longer is no news."""
        return max(1.0, self._joining_since + self._join_s - self._clock())

    def join(self) -> None:
        """Starts joining; what comes of it is seen by `poll`. Never raises: a daemon that is down is tried again."""
        self._joining_since = self._asked = self._clock()
        try:
            leases.join(self._lockspace, self._io_timeout_s)
        except errors.VdsmError as error:
            self._set(LEFT, str(error))
        else:
            self._set(JOINING, f"host id {self._lockspace.host_id} was {self._holder}'s" if self._holder else "joining")
            self._ask()  # an agent that was started again finds it joined

    def poll(self) -> None:
        """Asks sanlock when it is time to. Runs in the one thread that does this."""
        now = self._clock()
        if self._state == LEAVING:
            return
        if self._state == LEFT:
            if now - self._asked >= RETRY_S:
                self.join()
        elif self._state == JOINING or now - self._asked >= CHECK_S:
            self._asked = now
            self._ask()

    def _ask(self) -> None:
        try:
            answer = leases.state(self._lockspace)
        except errors.VdsmError as error:
            self._set(LEFT, str(error))
            return
        if answer == "joined":
            self._set(JOINED, "")
        elif answer == "left":
            self._set(LEFT, "sanlock gave up joining" if self._state == JOINING else "sanlock left the lockspace")

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside the block the lockspace is being left: nothing new begins. A failure there takes that back."""
        before, reason = self._state, self._reason
        self._set(LEAVING, "being disconnected")
        try:
            yield
        except BaseException:
            self._set(before, reason)
            raise
        self._set(LEFT, "disconnected")

    def wait(self, repo_id: str, wait_s: float) -> None:
        """Returns once joined; raises `LeaseNotReady`, or `HostIdTaken`, when that takes longer than `wait_s`."""
        with self._changed:
            if self._changed.wait_for(lambda: self._state == JOINED, wait_s):
                return
        if self._state == LEFT and self._holder:
            raise errors.HostIdTaken(host_id=self._lockspace.host_id, holder=self._holder)
        raise errors.LeaseNotReady(repo_id=repo_id, reason=self._reason, seconds_left=round(self.seconds_left))

    def _set(self, state: str, reason: str) -> None:
        with self._changed:
            moved, self._state, self._reason = state != self._state, state, reason
            self._since = time.time() if moved else self._since
            self._changed.notify_all()
        if moved:
            _log.info("lockspace %s: %s %s", self._lockspace.name, state, reason)
            self._on_change(state)


def has_watchdog() -> bool:
    """Whether this host is reset when its sanlock cannot renew, nor end the holders. Asks the daemon, no storage.

    Raises `LeaseDaemonDown`.
    """
    said = _status().stdout.decode(errors="replace").split()
    if "use_watchdog=0" not in said and "use_watchdog=1" not in said:
        raise errors.LeaseDaemonDown(reason="sanlock does not say whether it has a watchdog")
    return "use_watchdog=1" in said


def renewals() -> dict[str, float]:
    """When this host's id was renewed last in each lockspace, by name, on the clock of `time.monotonic`. Touches no
    storage. Raises `ToolFailed`, `DeadlinePassed`.

    sanlock's status is the one place that has the last success. Its host list has the time that was read before the
    last write, which is one renewal older.
    """
    found: dict[str, float] = {}
    name = ""
    for line in programs.check(_status(), "sanlock").stdout.decode(errors="replace").splitlines():
        if not line.startswith(" "):
            name = line.removeprefix("s ").partition(":")[0] if line.startswith("s ") else ""
        elif name and line.strip().startswith(_RENEWED) and (at := int(line.partition("=")[2])):
            found[name] = float(at)
    return found


def _status() -> programs.Completed:
    """All that the daemon says of itself."""
    return programs.run(["sanlock", "client", "status", "-D"], timeout_s=_STATUS_S)


def holder(lockspace: leases.Lockspace, own_name: str) -> str | None:
    """The name that this host's id carries on storage, None when it is free or ours. Runs in a child.

    sanlock decides by whether that host still writes there; its name is for people who gave two hosts one id.
    """
    path = lockspace.path.replace(":", "\\:")
    place = f"{lockspace.name}:{lockspace.host_id}:{path}:{lockspace.offset}"
    answer = programs.run(["sanlock", "direct", "read_leader", "-s", place], timeout_s=10.0)
    found = dict(line.split(" ", 1) for line in answer.stdout.decode().splitlines() if " " in line)
    free = answer.exit_code != 0 or found.get("timestamp") == "0"
    return None if free or found.get("resource_name") in (None, "", own_name) else found["resource_name"]
