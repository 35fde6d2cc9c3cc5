"""What happened on this host, in order, with enough memory that a subscriber can come back.

Each event has a sequence number, counted from 1 within an instance. An instance is one life of the agent: after a
restart the id is another, so that a number of the life before is never mistaken for one of this.
"""

import collections
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vdsm import ids

TOPICS = frozenset({"job", "vm", "image", "repository", "host", "hook", "device"})


@dataclass(frozen=True, slots=True)
class Event:
    """`subject` is the id of the thing `topic` speaks of; `time` is in seconds since 1970."""

    sequence: int
    topic: str
    subject: str
    params: dict[str, Any]
    time: float = field(default_factory=time.time)


Callback = Callable[[Event], None]


class EventLog:
    """The last `capacity` events. All methods may be called from any thread."""

    def __init__(self, capacity: int = 10_000) -> None:
        self.instance_id = ids.new()
        self._lock = threading.Lock()
        self._kept: collections.deque[Event] = collections.deque(maxlen=capacity)
        self._sequence = 0
        self._callbacks: dict[object, Callback] = {}

    @property
    def sequence(self) -> int:
        """The number of the latest event, 0 when there was none."""
        return self._sequence

    def publish(self, topic: str, subject: str, params: dict[str, Any]) -> int:
        """Adds an event and hands it to all subscribers; returns its number. `params` must not be changed later."""
        if topic not in TOPICS:
            raise ValueError(f"unknown topic {topic}")
        with self._lock:
            self._sequence += 1
            event = Event(self._sequence, topic, subject, params)
            self._kept.append(event)
            for callback in self._callbacks.values():
                callback(event)
        return event.sequence

    def since(self, instance_id: str, sequence: int) -> tuple[list[Event], bool]:
        """The kept events after `sequence`, and whether some were lost to the asker (a gap).

        Another instance's number means a restart: all kept events come, with a gap. To subscribe without losing or
        doubling one: subscribe first, then ask, then drop from the callbacks what this answer already had.
        """
        with self._lock:
            events = list(self._kept)
            if instance_id != self.instance_id or sequence > self._sequence:
                return events, True
            oldest = self._sequence - len(events) + 1
            return events[max(0, sequence + 1 - oldest) :], sequence + 1 < oldest

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Calls `callback` with each event from now on, in order, in the publisher's thread; returns the unsubscriber.

        The callback runs under this log's lock: it hands the event over (`loop.call_soon_threadsafe`, a queue) and
        neither blocks, raises nor calls back into whoever publishes.
        """
        key = object()
        with self._lock:
            self._callbacks[key] = callback

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return unsubscribe
