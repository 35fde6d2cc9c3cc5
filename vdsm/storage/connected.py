"""The repositories that are connected: who they are, whether their lockspace is joined, and where an image is.

Connecting has the storage brought up by root, reads the header in a child and answers; the lockspace joins behind it.
A directory that is connected under two ids is one lockspace with two names: it is left with the last of them (trap 13),
and then the storage is taken down. Nothing is persisted.

Runs in the agent; methods may be called from any thread, and block for a child's answer at most.
"""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from supervdsm import client as helper_client
from vdsm import config, errors, events, forkserver, logs, periodic
from vdsm.jobs import job
from vdsm.record import Record
from vdsm.storage import formats, ioproc, lockspaces, monitor, repository, sweeper
from vdsm.storage.rules import models

_log = logs.get("storage.connected")

POLL_S = 0.25
# An image is searched in this many repositories at once; more wait. A stuck one holds its thread until its deadline.
_SEARCHES = 8
# A disconnect waits for this many io_timeouts until sanlock is out of the lockspace.
_LEAVE = 4

Info = dict[str, Any]


class Connection:
    """One repository, under one or more ids. `ground` is its place as the caller described it."""

    def __init__(
        self,
        ground: str,
        description: repository.Description,
        header: Record,
        children: ioproc.Children,
        tell: lockspaces.Tell,
    ) -> None:
        self.ground = ground
        self.description = description
        self.header = header
        self.repository = formats.open(description)
        self.children = children
        self.repo_ids: list[str] = []
        self.membership = lockspaces.Membership(
            self.repository.lockspace(), header["io_timeout_s"], header["holder"], tell
        )

    @property
    def name(self) -> str:
        return self.repository.name

    @property
    def place(self) -> str:
        return self.repository.place

    def info(self, repo_id: str) -> Info:
        """Who it is, and its lockspace. Asks nobody."""
        joined = self.membership.state == lockspaces.JOINED
        return {
            **{"repo_id": repo_id, "repo_format": self.repository.format, "name": self.name, "place": self.place},
            **{"state": self.membership.state, "state_since": self.membership.since},
            "seconds_left": None if joined else round(self.membership.seconds_left),
        }


