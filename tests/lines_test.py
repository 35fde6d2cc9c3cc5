"""Calls on connections of their own: deadlines, what is left behind, and that a refused call is never done."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.until import until
from vdsm import errors, lines

NAME = "test line"


class Exchange:
    """Makes connections; `calls` are those that were done."""

    def __init__(self) -> None:
        self.open: set[object] = set()
        self.made = 0
        self.usable = True
        self.accepts = threading.Event()
        self.accepts.set()
        self.answers = threading.Event()
        self.lines = lines.Lines(
            NAME, self._connect, lambda connection: self.usable, self.open.discard, connect_s=1.0, idle=2, left=2
        )

    def _connect(self) -> object:
        self.accepts.wait()
        self.made += 1
        connection = object()
        self.open.add(connection)
        return connection

    def call(self, action: Callable[[Any], Any] = bool, timeout_s: float | None = 30.0, **how: Any) -> Any:
        return self.lines.call("a call", action, timeout_s, **how)

    def hang(self, **how: Any) -> None:
        with pytest.raises(errors.DeadlinePassed, match="a call"):
            self.call(lambda connection: self.answers.wait(), 0.05, **how)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    made = Exchange()
    yield made
    made.accepts.set()
    made.answers.set()
    made.lines.hang_up(5)
    until(lambda: not threads() and not made.open)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_a_line_is_used_again(exchange: Exchange) -> None:
    assert len({exchange.call(id) for _ in range(5)}) == 1
    assert (exchange.made, len(threads())) == (1, 1)


def test_calls_at_once_have_a_line_each_and_few_are_kept(exchange: Exchange) -> None:
    together = threading.Barrier(5)
    callers = [threading.Thread(target=exchange.call, args=(lambda _: together.wait(30),)) for _ in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert exchange.made == 5
    until(lambda: len(threads()) == len(exchange.open) == 2)


def test_what_a_call_raises_its_caller_gets_and_the_line_lives(exchange: Exchange) -> None:
    with pytest.raises(KeyError):
        exchange.call(lambda connection: {}["x"])
    exchange.call()
    assert exchange.made == 1


def test_a_line_that_is_not_usable_any_more_is_hung_up(exchange: Exchange) -> None:
    exchange.usable = False
    exchange.call()
    until(lambda: not exchange.open)


def test_a_call_that_hangs_is_left_behind_and_ends_by_itself(exchange: Exchange) -> None:
    exchange.hang()
    exchange.call()
    assert len(threads()) == 2
    exchange.answers.set()
    until(lambda: len(threads()) == len(exchange.open) == 1)


def test_while_too_many_hang_only_urgent_calls_are_made(exchange: Exchange) -> None:
    exchange.hang()
    exchange.hang()
    with pytest.raises(errors.HypervisorUnavailable, match="2 calls to it hang"):
        exchange.call()
    assert exchange.call(urgent=True) is True
    exchange.answers.set()
    until(lambda: len(threads()) == 1)
    assert exchange.call() is True


def test_a_call_that_got_no_connection_in_time_is_never_made(exchange: Exchange) -> None:
    """Its caller was told that nothing has changed: a VM must not be destroyed minutes later."""
    done: list[object] = []
    exchange.accepts.clear()
    with pytest.raises(errors.HypervisorUnavailable, match="no connection"):
        exchange.call(done.append, None)
    exchange.accepts.set()
    until(lambda: not threads() and not exchange.open)
    assert exchange.made == 1 and done == []
    exchange.call(done.append)
    assert len(done) == 1


def test_a_connection_that_fails_fails_the_call(exchange: Exchange) -> None:
    def refuse() -> object:
        raise errors.HypervisorUnavailable(reason="test")

    exchange.lines._connect = refuse
    with pytest.raises(errors.HypervisorUnavailable, match="test"):
        exchange.call()
    until(lambda: not threads())
