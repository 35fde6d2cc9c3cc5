"""The event log: order, memory, gaps, and subscribers that come back."""

import threading

import pytest

from vdsm import events


def test_events_are_numbered_in_order() -> None:
    log = events.EventLog()
    assert [log.publish("job", f"j{number}", {}) for number in range(3)] == [1, 2, 3]
    assert log.sequence == 3


def test_unknown_topics_are_refused() -> None:
    with pytest.raises(ValueError, match="weather"):
        events.EventLog().publish("weather", "x", {})


@pytest.mark.parametrize(
    ("asked", "numbers", "gap"),
    [(0, [3, 4, 5], True), (1, [3, 4, 5], True), (2, [3, 4, 5], False), (4, [5], False), (5, [], False)],
    ids=["from the start", "one lost", "all kept", "one new", "nothing new"],
)
def test_since_tells_what_is_kept_and_what_was_lost(asked: int, numbers: list[int], gap: bool) -> None:
    log = events.EventLog(capacity=3)
    for number in range(5):
        log.publish("vm", f"v{number}", {"n": number})
    found, lost = log.since(log.instance_id, asked)
    assert ([event.sequence for event in found], lost) == (numbers, gap)


@pytest.mark.parametrize("stranger", ["another life", None], ids=["restarted", "number from the future"])
def test_since_of_another_life_is_a_gap(stranger: str | None) -> None:
    log = events.EventLog()
    log.publish("image", "i", {})
    found, gap = log.since(stranger or log.instance_id, 0 if stranger else 7)
    assert ([event.sequence for event in found], gap) == ([1], True)


def test_an_empty_log_has_no_gap() -> None:
    log = events.EventLog()
    assert log.since(log.instance_id, 0) == ([], False)


def test_subscribers_get_each_event_in_the_order_of_its_number() -> None:
    log, seen = events.EventLog(), []
    unsubscribe = log.subscribe(lambda event: seen.append(event.sequence))
    threads = [threading.Thread(target=lambda: [log.publish("job", "j", {}) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unsubscribe()
    log.publish("job", "after", {})
    assert seen == list(range(1, 801))


def test_subscribe_then_since_loses_and_doubles_nothing() -> None:
    """The recipe of `since`, against a publisher that does not stop meanwhile."""
    log, live = events.EventLog(), []
    publisher = threading.Thread(target=lambda: [log.publish("job", "j", {}) for _ in range(500)])
    publisher.start()
    log.subscribe(lambda event: live.append(event.sequence))
    held, gap = log.since(log.instance_id, 0)
    publisher.join()
    last = held[-1].sequence if held else 0
    assert not gap
    assert [event.sequence for event in held] + [number for number in live if number > last] == list(range(1, 501))
