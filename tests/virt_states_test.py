"""The table of moves, and how libvirt's view and a VM's end become states."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from vdsm import errors, ids
from vdsm.virt import spec, states, vm
from vdsm.virt.states import Ending, ExitReason, State

DOMAIN_STATES = ("running", "paused", "shutdown", "shutoff", "crashed", "pmsuspended")
ASKED = Ending(0, ExitReason.ADMIN_SHUTDOWN, "asked")


def a_vm(state: State = State.WAIT_FOR_LAUNCH, **wanted: Any) -> tuple[vm.Vm, list[dict[str, Any]]]:
    published: list[dict[str, Any]] = []
    parsed = spec.VmSpec.parse({"vm_id": ids.new(), **wanted})
    made = vm.Vm(parsed, 1000.0, lambda _, params: published.append(params), states.Condition(state, "test", 1000.0))
    return made, published


def test_every_state_has_its_moves() -> None:
    assert states.MOVES.keys() == set(State)


def test_the_moves_are_documented_as_they_are() -> None:
    text = Path("docs/events-and-state.md").read_text().partition("## The states of a VM")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    found = {
        State(name): {State(word) for word in re.findall(r"`(\w+)`", row[2])}
        for row in rows
        for name in re.findall(r"`(\w+)`", row[0])
    }
    assert found == {state: set(moves) - {State.DOWN, State.UNKNOWN} for state, moves in states.MOVES.items()}


def test_down_is_final() -> None:
    assert states.MOVES[State.DOWN] == frozenset()


@pytest.mark.parametrize("state", [state for state in State if state != State.DOWN])
def test_every_other_state_may_end_or_get_out_of_sight(state: State) -> None:
    assert {State.DOWN, State.UNKNOWN} - {state} <= states.MOVES[state]


@pytest.mark.parametrize(("state", "domain"), [*itertools.product(State, DOMAIN_STATES)])
def test_whatever_libvirt_says_leads_along_the_table(state: State, domain: str) -> None:
    for running in (State.POWERING_UP, State.UP):
        wanted = vm.follow(state, domain, running)
        assert wanted == state or wanted in states.MOVES[state]


FOLLOWED = {
    "a guest that was paused": (State.UP, "paused", State.PAUSED),
    "a guest that runs again": (State.PAUSED, "running", State.UP),
    "a guest that is found again": (State.UNKNOWN, "running", State.UP),
    "a guest found paused": (State.UNKNOWN, "paused", State.PAUSED),
    "a guest that is ending": (State.UP, "shutdown", State.POWERING_DOWN),
    "a guest asked to end that still runs": (State.POWERING_DOWN, "running", State.POWERING_DOWN),
    "a guest stopped by its own suspend": (State.UP, "pmsuspended", State.PAUSED),
    "a guest that libvirt pauses to save it": (State.SAVING_STATE, "paused", State.SAVING_STATE),
    "a launch that is not done": (State.WAIT_FOR_LAUNCH, "paused", State.WAIT_FOR_LAUNCH),
}


@pytest.mark.parametrize(("state", "domain", "wanted"), FOLLOWED.values(), ids=FOLLOWED.keys())
def test_libvirts_view_is_followed(state: State, domain: str, wanted: State) -> None:
    assert vm.follow(state, domain, State.UP) == wanted


ENDINGS = {
    "asked and shut down": ("shutdown", True, ASKED, ASKED),
    "asked and destroyed": ("destroyed", False, ASKED, ASKED),
    "powered off from within": ("shutdown", True, None, (0, ExitReason.USER_SHUTDOWN)),
    "ended by a signal": ("shutdown", False, None, (1, ExitReason.GENERIC_ERROR)),
    "destroyed by somebody else": ("destroyed", False, None, (0, ExitReason.ADMIN_SHUTDOWN)),
    "crashed though asked to end": ("crashed", False, ASKED, (1, ExitReason.GENERIC_ERROR)),
    "QEMU killed": ("failed", False, None, (1, ExitReason.LOST_QEMU)),
    "QEMU killed though asked to end": ("failed", False, ASKED, (1, ExitReason.LOST_QEMU)),
    "migrated": ("migrated", False, None, (0, ExitReason.MIGRATED)),
    "saved": ("saved", False, None, (0, ExitReason.SAVED)),
    "a word of a later libvirt": ("evaporated", False, None, (1, ExitReason.LOST_QEMU)),
}


@pytest.mark.parametrize(("detail", "by_guest", "asked", "wanted"), ENDINGS.values(), ids=ENDINGS.keys())
def test_how_a_vm_ended(detail: str, by_guest: bool, asked: Ending | None, wanted: Any) -> None:
    found = states.ending(detail, by_guest=by_guest, asked=asked)
    assert wanted in (found, (found.code, found.reason))


def test_a_move_is_published_once_with_its_reason() -> None:
    made, published = a_vm()
    assert made.move(State.UP, "started") is True
    assert made.move(State.UP, "again") is False
    assert published == [{"change": "state", "status": "Up", "previous": "WaitForLaunch", "reason": "started"}]


def test_a_forbidden_move_is_told_and_not_taken() -> None:
    made, published = a_vm(State.UP)
    since = made.condition
    assert made.move(State.WAIT_FOR_LAUNCH, "why not") is False
    assert made.condition is since
    (told,) = published
    assert (told["change"], told["status"], told["wanted"]) == ("refused", "Up", "WaitForLaunch")
    assert "why not" in told["reason"]


@pytest.mark.parametrize(("before", "after"), [*itertools.product(State, State)])
def test_a_vm_moves_along_the_table_and_nowhere_else(before: State, after: State) -> None:
    made, published = a_vm(before)
    allowed = after in states.MOVES[before]
    assert made.move(after, "test") is allowed
    assert made.state == (after if allowed else before)
    assert [told["change"] for told in published] == (["state"] if allowed else ["refused"] if after != before else [])


def test_a_guest_agent_that_comes_and_goes_is_told_once_each() -> None:
    made, published = a_vm(State.UP)
    for connected in (True, True, False, False):
        made.agent(connected)
    assert [told["change"] for told in published] == ["agent", "agent"]
    assert [told["reason"] for told in published] == ["the guest agent is there", "the guest agent has gone"]


def test_a_vm_ends_once() -> None:
    made, published = a_vm(State.UP)
    assert made.end(ASKED) is True
    assert made.end(Ending(1, ExitReason.LOST_QEMU, "later")) is False
    assert made.ending == ASKED
    assert [(found["exit_code"], found["exit_reason"]) for found in published] == [(0, 6)]


def test_a_verb_says_which_states_it_needs() -> None:
    made, _ = a_vm(State.UP)
    with pytest.raises(errors.VmWrongState) as refused:
        made.require("cont", {State.PAUSED})
    assert refused.value.facts == {"vm_id": made.id, "status": "Up", "verb": "cont", "needed": "Paused"}


def test_a_guest_without_an_agent_is_up_after_a_while() -> None:
    made, _ = a_vm(State.POWERING_UP)
    made.boots()
    assert made.running_state() == State.POWERING_UP
    made.booted -= vm.AGENT_GRACE_S
    assert made.running_state() == State.UP


def test_a_guest_with_an_agent_is_up_when_it_is_there() -> None:
    made, _ = a_vm(State.POWERING_UP)
    made.boots()
    made.agent_connected = True
    assert made.running_state() == State.UP
