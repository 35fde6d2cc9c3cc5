"""One VM of this host: what it shall be, how it is, and why.

What is held here is a cache of libvirt's truth. Readers need no lock, since every attribute is replaced as a whole;
whoever changes the state holds `lock`.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

import orjson

from vdsm import errors, hypervisor, leases, logs
from vdsm.virt import domxml, qemu, spec, states
from vdsm.virt.states import State

_log = logs.get("virt.vm")

# A guest whose agent does not show up within this is taken to be up: it has none.
AGENT_GRACE_S = 60.0

# What a VM's record tells of its spec.
_RECORDED = ("vm_id", "name", "disks", "lease_repo_id")

Publish = Callable[[str, dict[str, Any]], object]
"""Takes a VM's id and what happened to it: an event's params, see `docs/events-and-state.md`."""


class Vm:
    def __init__(self, wanted: spec.VmSpec, created: float, publish: Publish, condition: states.Condition) -> None:
        self.id = wanted.vm_id
        self.spec = wanted
        self.created = created
        self.condition = condition
        self.lock = threading.RLock()
        self._publish = publish

        # What its QEMU must hold, and the persistent name of the repository with its own lease and record.
        self.leases: tuple[leases.Lease, ...] = ()
        self.lease_repo: str | None = None
        # Its disks as records name them: [{"repo": persistent name, "image_id"}].
        self.disks: tuple[dict[str, str], ...] = ()
        # Its record speaks of this run; changes that it still lacks.
        self.recorded = False
        self.record_due: dict[str, Any] = {}
        self.record_lock = threading.Lock()

        # A launch owns the VM until it is done: events and comparisons leave it alone.
        self.launch_done = threading.Event()
        self.given_up = threading.Event()  # the launch shall stop at its next step
        self.stays_paused = False  # the launch leaves the guest stopped
        # Its domain as it was last seen, or as it was planned, for hook scripts; "" before scripts were asked.
        self.xml = ""

        # Names of its disks whose volumes have to grow while they are written.
        self.growing: tuple[str, ...] = ()

        self.pid: int | None = None
        self.booted = created
        self.agent_connected = False
        self.vnc_port: int | None = None
        self.pause_code: str | None = None
        self.guest_ended = False

        # Why it will move next, while a verb is at it: an event may be quicker to see the move than the verb.
        self.because = ""
        # What this agent was asked to do to it, should it end now; how it ended, and the error of a failed start.
        self.asked: states.Ending | None = None
        self.ending: states.Ending | None = None
        self.error: errors.VdsmError | None = None
        self.ended = threading.Event()  # set once it is Down
        # Set when the guest ended or began to boot again: whoever asked it to waits for this.
        self.turned = threading.Event()
        self.shutdown: object | None = None

        # Known by its record alone: the spec has no more than its name and its disks.
        self.from_record = False

        self._sampled: dict[str, Any] = {}
        self.stats = b""
        self._encode()

    @classmethod
    def ended_before(
        cls,
        wanted: spec.VmSpec,
        created: float,
        publish: Publish,
        ending: states.Ending,
        lease_repo: str,
        disks: tuple[dict[str, str], ...],
    ) -> Self:
        """A VM that is Down, as its record tells; `wanted` has no more than its id, name, disks and lease_repo_id."""
        ended = cls(wanted, created, publish, states.Condition(State.DOWN, ending.message, time.time()))
        ended.lease_repo, ended.disks, ended.ending = lease_repo, disks, ending
        ended.recorded = ended.from_record = True
        for event in (ended.launch_done, ended.ended, ended.turned):
            event.set()
        ended._encode()
        return ended

    @property
    def state(self) -> State:
        return self.condition.state

    @property
    def launching(self) -> bool:
        return not self.launch_done.is_set()

    # -- moving -------------------------------------------------------------------------------------------------------

    def move(self, state: State, reason: str) -> bool:
        """Goes to `state`, and publishes it; False when it is there already.

        A move that the table does not allow is a mistake of ours: it is logged and published as "refused", and the VM
        stays as it is until the next comparison with libvirt.
        """
        with self.lock:
            before = self.condition.state
            if state == before:
                return False
            if state not in states.MOVES[before]:
                _log.error("VM %s cannot go from %s to %s (%s)", self.id, before, state, reason)
                self.tell("refused", f"it cannot go from {before} to {state}: {reason}", wanted=state)
                return False
            self.condition = states.Condition(state, reason, time.time())
            self._encode()
            _log.info("VM %s: %s, was %s: %s", self.id, state, before, reason)
            self.tell("state", reason, before)
            return True

    def restate(self, state: State, reason: str) -> None:
        """Why it is in `state`, now that more is known; nothing happens when it is in another."""
        with self.lock:
            if self.state == state:
                self.condition = states.Condition(state, reason, self.condition.since)

    def tell(self, change: str, reason: str, previous: State | None = None, **more: Any) -> None:
        """Publishes what happened to it: `change` is one of those in `docs/events-and-state.md`."""
        told = {"change": change, "status": self.state, "previous": previous, "reason": reason}
        self._publish(self.id, {**told, **more, **self._exit()})

    def end(self, ending: states.Ending, error: errors.VdsmError | None = None) -> bool:
        """Goes Down; False when it is Down already, which is final."""
        with self.lock:
            if self.state == State.DOWN:
                return False
            self.ending, self.error, self.pid = ending, error, None
            self.move(State.DOWN, ending.message)
        self.ended.set()
        self.turned.set()
        return True

    def require(self, verb: str, allowed: frozenset[State] | set[State]) -> None:
        """Raises `VmWrongState` unless the VM is in one of the states; `HypervisorUnavailable` when nobody knows."""
        if self.state == State.UNKNOWN:
            raise errors.HypervisorUnavailable(state=State.UNKNOWN, reason=self.condition.reason)
        if self.state not in allowed:
            needed = " or ".join(state for state in State if state in allowed)
            raise errors.VmWrongState(
                state=self.condition.reason, vm_id=self.id, status=self.state, verb=verb, needed=needed
            )

    def apply(self, domain: hypervisor.DomainState, reason: str = "") -> None:
        """Follows libvirt's view. The caller holds `lock`, asked libvirt under it, and the domain is there."""
        wanted = follow(self.state, domain.state, self.running_state())
        self.move(wanted, reason or self.because or f"libvirt says {domain.state} ({domain.reason})")

    def running_state(self) -> State:
        """Up, or PoweringUp while the guest agent may still show up."""
        waits = self.spec.agent_channel and not self.agent_connected and time.time() - self.booted < AGENT_GRACE_S
        return State.POWERING_UP if waits else State.UP

    def boots(self) -> None:
        """The guest starts from its firmware now."""
        self.booted = time.time()
        self.agent_connected = False
        self.turned.set()

    def agent(self, connected: bool) -> None:
        """Its guest agent has come, or gone."""
        with self.lock:
            if connected != self.agent_connected:
                self.agent_connected = connected
                self.tell("agent", "the guest agent is there" if connected else "the guest agent has gone")

    def learn(self, live: domxml.Live) -> None:
        """Takes over what only the running domain tells."""
        self.agent_connected = live.agent_connected
        self.vnc_port = live.vnc_port
        self.xml = live.xml
        self.growing = tuple(name for name in live.growing if name in domxml.targets(self.spec))  # not a script's own
        self._encode()

    # -- leases -------------------------------------------------------------------------------------------------------

    def find_pid(self) -> int | None:
        """The pid of its QEMU, None when there is none."""
        if self.pid is None or not qemu.runs(self.pid, self.id):
            self.pid = qemu.find(self.id)
        return self.pid

    def missing_leases(self) -> list[str]:
        """Names of the leases that its QEMU should hold and does not. Raises `LeaseDaemonDown`."""
        if not self.leases:
            return []
        pid = self.find_pid()
        held = set() if pid is None else leases.held_by(pid)
        return [lease.name for lease in self.leases if (lease.lockspace, lease.name, lease.shared) not in held]

    def check_leases(self) -> None:
        """Must pass before any resume. Raises `VmLeaseMismatch`, `LeaseDaemonDown`."""
        missing = self.missing_leases()
        if missing:
            raise errors.VmLeaseMismatch(state=self.state, vm_id=self.id, missing=", ".join(missing))

    # -- telling ------------------------------------------------------------------------------------------------------

    def metadata(self, *, launched: bool) -> domxml.Metadata:
        return domxml.Metadata(
            self.spec, self.lease_repo, self.disks, self.leases, self.created, launched, self.stays_paused
        )

    def info(self) -> dict[str, Any]:
        """All that is known of it: plain data, snake_case; times in seconds since 1970."""
        condition = self.condition
        return {
            "vm_id": self.id,
            "name": self.spec.name,
            "status": condition.state,
            "reason": condition.reason,
            "status_since": condition.since,
            "created": self.created,
            "foreign": False,
            "pid": self.pid,
            "vnc_port": self.vnc_port,
            "agent_connected": self.agent_connected,
            "pause_code": self.pause_code,
            "spec": self._spec(),
            "from_record": self.from_record,
            **self._exit(),
            "error": self.error.to_wire() if self.error is not None else None,
        }

    def _spec(self) -> dict[str, Any]:
        known = self.spec.to_dict()
        return {name: known[name] for name in _RECORDED} if self.from_record else known

    def _exit(self) -> dict[str, Any]:
        return self.ending.to_record() if self.ending is not None else {}

    def sampled(self, fields: dict[str, Any]) -> None:
        """Takes over what the sampler found, in the wire's words."""
        self._sampled = fields
        self._encode()

    def _encode(self) -> None:
        """The VM's statistics document, ready for the wire: encoded once, joined into every bulk answer."""
        condition, ending = self.condition, self.ending
        document = {
            "vmId": self.id,
            "vmName": self.spec.name,
            "status": condition.state,
            "statusTime": condition.since,
            "elapsedTime": None if self.from_record else int(max(0.0, time.time() - self.created)),
            "vcpuCount": None if self.from_record else self.spec.vcpus,
            "pauseCode": self.pause_code,
            "displayInfo": self._display(),
        }
        if ending is not None:
            document |= {"exitCode": ending.code, "exitReason": int(ending.reason), "exitMessage": ending.message}
        else:
            document |= self._sampled
        self.stats = orjson.dumps(document)

    def _display(self) -> list[dict[str, Any]]:
        if self.spec.vnc is None or self.vnc_port is None:
            return []
        return [{"type": "vnc", "ipAddress": self.spec.vnc.listen, "port": self.vnc_port}]


def follow(state: State, domain: str, running: State) -> State:
    """The state of a VM whose domain is as libvirt says; `running` is what a running guest is now."""
    if domain == "running":
        turns = state in (State.POWERING_UP, State.PAUSED, State.UNKNOWN, State.WAIT_FOR_LAUNCH)
        return running if turns or state in (State.RESTORING_STATE, State.MIGRATION_DESTINATION) else state
    wanted = {"paused": State.PAUSED, "pmsuspended": State.PAUSED, "shutdown": State.POWERING_DOWN}.get(domain, state)
    # States in which libvirt pauses a guest for its own ends go their own way, and so does a launch.
    saved_or_moved = (State.SAVING_STATE, State.MIGRATION_SOURCE, State.RESTORING_STATE, State.MIGRATION_DESTINATION)
    busy = state == State.WAIT_FOR_LAUNCH or state in saved_or_moved
    return state if busy or wanted not in states.MOVES[state] else wanted
