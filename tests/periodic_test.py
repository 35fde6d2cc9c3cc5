"""The periodic thread: it ticks, survives a failing tick, and stops at once."""

import logging
import threading

import pytest

from tests.until import until
from vdsm import periodic


def test_ticks_at_once_and_again() -> None:
    ticks: list[str] = []
    ticker = periodic.Periodic("example", 0.01, lambda: ticks.append(threading.current_thread().name))
    ticker.start()
    until(lambda: len(ticks) >= 3)
    assert ticker.stop(30)
    assert set(ticks) == {"example"}


def test_poke_brings_the_next_tick_forward() -> None:
    ticks: list[int] = []
    ticker = periodic.Periodic("example", 3600, lambda: ticks.append(1))
    ticker.start()
    until(lambda: len(ticks) == 1)
    ticker.poke()
    until(lambda: len(ticks) == 2)
    assert ticker.stop(30)


def test_an_interval_may_be_asked_for_after_each_tick() -> None:
    """The first one is short, and the next one too long to be waited for."""
    ticks: list[int] = []
    ticker = periodic.Periodic("example", lambda: 0.01 if len(ticks) < 3 else 3600, lambda: ticks.append(1))
    ticker.start()
    until(lambda: len(ticks) == 3)
    assert ticker.stop(30)
    assert len(ticks) == 3


def test_stop_does_not_wait_for_the_interval() -> None:
    ticker = periodic.Periodic("example", 3600, lambda: None)
    ticker.start()
    assert ticker.stop(30)


def test_stop_before_start() -> None:
    assert periodic.Periodic("example", 1, lambda: None).stop(1)


def test_a_failing_tick_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    ticks: list[int] = []

    def fail() -> None:
        ticks.append(1)
        raise RuntimeError("no luck")

    with caplog.at_level(logging.ERROR):
        ticker = periodic.Periodic("example", 0.01, fail)
        ticker.start()
        until(lambda: len(ticks) >= 2)
        assert ticker.stop(30)
    assert "example failed" in caplog.text
    assert "no luck" in caplog.text
