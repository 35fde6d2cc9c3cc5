"""libvirt, as the agent needs it. Nobody else imports libvirt.

A connection for events is kept by a thread of its own: when libvirtd goes away, calls fail with
`HypervisorUnavailable` until it is back, and the VMs run on. Calls have connections of their own, one call at a time on
each (decision 10). Keepalive messages end calls to a libvirtd that hangs, and a deadline those on a QEMU that hangs.
libvirt's event loop runs in one thread for the whole process.

Calls may come from any thread; they block while libvirt works. Beside `HypervisorUnavailable` they raise `NoSuchVm`
when there is no such domain, `DeadlinePassed` when libvirt waits too long for its QEMU, and `HypervisorFailed` with
libvirt's words for everything else. Domains are named by their UUID; all of them are transient.
"""

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import libvirt
import libvirt_qemu

from vdsm import errors, lines, logs, periodic

_log = logs.get("hypervisor")
_T = TypeVar("_T")

# Two lost keepalive messages end the connection: no call hangs much longer than this product.
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
# How often a lost connection is tried again, and a quiet one looked at.
CONNECT_INTERVAL_S = 1.0
# Connections for calls that are kept when nobody uses them. Opening one costs some milliseconds.
MAX_IDLE = 8
# How long libvirtd may take to accept a connection: it answers in milliseconds unless it hangs.
CONNECT_TIMEOUT_S = 15.0
# How long a call may wait for QEMU. libvirt itself refuses a call after 30 s that waits for another one on the same
# QEMU, and says which; the first one it lets wait for ever. Ending a QEMU that hangs takes it 15 to 40 s.
CALL_TIMEOUT_S = 40.0
DESTROY_TIMEOUT_S = 60.0
# Calls left behind before others are refused: each keeps one of libvirtd's workers (20 unless configured). Ending a VM
# is never refused; libvirtd has workers for that alone.
MAX_LEFT = 8
# Domains asked for in one call: libvirt's answer is unpacked with Python's lock held.
CHUNK = 250

# Groups of statistics. Those in MONITOR_GROUPS cost a round trip to QEMU's monitor for each domain.
CHEAP_GROUPS = libvirt.VIR_DOMAIN_STATS_STATE | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_INTERFACE
MONITOR_GROUPS = libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_VCPU | libvirt.VIR_DOMAIN_STATS_BLOCK
ALL_GROUPS = CHEAP_GROUPS | MONITOR_GROUPS


class DomainState(NamedTuple):
    """`state`: running, paused, shutdown (the guest is ending), shutoff, crashed, pmsuspended. `reason`: libvirt's."""

    state: str
    reason: str


class DomainEvent(NamedTuple):
    """What happened to a domain.

    kind        detail
    started     booted, migrated, restored, ...
    suspended   paused, ioerror, ...
    resumed     unpaused, ...
    shutdown    guest, host: who asked QEMU to end
    stopped     shutdown, destroyed, crashed, migrated, saved, failed: the domain is gone
    crashed     the guest panicked
    rebooted
    io_error    the reason (enospc, eio, ...); `disk` is the device's alias, "" when libvirt does not know it
    agent       connected, disconnected
    threshold   the device's name, as "vda": a write has passed its threshold, which is gone now, and ends at `offset`
    """

    vm_id: str
    kind: str
    detail: str
    disk: str = ""
    offset: int = 0


def _constants(prefix: str) -> dict[int, str]:
    """{number: what libvirt calls it in lower case, without the prefix}."""
    return {value: name[len(prefix) :].lower() for name, value in vars(libvirt).items() if name.startswith(prefix)}


_KINDS = ("started", "suspended", "resumed", "stopped", "shutdown", "pmsuspended", "crashed")
# {number of a lifecycle event: (its kind, {number: detail})}
_LIFECYCLE = {
    getattr(libvirt, f"VIR_DOMAIN_EVENT_{kind.upper()}"): (kind, _constants(f"VIR_DOMAIN_EVENT_{kind.upper()}_"))
    for kind in _KINDS
}
_CLOSED = _constants("VIR_CONNECT_CLOSE_REASON_")
_AGENT = _constants("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_")
_DISK_ERRORS = _constants("VIR_DOMAIN_DISK_ERROR_")
_STATES = {
    getattr(libvirt, f"VIR_DOMAIN_{state.upper()}"): state
    for state in ("running", "paused", "shutdown", "shutoff", "crashed", "pmsuspended")
} | {libvirt.VIR_DOMAIN_BLOCKED: "running"}
# {state: {number: reason}}
_REASONS = {state: _constants(f"VIR_DOMAIN_{state.upper()}_") for state in ("running", "paused", "shutoff", "crashed")}


