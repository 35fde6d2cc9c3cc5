"""The undo stack: order, failures inside it, and that success forgets."""

import logging

import pytest

from vdsm import undo


@pytest.mark.parametrize("failing", range(4))
def test_failure_at_each_step_undoes_the_steps_before_it_in_reverse(failing: int) -> None:
    undone: list[int] = []
    with pytest.raises(RuntimeError, match=f"step {failing}"), undo.Stack() as steps:
        for number in range(4):
            if number == failing:
                raise RuntimeError(f"step {number}")
            steps.push(f"undo {number}", lambda number=number: undone.append(number))
    assert undone == list(reversed(range(failing)))


def test_success_undoes_nothing() -> None:
    undone: list[str] = []
    with undo.Stack() as steps:
        steps.push("first", lambda: undone.append("first"))
    steps.unwind()
    assert undone == []


def test_a_failing_undo_is_logged_and_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    undone: list[str] = []
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="the first failure"), undo.Stack() as steps:
        steps.push("first", lambda: undone.append("first"))
        steps.push("second", lambda: 1 // 0)
        raise ValueError("the first failure")
    assert undone == ["first"]
    assert "cannot undo: second" in caplog.text
