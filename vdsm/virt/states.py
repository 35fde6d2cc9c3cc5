"""What a VM can be, which way it may go from there, and how it can end.

The strings are the wire's. A VM moves only along `MOVES`; each move has a reason and is published.
"""

import contextlib
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Self


class State(enum.StrEnum):
    DOWN = "Down"  # final: how it ended is known
    WAIT_FOR_LAUNCH = "WaitForLaunch"  # its id is reserved, no guest code has run
    POWERING_UP = "PoweringUp"  # runs; its guest agent has not shown up yet
    UP = "Up"
    PAUSED = "Paused"
    POWERING_DOWN = "PoweringDown"  # the guest was asked to end, or is ending
    REBOOT_IN_PROGRESS = "RebootInProgress"
    SAVING_STATE = "SavingState"
    RESTORING_STATE = "RestoringState"
    MIGRATION_SOURCE = "MigrationSource"
    MIGRATION_DESTINATION = "MigrationDestination"
    UNKNOWN = "Unknown"  # libvirt cannot be asked; QEMU most likely runs on


_ANY_TIME = {State.DOWN, State.UNKNOWN}
_RUNNING = {State.POWERING_UP, State.UP}

MOVES: dict[State, frozenset[State]] = {
    state: frozenset((_ANY_TIME | more) - {state})
    for state, more in {
        State.WAIT_FOR_LAUNCH: _RUNNING | {State.PAUSED, State.RESTORING_STATE, State.MIGRATION_DESTINATION},
        State.POWERING_UP: {
            State.UP,
            State.PAUSED,
            State.POWERING_DOWN,
            State.REBOOT_IN_PROGRESS,
            State.SAVING_STATE,
            State.MIGRATION_SOURCE,
        },
        State.UP: {
            State.POWERING_UP,  # reset, or a reboot from within
            State.PAUSED,
            State.POWERING_DOWN,
            State.REBOOT_IN_PROGRESS,
            State.SAVING_STATE,
            State.MIGRATION_SOURCE,
        },
        State.PAUSED: _RUNNING | {State.POWERING_DOWN, State.SAVING_STATE, State.MIGRATION_SOURCE},
        State.POWERING_DOWN: _RUNNING | {State.PAUSED, State.REBOOT_IN_PROGRESS},  # the guest did not obey
        State.REBOOT_IN_PROGRESS: _RUNNING | {State.PAUSED, State.POWERING_DOWN},
        State.SAVING_STATE: _RUNNING | {State.PAUSED},
        State.RESTORING_STATE: _RUNNING | {State.PAUSED},
        State.MIGRATION_SOURCE: _RUNNING | {State.PAUSED},
        State.MIGRATION_DESTINATION: _RUNNING | {State.PAUSED},
        State.UNKNOWN: _RUNNING | {State.PAUSED, State.POWERING_DOWN},
    }.items()
} | {State.DOWN: frozenset()}

# The guest executes code, as far as one knows.
RUNNING = frozenset({State.POWERING_UP, State.UP, State.POWERING_DOWN, State.REBOOT_IN_PROGRESS})


class ExitReason(enum.IntEnum):
    """Upstream VDSM's numbers."""

    SUCCESS = 0
    GENERIC_ERROR = 1
    LOST_QEMU = 2  # QEMU died, or was killed
    START_FAILED = 3
    MIGRATED = 4
    SAVED = 5
    ADMIN_SHUTDOWN = 6  # somebody asked this agent
    USER_SHUTDOWN = 7  # from within the guest
    DESTROYED_ON_STARTUP = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How a VM ended. `code` is 0 when somebody wanted it to end, 1 otherwise."""

    code: int
    reason: ExitReason
    message: str

    def to_record(self) -> dict[str, Any]:
        """As records and events have it: exit_code, exit_reason, exit_message."""
        return {"exit_code": self.code, "exit_reason": int(self.reason), "exit_message": self.message}

    @classmethod
    def from_record(cls, fields: Mapping[str, Any]) -> Self:
        """What `to_record` wrote; a reason that only a later version knows is an error like others."""
        reason = ExitReason.GENERIC_ERROR
        with contextlib.suppress(ValueError):
            reason = ExitReason(fields["exit_reason"])
        return cls(fields["exit_code"], reason, fields["exit_message"])


@dataclasses.dataclass(frozen=True, slots=True)
class Condition:
    """The state a VM is in, why, and since when (seconds since 1970)."""

    state: State
    reason: str
    since: float


def ending(detail: str, *, by_guest: bool, asked: Ending | None) -> Ending:
    """How a VM ended, from libvirt's word for it.

    `detail` is that of `hypervisor.DomainEvent` "stopped"; `by_guest`: the guest itself powered off; `asked` is what
    this agent was asked to do to the VM, if anything.
    """
    if detail in ("shutdown", "destroyed") and asked is not None:
        return asked
    if detail == "shutdown" and by_guest:
        return Ending(0, ExitReason.USER_SHUTDOWN, "the guest powered off")
    if detail == "shutdown":
        # QEMU was told to by a signal. sanlock does that to a VM whose storage is lost.
        return Ending(1, ExitReason.GENERIC_ERROR, "ended by a signal on the host: its leases were lost, or by hand")
    known = {
        "destroyed": Ending(0, ExitReason.ADMIN_SHUTDOWN, "destroyed in libvirt, not by this agent"),
        "migrated": Ending(0, ExitReason.MIGRATED, "migrated to another host"),
        "saved": Ending(0, ExitReason.SAVED, "saved"),
        "crashed": Ending(1, ExitReason.GENERIC_ERROR, "the guest crashed"),
        "failed": Ending(1, ExitReason.LOST_QEMU, "QEMU ended unexpectedly"),
    }
    return known.get(detail, Ending(1, ExitReason.LOST_QEMU, f"its domain is gone ({detail})"))