class Connections:
    def __init__(
        self,
        settings: config.Config,
        log: events.EventLog,
        server: forkserver.ForkServer,
        helper: helper_client.Helper,
    ) -> None:
        self._config = settings
        self._events = log
        self._server = server
        self._helper = helper
        self._lock = threading.Lock()
        self._connected: dict[str, Connection] = {}  # by repo_id
        self._changing: set[str] = set()  # ids and grounds that are being formatted, connected or disconnected
        self._probes: dict[str, ioproc.Children] = {}  # by place; kept while a child of theirs is stuck
        self._searches = concurrent.futures.ThreadPoolExecutor(_SEARCHES, "search")
        self._monitor = monitor.Monitor(settings.storage)
        self._poller = periodic.Periodic("lockspaces", POLL_S, self._poll)
        self._sweeper = sweeper.Sweeper(self._volumes, settings.storage.volume_deadline_s)

    def start(self) -> None:
        self._poller.start()
        self._monitor.start()
        self._sweeper.start()

    def stop(self) -> None:
        """Forgets all repositories. Their lockspaces stay joined: running VMs hold leases in them."""
        self._poller.stop()
        self._monitor.stop()
        self._sweeper.stop()
        self._searches.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            connections = set(self._connected.values())
            self._connected.clear()
        for connection in connections:
            connection.children.close()

    # -- connecting --------------------------------------------------------------------------------------------------

    def format(self, repo_format: str, parameters: dict[str, Any], io_timeout_s: int) -> Info:
        """Makes an empty repository. Answers its header. Raises `NotEmpty` when there is anything at the place."""
        described = self._describe(repo_format, parameters, repo_id="")
        with self._exclusively(described["place"]), self._ground(described, new=True) as description:
            header: Record = self._probe(description, "format_repository", {"io_timeout_s": io_timeout_s})
        return header

    def connect(self, repo_id: str, repo_format: str, parameters: dict[str, Any]) -> Info:
        """Connects; the lockspace joins behind. Connecting the same again is fine. Answers as `infos`.

        Raises `RepositoryExists` when the id stands for another repository, or another place has one of this name;
        `NotARepository`, `RepositoryStuck`, `NoWatchdog`, and what the format raises for its parameters and storage.
        """
        described = self._describe(repo_format, parameters, repo_id)
        self._check_watchdog(repo_format)
        ground = described["place"]
        with self._exclusively(repo_id, ground), self._ground(described, new=False) as description:
            header = self._probe(description, "header", {"host_name": self._config.host.name})
            whole = {name: header[name] for name in ("name", "place", "sector_bytes")}
            connection, new = self._enter(repo_id, ground, {**description, **whole}, header)
        if new:
            connection.membership.join()
        self._publish(repo_id, connection)
        if new:
            self._watch(connection)
        return self._info(repo_id, connection)

    def disconnect(self, repo_id: str, users: Callable[[Connection], list[str]]) -> None:
        """Forgets the id; with the last one of a repository its lockspace is left first.

        Raises `RepositoryInUse` with what `users` answers, and when somebody holds a lease: a lockspace that is left
        all the same would have its holders killed (trap 13).
        """
        with self._exclusively(repo_id, self.get(repo_id).ground):
            connection = self.get(repo_id)
            if connection.repo_ids == [repo_id]:
                self._leave(repo_id, connection, users(connection))
            with self._lock:
                connection.repo_ids.remove(repo_id)
                del self._connected[repo_id]
            if not connection.repo_ids:
                self._monitor.end(connection.name)
                connection.children.close()
                self._take_down(connection.ground, connection.description)
        gone = {"name": connection.name, "change": "state", "state": "disconnected"}
        self._events.publish("repository", repo_id, gone)

    def extend(self, repo_id: str, devices: list[str], overwrite: list[str]) -> None:
        """Adds disks to the storage of the repository."""
        connection = self.get(repo_id)
        with self._exclusively(connection.ground):
            formats.extend(self._helper, connection.description, devices, overwrite)

    def _describe(self, repo_format: str, parameters: dict[str, Any], repo_id: str) -> repository.Description:
        return formats.describe(repo_format, parameters, repo_id, self._config.host.id, self._config.storage)

    def _check_watchdog(self, repo_format: str) -> None:
        """Without one, the lease of a host whose sanlock died passes on while its writers write (trap 5)."""
        allowed = self._config.sanlock.unsafe_no_watchdog or not formats.is_shared(repo_format)
        if not allowed and not lockspaces.has_watchdog():
            raise errors.NoWatchdog(repo_format=repo_format)

    @contextlib.contextmanager
    def _exclusively(self, *names: str) -> Iterator[None]:
        """One change of an id and of a ground at a time; a second one is refused, not queued behind storage."""
        with self._lock:
            for name in names:
                if name in self._changing:
                    raise errors.RepositoryInUse(repo_id=name, users="another format, connect or disconnect")
            self._changing.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._changing.difference_update(names)

    @contextlib.contextmanager
    def _ground(self, described: repository.Description, *, new: bool) -> Iterator[repository.Description]:
        """The description of storage that is up inside the block, and stays so if a repository is connected there.
        Inside `_exclusively` of the ground."""
        description = formats.bring_up(self._helper, described, new=new)
        try:
            yield description
        finally:
            self._take_down(described["place"], description)

    def _take_down(self, ground: str, description: repository.Description) -> None:
        """Unless a repository is connected there. What others keep up is in nobody's way: the next connect finds it."""
        with self._lock:
            if any(connection.ground == ground for connection in self._connected.values()):
                return
        try:
            formats.take_down(self._helper, description)
        except errors.VdsmError as error:
            _log.warning("%s stays up: %s", ground, error)

    def _probe(self, description: repository.Description, function: str, argument: dict[str, Any]) -> Any:
        """Asks a child about a place that is not connected. Children that are stuck there count for the next probe."""
        place = description["place"]
        with self._lock:
            children = self._probes.setdefault(place, self._children(description))
        try:
            return children.call(function, argument, description["repo_id"])
        finally:
            with self._lock:
                if not children.in_use() and self._probes.get(place) is children:
                    del self._probes[place]
                    children.close()

    def _children(self, description: repository.Description) -> ioproc.Children:
        storage = self._config.storage
        return ioproc.Children(self._server, description, storage.io_children, storage.io_deadline_s)

    def _enter(
        self, repo_id: str, ground: str, description: repository.Description, header: Record
    ) -> tuple[Connection, bool]:
        with self._lock:
            known = self._connected.get(repo_id)
            same = next((found for found in self._connected.values() if found.name == header["name"]), None)
            for other in filter(None, (known, same)):
                if (other.name, other.place) != (header["name"], header["place"]):
                    raise errors.RepositoryExists(repo_id=other.repo_ids[0], place=other.place)
            if same is None:
                children, name = self._children(description), header["name"]
                same = Connection(ground, description, header, children, lambda state: self._tell_all(name, state))
            if repo_id not in same.repo_ids:
                same.repo_ids.append(repo_id)
            self._connected[repo_id] = same
            return same, len(same.repo_ids) == 1 and known is None

    def _leave(self, repo_id: str, connection: Connection, users: list[str]) -> None:
        if users:
            raise errors.RepositoryInUse(repo_id=repo_id, users=", ".join(users))
        wait_s = _LEAVE * connection.header["io_timeout_s"] + self._config.storage.io_deadline_s
        with connection.membership.leaving():
            try:
                connection.children.call("leave_lockspace", {}, repo_id, wait_s)
            except errors.LeaseHeld as error:
                raise errors.RepositoryInUse(repo_id=repo_id, users=error.facts["holder"]) from error

    # -- what is connected -------------------------------------------------------------------------------------------

    def get(self, repo_id: str) -> Connection:
        with self._lock:
            try:
                return self._connected[repo_id]
            except KeyError:
                raise errors.NoSuchRepository(repo_id=repo_id) from None

    def infos(self) -> list[Info]:
        """What is connected, in the order of ids, each with what `Watch.info` tells. From memory."""
        with self._lock:
            return [self._info(repo_id, connection) for repo_id, connection in sorted(self._connected.items())]

    def _info(self, repo_id: str, connection: Connection) -> Info:
        return {**connection.info(repo_id), **self._monitor.info(connection.name)}

    def _watch(self, connection: Connection) -> None:
        def repo_id() -> str:
            return next(iter(connection.repo_ids), connection.name)

        def tell(facts: Info) -> None:
            with self._lock:  # nothing of a repository is told after its end
                for known_as in connection.repo_ids:
                    self._events.publish("repository", known_as, {"name": connection.name, **facts})

        def bring_back() -> None:
            if connection.repo_ids:  # else it was taken down because nobody wants it any more
                formats.bring_back(self._helper, connection.description)

        deadline_s, io_timeout_s = self._config.storage.monitor_deadline_s, connection.header["io_timeout_s"]
        children = ioproc.Children(self._server, connection.description, 1, deadline_s, ioproc.MONITORING)
        with self._lock:
            if connection.repo_ids:  # else it was disconnected meanwhile
                self._monitor.begin(connection.name, repo_id, children, io_timeout_s, tell, bring_back)

    def most_registrations(self) -> int:
        """Children that may be registered with sanlock at once: those of each repository, whatever its ids."""
        with self._lock:
            return len(set(self._connected.values())) * self._config.storage.io_children

    def id_of(self, name: str) -> str | None:
        """An id under which the repository of that persistent name is connected."""
        with self._lock:
            return next((repo_id for repo_id, found in self._connected.items() if found.name == name), None)

    def description(self, repo_id: str) -> repository.Description:
        """What makes the repository in another process, with the id under which it is meant here."""
        return {**self.get(repo_id).description, "repo_id": repo_id}

    def read(self, repo_id: str, function: str, argument: dict[str, Any]) -> Any:
        """Asks a child of the repository; works before the lockspace is joined."""
        return self.get(repo_id).children.call(function, argument, repo_id)

    def write(self, repo_id: str, function: str, argument: dict[str, Any]) -> Any:
        """Lets a child change something. Raises `LeaseNotReady` when the lockspace does not join within its wait."""
        connection = self.get(repo_id)
        connection.membership.wait(repo_id, self._config.storage.join_wait_s)
        deadline_s = None if connection.repository.abilities.thin else self._config.storage.volume_deadline_s
        return connection.children.call(function, argument, repo_id, deadline_s)

    def gate(self, repo_ids: list[str]) -> job.Gate:
        """Why a job on these repositories cannot start yet. From memory; a repository that has gone fails the job."""

        def ask() -> job.Wait | None:
            for repo_id in repo_ids:
                membership = self.get(repo_id).membership
                if membership.state != lockspaces.JOINED:
                    return job.Wait(f"repository {repo_id}: {membership.reason}", membership.seconds_left)
            return None

        return ask

    # -- finding images ----------------------------------------------------------------------------------------------

    def find(self, image_id: str, among: list[str] | None = None, hints: dict[str, str] | None = None) -> str:
        """The id of a repository that holds the image: the first whole copy seen, in no order.

        `among` narrows the search to these repositories, a hint for the image to one. Deleted and broken copies do not
        count (trap 38), unless there is nothing but a broken one. Raises `NoSuchImage`; `RepositoryStuck` when it may
        be in a repository that does not answer.
        """
        if hints and image_id in hints:
            wanted = [hints[image_id]]
        else:
            with self._lock:
                wanted = list(self._connected) if among is None else among
        broken: str | None = None
        silent: errors.VdsmError | None = None
        for repo_id, image in self._ask_all(wanted, "find", {"image_id": image_id}):
            if isinstance(image, errors.VdsmError):
                silent = image
            elif image and not image["deleted"]:
                if image["status"] != models.BROKEN:
                    return repo_id
                broken = repo_id
        if broken is not None:
            return broken
        raise silent or errors.NoSuchImage(image_id=image_id, where=", ".join(wanted) or "no connected repository")

    def find_vm(self, vm_id: str, repo_id: str | None) -> str:
        """The id of a repository that holds the VM's record: `repo_id`, or any. Raises `NoSuchVm`; `RepositoryStuck`
        when it may be in a repository that does not answer."""
        with self._lock:
            wanted = list(self._connected) if repo_id is None else [repo_id]
        silent: errors.VdsmError | None = None
        for found_in, vm in self._ask_all(wanted, "vm", {"vm_id": vm_id}):
            if isinstance(vm, errors.VdsmError):
                silent = vm
            elif vm is not None:
                return found_in
        raise silent or errors.NoSuchVm(vm_id=vm_id)

    def _ask_all(
        self, repo_ids: list[str], function: str, argument: dict[str, Any]
    ) -> Iterator[tuple[str, Record | errors.VdsmError | None]]:
        """(repository, the record that it answers or why it does not answer), as the answers come."""
        for repo_id in repo_ids:
            self.get(repo_id)  # a name that is not connected is the caller's mistake
        if len(repo_ids) == 1:
            yield repo_ids[0], self._ask(repo_ids[0], function, argument)
            return
        asked = {self._searches.submit(self._ask, repo_id, function, argument): repo_id for repo_id in repo_ids}
        for answer in concurrent.futures.as_completed(asked):
            yield asked[answer], answer.result()

    def _ask(self, repo_id: str, function: str, argument: dict[str, Any]) -> Record | errors.VdsmError | None:
        try:
            found: Record | None = self.read(repo_id, function, argument)
        except errors.VdsmError as error:
            return error
        return found

    # -- the poller --------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        with self._lock:
            connections = {id(found): found for found in self._connected.values()}
        for connection in connections.values():
            connection.membership.poll()

    def _volumes(self) -> dict[str, ioproc.Children]:
        with self._lock:
            return {one.name: one.children for one in self._connected.values() if not one.repository.abilities.thin}

    def _tell_all(self, name: str, state: str) -> None:
        """Joined or lost: what is on the way there was asked for by a verb, which tells its caller."""
        if state not in (lockspaces.JOINED, lockspaces.LEFT):
            return
        with self._lock:
            found = [
                (repo_id, known)
                for repo_id, known in self._connected.items()
                if known.name == name and repo_id not in self._changing  # being disconnected: it is not lost
            ]
        for repo_id, connection in found:
            self._publish(repo_id, connection)

    def _publish(self, repo_id: str, connection: Connection) -> None:
        membership = connection.membership
        told = {"name": connection.name, "state": membership.state, "reason": membership.reason or None}
        self._events.publish("repository", repo_id, {"change": "state", **told})
