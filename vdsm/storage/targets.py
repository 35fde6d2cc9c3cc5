"""iSCSI targets: which there are, who of this host's callers needs which session, login and logout.

A session is one portal of one target; with a session over each network its LUNs have as many paths, which multipathd
makes one disk. Callers name themselves: a session stays until the last of them has logged out. Who needs it is not
remembered over a restart of the agent; sessions are, by the kernel. Nothing logs in by itself when the host boots.

Runs in the agent; methods may be called from any thread, and block for the root helper.
"""

import contextlib
import dataclasses
import ipaddress
import threading
from collections.abc import Iterator
from typing import Any

from supervdsm import calls, contract
from supervdsm import client as helper_client
from vdsm import config, errors, logs, roothelper
from vdsm.storage import devicelist, devices, scans, sysblock

_log = logs.get("storage.targets")

# A login or logout of the same session is waited for this long (seconds): their calls' deadlines.
_TURN_S = 60.0
# What the verbs call the fields of the helper's calls.
_NAMES = {"address": "connection", "target": "iqn", "tag": "tpgt"}


@dataclasses.dataclass(frozen=True)
class Portal:
    """One way to a target. `tag` is the number of its portal group."""

    target: str
    address: str
    port: int
    tag: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Targets:
    def __init__(self, settings: config.Iscsi, found: devices.Devices, helper: helper_client.Helper) -> None:
        self._settings = settings
        self._devices = found
        self._helper = helper
        self._lock = threading.Lock()
        self._turns: dict[Portal, threading.Lock] = {}
        self._users: dict[Portal, set[str]] = {}

    def discover(self, host: str, port: int, user: str | None, password: str | None, *, ipv6: bool) -> list[str]:
        """What the portal offers to this host: lines "address:port,tag target". Nothing is kept of it.

        Raises `TargetsUnknown`, `LoginRefused`.
        """
        with _refusals():
            request = calls.DiscoverTargets(host=host, port=port, user=user, password=password)
        answer = roothelper.call(self._helper, request)
        if answer.outcome == "refused":
            raise errors.LoginRefused(portal=f"{host}:{port}", reason=answer.reason)
        if answer.outcome != "done":
            raise errors.TargetsUnknown(portal=f"{host}:{port}", reason=answer.reason)
        return [line for line in answer.portals if ipv6 or not line.startswith("[")]

    def login(self, user_id: str, portal: Portal, user: str | None, password: str | None) -> dict[str, Any]:
        """A session for `user_id`; one that is there already is shared. Answers as `sessions`, one of it.

        Its LUNs come some moments later, each with an event. Raises `LoginFailed`, `LoginRefused`.
        """
        portal = _checked(portal)
        with _refusals():
            request = calls.LoginTarget(
                **dataclasses.asdict(portal),
                noop_interval_s=self._settings.noop_interval_s,
                noop_timeout_s=self._settings.noop_timeout_s,
                replacement_timeout_s=self._settings.replacement_timeout_s,
                user=user,
                password=password,
            )
        with self._turn(portal):
            answer = roothelper.call(self._helper, request)
            if answer.outcome == "refused":
                raise errors.LoginRefused(portal=str(portal), reason=answer.reason)
            if answer.outcome != "done":
                raise errors.LoginFailed(target=portal.target, portal=str(portal), reason=answer.reason)
            with self._lock:
                self._users.setdefault(portal, set()).add(user_id)
        self._devices.look_again()
        return self._told(portal, self._session(self._devices.scan(), portal))

    def logout(self, user_id: str, portal: Portal) -> list[str]:
        """Nobody's session ends; what others need stays: their names. No session at all is fine.

        Raises `DiskInUse` when the last path to a disk that somebody uses would go, `LogoutFailed`.
        """
        portal = _checked(portal)
        with _refusals():
            request = calls.LogoutTarget(**dataclasses.asdict(portal))
        with self._turn(portal):
            with self._lock:
                others = self._users.get(portal, set()) - {user_id}
                if others:
                    self._users[portal] = others
                    return sorted(others)
            scan = self._devices.scan()
            session = self._session(scan, portal)
            if session is not None:
                self._free_disks(scan, session)
            answer = roothelper.call(self._helper, request)
            if answer.outcome not in ("done", "absent"):
                raise errors.LogoutFailed(target=portal.target, portal=str(portal), reason=answer.reason)
            with self._lock:
                self._users.pop(portal, None)
        self._devices.look_again()
        return []

    def sessions(self) -> list[dict[str, Any]]:
        """Each session of this host, whoever began it: its portal, state, number, and who needs it."""
        found = []
        for session in self._devices.scan().sessions:
            portal = Portal(session.target, session.address, session.port, session.tag)
            found.append(self._told(portal, session))
        return found

    def _told(self, portal: Portal, session: sysblock.Session | None) -> dict[str, Any]:
        with self._lock:
            users = sorted(self._users.get(portal, ()))
        told: dict[str, Any] = {"number": None, "state": "FREE", "gives_up_s": None}
        if session is not None:
            told = {"number": session.number, "state": session.state, "gives_up_s": session.gives_up_s}
        return {**dataclasses.asdict(portal), **told, "users": users}

    def _session(self, scan: scans.Scan, portal: Portal) -> sysblock.Session | None:
        wanted = dataclasses.astuple(portal)
        return next((one for one in scan.sessions if (one.target, one.address, one.port, one.tag) == wanted), None)

    def _free_disks(self, scan: scans.Scan, session: sysblock.Session) -> None:
        """Removes the maps that have no other path which carries I/O. Raises `DiskInUse`; a map that was removed before
        that comes again when multipathd looks at its paths next."""
        going = {disk.name for disk in scan.disks.values() if disk.session == session.number}
        maps = [disk for disk in scan.disks.values() if disk.transport == "multipath"]
        last = [disk for disk in maps if going & set(disk.slaves) and not self._living(scan, disk) - going]
        bare = [scan.disks[name] for name in sorted(going) if not {disk.name for disk in maps} & _holders(scan, name)]
        for disk in [*last, *bare]:
            users = self._devices.users(scan, disk)
            if users:
                raise errors.DiskInUse(device=devicelist.name(disk), users=", ".join(users))
        for disk in last:
            self._remove_map(devicelist.name(disk))

    def _living(self, scan: scans.Scan, disk: sysblock.Disk) -> set[str]:
        return {name for name in disk.slaves if name in scan.disks and scan.disks[name].running}

    def _remove_map(self, wwid: str) -> None:
        try:
            roothelper.call(self._helper, calls.RemoveMap(wwid))
        except errors.HelperFailed as error:
            raise errors.DiskInUse(device=wwid, users=error.facts["reason"]) from error

    @contextlib.contextmanager
    def _turn(self, portal: Portal) -> Iterator[None]:
        with self._lock:
            turn = self._turns.setdefault(portal, threading.Lock())
        if not turn.acquire(timeout=_TURN_S):
            raise errors.DeadlinePassed(what=f"another login or logout at {portal}", seconds=_TURN_S)
        try:
            yield
        finally:
            turn.release()


def _holders(scan: scans.Scan, name: str) -> set[str]:
    return set(scan.disks[name].holders)


def _checked(portal: Portal) -> Portal:
    """With its address as the kernel spells it."""
    try:
        return dataclasses.replace(portal, address=str(ipaddress.ip_address(portal.address)))
    except ValueError as error:
        reason = "must be an IP address, as discoverSendTargets tells it"
        raise errors.InvalidParameters(parameter="connection", reason=reason) from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A call that breaks the helper's contract is the caller's mistake."""
    try:
        yield
    except contract.Refused as error:
        name, _, reason = error.reason.partition(" ")
        raise errors.InvalidParameters(parameter=_NAMES.get(name, name), reason=reason) from error
