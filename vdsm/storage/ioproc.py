"""Repository I/O in child processes that can be killed.

Every touch of a repository by a verb happens here: a thread of the agent waits for a child, never for a disk. Each
repository has a few children of its own, started when they are needed; each serves one call after the other. A call
that does not answer by its deadline costs its child: it is killed and left behind, since a process that waits for
frozen storage cannot die. Its place stays taken until it is really gone. When all places are taken by such, the
repository's calls are refused at once, and no other repository has noticed.

    agent                              child (`serve`)
    {"function", "argument", "repo_id"} -->
                                       <-- {"result"} or {"error": as `VdsmError.to_wire`}
"""

import errno
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdsm import channels, errors, forkserver, leases, logs
from vdsm.storage import formats, repository
from vdsm.storage.bodies import exporting, importing
from vdsm.storage.steps import (
    checking,
    copyintents,
    fences,
    fixclaims,
    growing,
    intents,
    places,
    reading,
    removal,
    vmclaims,
    vmrecords,
)

_log = logs.get("storage.ioproc")

_TARGET = "vdsm.storage.ioproc:serve"
# The entry of the monitor's children. They do what others do, and are told apart by it.
MONITORING = "vdsm.storage.ioproc:serve_monitor"

# What a child can be asked to do: without a session with sanlock, and with one.
PLAIN: dict[str, Callable[[repository.Repository, dict[str, Any]], Any]] = {
    function.__name__: function
    for function in (
        *(places.format_repository, places.header, places.leave_lockspace, places.probe, places.show, places.sweep),
        *(reading.find, reading.image, reading.images, reading.status, reading.layers, reading.vm, checking.check),
        *(fences.lease, fences.force),
        *(exporting.check_export, growing.grow_disk),
    )
}
LEASED: dict[str, intents.Intent] = {
    function.__name__: function
    for function in (
        *(intents.create_virtual_disk, intents.create_snapshot, intents.roll_forward, copyintents.plan_copy),
        intents.resize_virtual_disk,
        *(copyintents.begin_copy, copyintents.withdraw_copy, intents.set_user_data, importing.begin_import),
        *(removal.remove_image, vmrecords.ensure_vm, vmrecords.change_vm, vmrecords.end_vms),
        *(vmclaims.claim_vm, vmclaims.unclaim_vm),
        *(fixclaims.begin_fix, fixclaims.withdraw_fix),
        *(vmrecords.remove_vm, fences.fence, growing.make_room),
    )
}


# -- in the agent ----------------------------------------------------------------------------------------------------


