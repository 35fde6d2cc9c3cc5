"""Events to subscribers: the one bridge from the threads that publish to the connections on the event loop.

`EventLog` calls back in the publisher's thread; all that happens there is to wake the loop. Each subscription has a
task that reads from the log what its connection has not had, and waits while the peer reads too slowly. So a slow
subscriber costs no memory: the log is its queue, and when the log has forgotten what it still needs, it gets a gap
marker and goes on with the oldest event there is. An event is encoded once, however many subscribe.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import orjson
import pydantic

from vdsm import errors, events, logs
from vdsm.api import caller as callers
from vdsm.api import dispatch, verb

logger = logs.get("api.notify")

# Encoded events kept for subscribers that are a little behind each other.
_ENCODED = 1024
# Events sent to one subscriber before others get their turn on the loop.
_CHUNK = 256

Topic = Literal["job", "vm", "image", "repository", "host", "hook", "device"]
_GAP = "gap"

# From an event's params to what is sent: anything `dispatch.encode` takes.
Shape = Callable[[dict[str, Any]], Any]


class SubscribeParams(verb.Params):
    topics: list[Topic] | None = pydantic.Field(None, description="only these; all when absent")
    instance_id: str | None = pydantic.Field(None, description="the instance that `since` counts in")
    since: int | None = pydantic.Field(None, ge=0, description="the last event already seen; from now on when absent")


class Subscribed(verb.Result):
    instance_id: str = pydantic.Field(description="this life of the agent: sequence numbers count within it")
    sequence: int = pydantic.Field(description="events with greater numbers follow")
    gap: bool = pydantic.Field(description="events after `since` are lost: read the state anew")


class _Frame(NamedTuple):
    """An encoded notification."""

    sequence: int
    topic: str
    text: bytes


class _Subscription:
    def __init__(self, topics: frozenset[str], sent: int) -> None:
        self.topics = topics
        self.sent = sent  # number of the last event its connection had
        self.news = asyncio.Event()
        self.task: asyncio.Task[None]


class Notifier:
    """The subscriptions of all connections, and the verbs that make them. Belongs to the event loop.

    A subscriber that asks alone (not in a batch) gets its answer before its first event.
    """

    def __init__(self, log: events.EventLog, shapes: Mapping[str, Shape]) -> None:
        """`shapes` gives, for a topic, what an event's params look like on the wire; others go as they are."""
        self._log = log
        self._shapes = shapes
        self._subscriptions: dict[callers.Caller, _Subscription] = {}
        self._encoded: dict[int, _Frame] = {}
        self._awake = False
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begins to hear the log, on the running loop."""
        loop = asyncio.get_running_loop()

        def wake(_: events.Event) -> None:
            # In the publisher's thread. One call is under way at most, however many events it will find.
            if not self._awake:
                self._awake = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    loop.call_soon_threadsafe(self._wake)

        self._unsubscribe = self._log.subscribe(wake)

    def stop(self) -> None:
        """Ends all subscriptions."""
        self._unsubscribe()
        for caller in list(self._subscriptions):
            self.forget(caller)

    @property
    def subscribers(self) -> int:
        """How many connections are subscribed."""
        return len(self._subscriptions)

    def forget(self, caller: callers.Caller) -> bool:
        """Ends the subscription of a caller, if it has one: whether it had."""
        subscription = self._subscriptions.pop(caller, None)
        if subscription is not None:
            subscription.task.cancel()
        return subscription is not None

    @verb.verb(role="monitor", blocking=False, errors=(errors.NoEventsHere,))
    def subscribe(self, params: SubscribeParams, caller: callers.Caller) -> Subscribed:
        """Sends events over this connection from now on, or from after `since`.

        They arrive as notifications named "event" with instanceId, sequence, topic, subject, time (seconds since 1970)
        and data. Lost events are told by one of topic "gap". A second call replaces the subscription.
        """
        if caller.connection is None:
            raise errors.NoEventsHere(transport=caller.transport)
        sent, gap = self._start_of(params)
        self.forget(caller)
        subscription = _Subscription(frozenset(params.topics or events.TOPICS), sent)
        subscription.task = asyncio.get_running_loop().create_task(self._serve(subscription, caller.connection))
        self._subscriptions[caller] = subscription
        return Subscribed(instance_id=self._log.instance_id, sequence=sent, gap=gap)

    @verb.verb(role="monitor", blocking=False)
    def unsubscribe(self, caller: callers.Caller) -> bool:
        """Ends the connection's subscription; false when it had none."""
        return self.forget(caller)

    def _start_of(self, params: SubscribeParams) -> tuple[int, bool]:
        """The number after which the events begin, and whether some before it are lost to the subscriber."""
        if params.since is None:
            return self._log.sequence, False
        found, gap = self._log.since(params.instance_id or self._log.instance_id, params.since)
        if not gap:
            return params.since, False
        return (found[0].sequence - 1 if found else self._log.sequence), True

    def _wake(self) -> None:
        self._awake = False
        for subscription in self._subscriptions.values():
            subscription.news.set()

    async def _serve(self, subscription: _Subscription, connection: callers.Connection) -> None:
        with contextlib.suppress(ConnectionError):  # the transport notices too, and forgets the caller
            while True:
                subscription.news.clear()
                while subscription.sent < self._log.sequence:
                    for frame in self._after(subscription.sent):
                        if frame.topic in subscription.topics or frame.topic == _GAP:
                            await connection.send(frame.text)
                        subscription.sent = frame.sequence
                    await asyncio.sleep(0)
                await subscription.news.wait()

    def _after(self, sent: int) -> list["_Frame"]:
        """The next frames for a subscriber that had number `sent`, at most _CHUNK: a gap marker alone, or events."""
        if sent + 1 not in self._encoded:
            found, gap = self._log.since(self._log.instance_id, sent)
            if gap:
                return [self._gap(sent + 1, found[0].sequence - 1)]
            for event in found[:_CHUNK]:
                self._keep(event)
        numbers = itertools.takewhile(self._encoded.__contains__, range(sent + 1, sent + 1 + _CHUNK))
        return [self._encoded[number] for number in numbers]

    def _keep(self, event: events.Event) -> None:
        if event.sequence in self._encoded:
            return
        shape = self._shapes.get(event.topic)
        try:
            data = orjson.Fragment(dispatch.encode(shape(event.params) if shape else event.params))
            frame = self._frame(event.sequence, event.topic, event.subject, event.time, data)
        except Exception:  # the publisher's or the shape's mistake must not end every subscription
            logger.exception("event %d of topic %s cannot be sent", event.sequence, event.topic)
            frame = self._gap(event.sequence, event.sequence)
        self._encoded[event.sequence] = frame
        if len(self._encoded) > _ENCODED:
            del self._encoded[next(iter(self._encoded))]

    def _gap(self, first: int, last: int) -> "_Frame":
        return self._frame(last, _GAP, "", time.time(), {"first": first, "last": last})

    def _frame(self, sequence: int, topic: str, subject: str, at: float, data: Any) -> "_Frame":
        params = {
            "instanceId": self._log.instance_id,
            "sequence": sequence,
            "topic": topic,
            "subject": subject,
            "time": at,
            "data": data,
        }
        return _Frame(sequence, topic, dispatch.encode({"jsonrpc": "2.0", "method": "event", "params": params}) + b"\n")