class _EventLoop:
    """libvirt's event loop. One for the process; its thread runs while some connection needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._timer: int | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        with self._lock:
            if self._timer is None:
                libvirt.virEventRegisterDefaultImpl()
                libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; no copy on standard error
                self._timer = libvirt.virEventAddTimeout(
                    -1, lambda timer, _: libvirt.virEventUpdateTimeout(timer, -1), None
                )
            self._users += 1
            if self._users == 1:
                self._thread = threading.Thread(target=self._run, name="libvirt events", daemon=True)
                self._thread.start()

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            libvirt.virEventUpdateTimeout(self._timer, 0)  # wakes the loop, which then sees that nobody needs it
            assert self._thread is not None
            self._thread.join()

    def _run(self) -> None:
        while self._users:
            libvirt.virEventRunDefaultImpl()


_loop = _EventLoop()


class Hypervisor:
    """The connection to one libvirt. `start` and `stop` are called once each."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._conn: Any = None  # for events
        self._lines = lines.Lines(
            "libvirt call",
            self._dial,
            lambda conn: self._conn is not None and _alive(conn),
            _hang_up,
            connect_s=CONNECT_TIMEOUT_S,
            idle=MAX_IDLE,
            left=MAX_LEFT,
        )
        self._stopping = False
        self._trouble = "not connected yet"
        self._tried = threading.Event()
        self._keeper = periodic.Periodic("libvirt connection", CONNECT_INTERVAL_S, self._keep)

    def start(self, on_domain: Callable[[DomainEvent], None], on_connection: Callable[[bool, str], None]) -> None:
        """Connects in the background, again whenever the connection is lost.

        `on_domain` gets each domain's events in order, in libvirt's event thread; `on_connection` gets True once
        connected and False with the reason when the connection is lost, in any thread. Neither may block.
        """
        self._on_domain = on_domain
        self._on_connection = on_connection
        _loop.acquire()
        self._keeper.start()

    def stop(self) -> None:
        """Closes the connection. Domains run on."""
        self._stopping = True
        self._keeper.stop(KEEPALIVE_INTERVAL_S)
        self._close()
        _loop.release()

    @property
    def connected(self) -> bool:
        return self._conn is not None

    def wait_tried(self, timeout_s: float) -> bool:
        """Waits until a connection was tried for the first time; whether there is one."""
        self._tried.wait(timeout_s)
        return self.connected

    # -- the connection -----------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        conn = self._conn
        if conn is not None and conn.isAlive():
            return
        self._lost(conn, "the connection is closed")
        try:
            self._open()
        except libvirt.libvirtError as error:
            if self._trouble != str(error):
                _log.warning("cannot connect to %s: %s", self._uri, error)
            self._trouble = str(error)
        else:
            _log.info("connected to %s", self._uri)
            self._on_connection(True, "connected")
        finally:
            self._tried.set()

    def _open(self) -> None:
        conn = self._connect()
        _if_supported(lambda: conn.registerCloseCallback(self._closed, None))
        listen = conn.domainEventRegisterAny
        listen(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
        _if_supported(lambda: listen(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._rebooted, None))
        _if_supported(lambda: listen(None, libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, self._io_error, None))
        _if_supported(lambda: listen(None, libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._agent, None))
        _if_supported(lambda: listen(None, libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, self._threshold, None))
        with self._lock:
            self._conn = conn

    def _connect(self) -> Any:
        conn = libvirt.open(self._uri)
        _if_supported(lambda: conn.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT))
        return conn

    def _closed(self, conn: Any, reason: int, _: Any) -> None:
        self._lost(conn, f"the connection was closed ({_CLOSED.get(reason, reason)})")

    def _lost(self, conn: Any, reason: str) -> None:
        """Forgets `conn` if it is the present one; the keeper connects again."""
        with self._lock:
            if conn is None or conn is not self._conn:
                return
            self._conn = None
            self._trouble = reason
        self._lines.hang_up()
        _log.warning("libvirt is lost: %s", reason)
        self._keeper.poke()
        if not self._stopping:
            self._on_connection(False, reason)

    def _close(self) -> None:
        with self._lock:
            conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(libvirt.libvirtError):
                conn.unregisterCloseCallback()
            _hang_up(conn)
        self._lines.hang_up(KEEPALIVE_INTERVAL_S)

    def _dial(self) -> Any:
        """A connection for calls, in the thread that has it."""
        try:
            return self._connect()
        except libvirt.libvirtError as error:
            raise errors.HypervisorUnavailable(reason=str(error)) from error

    # -- events, in libvirt's event thread ----------------------------------------------------------------------------

    def _lifecycle(self, _: Any, domain: Any, event: int, detail: int, __: Any) -> None:
        if event in _LIFECYCLE:
            kind, details = _LIFECYCLE[event]
            self._on_domain(DomainEvent(domain.UUIDString(), kind, details.get(detail, f"detail {detail}")))

    def _rebooted(self, _: Any, domain: Any, __: Any) -> None:
        self._on_domain(DomainEvent(domain.UUIDString(), "rebooted", ""))

    def _io_error(self, _: Any, domain: Any, __: str, alias: str, ____: int, reason: str, _____: Any) -> None:
        self._on_domain(DomainEvent(domain.UUIDString(), "io_error", reason or "other", alias or ""))

    def _agent(self, _: Any, domain: Any, state: int, __: int, ___: Any) -> None:
        self._on_domain(DomainEvent(domain.UUIDString(), "agent", _AGENT.get(state, "disconnected")))

    def _threshold(self, _: Any, domain: Any, name: str, __: str | None, passed: int, excess: int, ___: Any) -> None:
        self._on_domain(DomainEvent(domain.UUIDString(), "threshold", name, offset=passed + excess))

    # -- calls --------------------------------------------------------------------------------------------------------

    def create_paused(self, xml: str, vm_id: str, *, fresh_nvram: bool = False) -> None:
        """Starts a domain with its guest stopped. `fresh_nvram`: UEFI variables from the template, not from before.

        Has no deadline: libvirt has its own for a QEMU that starts, and a domain must not come to be after all.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED | (libvirt.VIR_DOMAIN_START_RESET_NVRAM if fresh_nvram else 0)
        self._ask("create", vm_id, lambda conn: conn.createXML(xml, flags), timeout_s=None)

    def capabilities(self) -> str:
        """libvirt's capabilities document: what the host and its emulators can do."""
        return self._ask("getCapabilities", "", lambda conn: str(conn.getCapabilities()))

    def domains(self) -> dict[str, DomainState]:
        """All active domains of this host, also those of others: one call for all."""
        found = self._ask(
            "getAllDomainStats",
            "",
            lambda conn: conn.getAllDomainStats(
                libvirt.VIR_DOMAIN_STATS_STATE, libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
            ),
        )
        return {
            domain.UUIDString(): _state(fields["state.state"], fields["state.reason"])
            for domain, fields in found
            if "state.state" in fields
        }

    def state(self, vm_id: str) -> DomainState:
        return self._of("getState", vm_id, lambda domain: _state(*domain.state()))

    def name(self, vm_id: str) -> str:
        return self._of("getName", vm_id, lambda domain: str(domain.name()))

    def xml(self, vm_id: str) -> str:
        """The live XML, without secrets."""
        return self._of("getXMLDesc", vm_id, lambda domain: str(domain.XMLDesc(0)))

    def metadata(self, vm_id: str, namespace: str) -> str | None:
        """The element of that XML namespace in the domain's metadata, as XML; None when there is none."""

        def read(domain: Any) -> str | None:
            try:
                return str(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, namespace))
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    return None
                raise

        return self._of("getMetadata", vm_id, read)

    def set_metadata(self, vm_id: str, prefix: str, namespace: str, xml: str) -> None:
        """Replaces the element of that namespace for as long as the domain lives."""
        kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._of("setMetadata", vm_id, lambda domain: domain.setMetadata(kind, xml, prefix, namespace, live))

    def resume(self, vm_id: str) -> None:
        self._of("resume", vm_id, lambda domain: domain.resume())

    def suspend(self, vm_id: str) -> None:
        """Stops the guest's CPUs."""
        self._of("suspend", vm_id, lambda domain: domain.suspend())

    def destroy(self, vm_id: str) -> None:
        """Ends QEMU (SIGTERM, after 15 s SIGKILL) and returns when it is gone."""
        self._of("destroy", vm_id, lambda domain: domain.destroy(), DESTROY_TIMEOUT_S, urgent=True)

    def written_bytes(self, vm_id: str, disk: str) -> int:
        """The end of the last part of the disk's file or volume that its QEMU has written."""
        return self._of("blockInfo", vm_id, lambda domain: int(domain.blockInfo(disk)[1]))

    def set_threshold(self, vm_id: str, disk: str, offset: int) -> None:
        """Has an event "threshold" told, once, when a write passes `offset` of the disk's file or volume."""
        self._of("setBlockThreshold", vm_id, lambda domain: domain.setBlockThreshold(disk, offset))

    def disk_errors(self, vm_id: str) -> dict[str, str]:
        """{name: "no_space", or "unspec" for all others} of the disks whose errors have stopped the guest."""
        found = self._of("getDiskErrors", vm_id, lambda domain: dict(domain.diskErrors()))
        return {name: _DISK_ERRORS.get(number, "unspec") for name, number in found.items()}

    def reset(self, vm_id: str) -> None:
        self._of("reset", vm_id, lambda domain: domain.reset(0))

    def shutdown(self, vm_id: str, *, by_agent: bool) -> None:
        """Asks the guest to power off: its agent (`GuestAgentSilent` after 5 s of silence), or the power button."""
        flag = libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT if by_agent else libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
        self._of("shutdown", vm_id, lambda domain: domain.shutdownFlags(flag))

    def reboot(self, vm_id: str, *, by_agent: bool) -> None:
        """Asks the guest to reboot; otherwise as `shutdown`."""
        flag = libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT if by_agent else libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN
        self._of("reboot", vm_id, lambda domain: domain.reboot(flag))

    def agent_command(self, vm_id: str, command: dict[str, Any], timeout_s: int) -> Any:
        """What the guest agent returned. Raises `GuestAgentSilent`."""
        text = json.dumps(command)
        answer = self._of(
            "agent",
            vm_id,
            lambda domain: libvirt_qemu.qemuAgentCommand(domain, text, timeout_s, 0),
            timeout_s + CALL_TIMEOUT_S,
        )
        return json.loads(answer)["return"]

    # -- statistics ---------------------------------------------------------------------------------------------------

    def stats(self, groups: int, part: int = 0, parts: int = 1) -> dict[str, dict[str, Any]]:
        """libvirt's flat fields of each active domain by UUID, of one in `parts` of all. Domains that go are left out.

        A domain whose QEMU is busy answers without the groups that need its monitor. One whose QEMU hangs blocks this
        call as long as it hangs, and only the first one.
        """

        def read(conn: Any) -> dict[str, dict[str, Any]]:
            domains = sorted(conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE), key=lambda one: one.UUID())
            chosen, found = domains[part::parts], {}
            for at in range(0, len(chosen), CHUNK):
                for domain, fields in _domain_stats(conn, chosen[at : at + CHUNK], groups):
                    found[domain.UUIDString()] = fields
            return found

        return self._ask("domainListGetStats", "", read, timeout_s=None)

    # -- how calls are made -------------------------------------------------------------------------------------------

    def _of(
        self,
        call: str,
        vm_id: str,
        action: Callable[[Any], _T],
        timeout_s: float | None = CALL_TIMEOUT_S,
        *,
        urgent: bool = False,
    ) -> _T:
        return self._ask(
            call, vm_id, lambda conn: action(conn.lookupByUUIDString(vm_id)), timeout_s=timeout_s, urgent=urgent
        )

    def _ask(
        self,
        call: str,
        vm_id: str,
        action: Callable[[Any], _T],
        timeout_s: float | None = CALL_TIMEOUT_S,
        *,
        urgent: bool = False,
    ) -> _T:
        if self._conn is None:
            raise errors.HypervisorUnavailable(reason=self._trouble)

        def named(conn: Any) -> _T:
            try:
                return action(conn)
            except libvirt.libvirtError as error:
                raise self._named(conn, call, vm_id, error) from error

        return self._lines.call(f"libvirt's {call} {vm_id}".rstrip(), named, timeout_s, urgent=urgent)

    def _named(self, conn: Any, call: str, vm_id: str, error: libvirt.libvirtError) -> errors.VdsmError:
        code = error.get_error_code()
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return errors.NoSuchVm(vm_id=vm_id)
        if code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED):
            return errors.GuestAgentSilent(vm_id=vm_id)
        if not _alive(conn):
            return errors.HypervisorUnavailable(reason=str(error))
        return errors.HypervisorFailed(call=call, reason=error.get_error_message())


def _alive(conn: Any) -> bool:
    try:
        return bool(conn.isAlive())
    except libvirt.libvirtError:
        return False


def _hang_up(conn: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        conn.close()


def _domain_stats(conn: Any, domains: list[Any], groups: int) -> list[tuple[Any, dict[str, Any]]]:
    try:
        return list(conn.domainListGetStats(domains, groups, libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT))
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
            raise
        return list(conn.domainListGetStats(domains, groups, 0))  # the test driver knows no flags


def _if_supported(call: Callable[[], object]) -> None:
    """Not every driver has everything; libvirt's test driver has no keepalive."""
    try:
        call()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise


def state_in(fields: dict[str, Any]) -> DomainState | None:
    """The state that is among libvirt's fields of `Hypervisor.stats`."""
    return _state(fields["state.state"], fields["state.reason"]) if "state.state" in fields else None


def _state(state: int, reason: int) -> DomainState:
    known = _STATES.get(state, "running")
    return DomainState(known, _REASONS.get(known, {}).get(reason, f"reason {reason}"))