class Children:
    """The children of one repository. Methods may be called from any thread."""

    def __init__(
        self,
        server: forkserver.ForkServer,
        description: repository.Description,
        places: int,
        deadline_s: float,
        target: str | None = None,
    ) -> None:
        self._server = server
        self._target = target or _TARGET
        self._description = description
        self._places = places
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._idle: list[forkserver.Child] = []
        self._busy = 0
        self._stuck: list[forkserver.Child] = []
        self._closed = False

    def call(self, function: str, argument: dict[str, Any], repo_id: str, deadline_s: float | None = None) -> Any:
        """What the function of that name answers. Raises what it raises.

        `RepositoryStuck` when no child answered in time, or all are stuck; what was begun may still be done then.
        `WorkerDied` when the child died; the record says how far it got.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        deadline = time.monotonic() + deadline_s
        child = self._take(repo_id, deadline)
        try:
            child.channel.send({"function": function, "argument": argument, "repo_id": repo_id})
            answer = child.channel.receive(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            self._abandon(child)
            _log.error("repository %s does not answer %s, child %s is left behind", repo_id, function, child.pid)
            raise errors.RepositoryStuck(repo_id=repo_id, seconds=deadline_s) from error
        except ConnectionError:
            answer = None
        except BaseException:
            self._abandon(child)
            raise
        if answer is None:
            self._abandon(child)
            raise errors.WorkerDied(how=f"repository {repo_id}, {function}")
        self._give_back(child)
        if "error" in answer:
            raise errors.VdsmError.from_wire(answer["error"])
        return answer["result"]

    def in_use(self) -> bool:
        """Whether a call is under way or a child is stuck."""
        with self._changed:
            self._bury()
            return bool(self._busy or self._stuck)

    def close(self) -> None:
        """Lets the idle children end, and the busy ones after their call. The stuck ones are killed already, and nobody
        counts them any more."""
        with self._changed:
            self._closed = True
            left, self._idle, self._stuck = [*self._idle, *self._stuck], [], []
        for child in left:
            child.close()

    def _take(self, repo_id: str, deadline: float) -> forkserver.Child:
        """An idle child or a new one; waits for a place."""
        with self._changed:
            while True:
                self._bury()
                if (idle := self._living()) is not None:
                    self._busy += 1
                    return idle
                if self._busy + len(self._stuck) < self._places:
                    self._busy += 1
                    break
                left_s = deadline - time.monotonic()
                if len(self._stuck) == self._places or left_s <= 0:
                    raise errors.RepositoryStuck(repo_id=repo_id, seconds=self._deadline_s)
                self._changed.wait(left_s)
        try:
            return self._server.spawn(self._target, self._description)
        except BaseException:
            with self._changed:
                self._busy -= 1
                self._changed.notify()
            raise

    def _living(self) -> forkserver.Child | None:
        """An idle child that has not died, as all do when the fork server was killed."""
        while self._idle:
            child = self._idle.pop()
            if not child.wait_gone(0):
                return child
            child.close()
        return None

    def _bury(self) -> None:
        """Frees the places of stuck children that have gone meanwhile."""
        for child in [child for child in self._stuck if child.wait_gone(0)]:
            self._stuck.remove(child)
            child.close()

    def _give_back(self, child: forkserver.Child) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify()
            if not self._closed:
                self._idle.append(child)
                return
        child.close()

    def _abandon(self, child: forkserver.Child) -> None:
        """Kills the child; its place is free when all that it started is gone."""
        child.kill(signal.SIGKILL)
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()
            if not self._closed:
                self._stuck.append(child)
                return
        child.close()


# -- in the child ----------------------------------------------------------------------------------------------------


def serve(description: repository.Description, channel: channels.Channel) -> None:
    """A child's life: answers calls until the agent closes its end. SIGTERM (sanlock's) ends it at once."""
    _Server(description, channel).run()


def serve_monitor(description: repository.Description, channel: channels.Channel) -> None:
    """As `serve`."""
    serve(description, channel)


class _Server:
    def __init__(self, description: repository.Description, channel: channels.Channel) -> None:
        self._repo = formats.open(description)
        self._repo.tool_fds = (channel.liveness_fd,)
        self._channel = channel
        self._session: leases.Session | None = None

    def run(self) -> None:
        while (call := self._channel.receive()) is not None:
            self._channel.send(self._answer(call))

    def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """The border of the child: whatever goes wrong becomes the call's error."""
        self._repo.repo_id = call["repo_id"]
        try:
            return {"result": self._run(call["function"], call["argument"])}
        except errors.VdsmError as error:
            failure = error
        except OSError as error:
            _log.exception("%s failed", call["function"])
            failure = self._explain(error)
        except Exception:  # noqa: BLE001 - the border of the process
            _log.exception("%s failed", call["function"])
            failure = errors.Unexpected(reason=f"{call['function']} failed")
        if isinstance(failure, errors.LeaseDaemonDown | errors.LeaseFailed):
            self._hang_up()
        return {"error": failure.to_wire()}

    def _run(self, function: str, argument: dict[str, Any]) -> Any:
        if function in PLAIN:
            return PLAIN[function](self._repo, argument)
        leased = LEASED[function]
        if self._session is not None and not answers(self._session):
            self._hang_up()
        if self._session is None:
            self._session = leases.Session()
        return leased(self._repo, self._session, argument)

    def _hang_up(self) -> None:
        """Ends the registration, and with it all that it may still hold: the daemon may be another by now."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _explain(self, error: OSError) -> errors.VdsmError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return errors.RepositoryFull(repo_id=self._repo.repo_id)
        if error.errno == errno.ESTALE or (error.errno == errno.ENOENT and _is_removed(self._repo.place)):
            return errors.StorageStale(repo_id=self._repo.repo_id)
        return errors.StorageFailed(repo_id=self._repo.repo_id, reason=error.strerror or str(error))


def _is_removed(place: str) -> bool:
    """Whether a mounted directory was removed on its server, which may still show it, without links."""
    try:
        return Path(place).stat().st_nlink == 0
    except OSError as error:
        return error.errno == errno.ESTALE


def answers(session: leases.Session) -> bool:
    """False when the daemon that the session is registered with has gone: another may be there by now."""
    poller = select.poll()
    poller.register(session.fd, 0)  # nothing but the connection's end
    return not poller.poll(0)
