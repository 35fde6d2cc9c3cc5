"""Events over real connections: order, gaps, coming back, slow subscribers."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.until import until
from tests.wire_fixture import Peer, Served
from vdsm import events
from vdsm.api import caller as callers
from vdsm.api import notify, verb

Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            served = Served(tmp_path, uvloop.new_event_loop, **settings)
            served.start()
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(params=["unix", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peer(served: Served, transport: str) -> contextlib.AbstractContextManager[Peer]:
    return served.unix() if transport == "unix" else served.websocket()


def subscribe(one: Peer, **params: Any) -> dict[str, Any]:
    result: dict[str, Any] = one.call("Host.subscribe", params)["result"]
    return result


def event(one: Peer) -> dict[str, Any]:
    message = one.message()
    assert (message["jsonrpc"], message["method"], message.keys()) == ("2.0", "event", {"jsonrpc", "method", "params"})
    params: dict[str, Any] = message["params"]
    assert params.keys() == {"instanceId", "sequence", "topic", "subject", "time", "data"}
    return params


def test_events_arrive_in_order_behind_the_answer(serve: Serve, transport: str) -> None:
    served = serve()
    served.events.publish("job", "before", {})
    with peer(served, transport) as one:
        answer = subscribe(one)
        assert answer == {"instanceId": served.events.instance_id, "sequence": 1, "gap": False}
        for number in range(100):
            served.events.publish("job", f"job {number}", {"number": number})
        for number in range(100):
            got = event(one)
            assert got["instanceId"] == served.events.instance_id
            assert (got["sequence"], got["topic"], got["subject"]) == (number + 2, "job", f"job {number}")
            assert got["data"] == {"number": number} and got["time"] > 1.6e9


def test_events_of_many_threads_arrive_once_each(serve: Serve, transport: str) -> None:
    served = serve()

    def publish() -> None:
        for _ in range(100):
            served.events.publish("image", "x", {})

    with peer(served, transport) as one:
        subscribe(one)
        threads = [threading.Thread(target=publish) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert [event(one)["sequence"] for _ in range(500)] == list(range(1, 501))
        for thread in threads:
            thread.join()


def test_topics(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        subscribe(one, topics=["vm", "repository"])
        for topic in ("job", "vm", "image", "repository", "job", "vm"):
            served.events.publish(topic, topic, {})
        assert [event(one)["sequence"] for _ in range(3)] == [2, 4, 6]


def test_an_unknown_topic_is_refused(serve: Serve) -> None:
    with serve().unix() as one:
        facts = one.call("Host.subscribe", {"topics": ["vm", "nosuch"]})["error"]["data"]["facts"]
        assert facts["parameter"] == "topics.1"


def test_a_subscriber_that_comes_back_misses_nothing(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        subscribe(one)
        served.events.publish("job", "a", {})
        seen = event(one)["sequence"]
    served.events.publish("job", "b", {})
    served.events.publish("job", "c", {})
    with peer(served, transport) as one:
        answer = subscribe(one, instanceId=served.events.instance_id, since=seen)
        assert (answer["sequence"], answer["gap"]) == (seen, False)
        assert [event(one)["subject"] for _ in range(2)] == ["b", "c"]


def test_a_number_of_another_life_is_a_gap_and_what_there_is(serve: Serve, transport: str) -> None:
    served = serve()
    served.events.publish("job", "a", {})
    with peer(served, transport) as one:
        answer = subscribe(one, instanceId="another life", since=1)
        assert (answer["sequence"], answer["gap"]) == (0, True)
        assert event(one)["subject"] == "a"


def test_a_number_that_is_long_forgotten_is_a_gap(serve: Serve, transport: str) -> None:
    served = serve(event_history=10)
    for number in range(50):
        served.events.publish("job", str(number), {})
    with peer(served, transport) as one:
        answer = subscribe(one, instanceId=served.events.instance_id, since=3)
        assert (answer["sequence"], answer["gap"]) == (40, True)
        assert [event(one)["sequence"] for _ in range(10)] == list(range(41, 51))


def test_a_number_of_the_future_is_a_gap(serve: Serve) -> None:
    served = serve()
    with served.unix() as one:
        assert subscribe(one, instanceId=served.events.instance_id, since=7)["gap"] is True
        served.events.publish("job", "a", {})
        assert event(one)["sequence"] == 1


def test_a_second_subscription_replaces_the_first(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        subscribe(one, topics=["job"])
        subscribe(one, topics=["vm"])
        for topic in ("job", "vm", "vm"):
            served.events.publish(topic, "x", {})
        assert [event(one)["topic"] for _ in range(2)] == ["vm", "vm"]


def test_unsubscribe(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        assert one.call("Host.unsubscribe")["result"] is False
        subscribe(one)
        assert one.call("Host.unsubscribe")["result"] is True
        served.events.publish("job", "a", {})
        one.send(b'{"jsonrpc":"2.0","method":"Spec.get_data","id":"next"}')
        assert one.message()["id"] == "next"


def test_events_do_not_come_over_post(serve: Serve) -> None:
    with serve().http() as one:
        error = one.call("Host.subscribe", {})["error"]
        assert error["data"]["key"] == "no_events_here"


def test_an_event_is_shaped_once_for_all_subscribers(serve: Serve) -> None:
    served = serve()
    with served.unix() as one, served.unix() as two, served.websocket() as three:
        for each in (one, two, three):
            subscribe(each)
        served.events.publish("vm", "a", {"status": "Up"})
        for each in (one, two, three):
            assert event(each)["data"] == {"shaped": {"status": "Up"}}
        assert served.shaped == [{"status": "Up"}]


def test_an_event_that_cannot_be_sent_is_told_as_lost(serve: Serve) -> None:
    served = serve()
    with served.unix() as one:
        subscribe(one)
        served.events.publish("job", "a", {"not JSON": object()})
        served.events.publish("job", "b", {})
        lost, after = event(one), event(one)
        assert (lost["topic"], lost["sequence"], lost["data"]) == ("gap", 1, {"first": 1, "last": 1})
        assert (after["subject"], after["sequence"]) == ("b", 2)


def test_a_slow_subscriber_gets_a_gap_and_holds_up_nobody(serve: Serve, transport: str) -> None:
    served = serve(event_history=1000)
    text = {"text": "x" * 1000}
    with peer(served, transport) as slow, peer(served, transport) as quick:
        subscribe(slow)
        subscribe(quick)
        total = 0
        while total < 20_000:  # 20 MB: more than the kernel takes for a peer that does not read
            for _ in range(100):
                served.events.publish("job", "a", text)
            total += 100
            assert [event(quick)["sequence"] for _ in range(100)] == list(range(total - 99, total + 1))
        expected, gaps = 1, 0
        while expected <= total:
            got = event(slow)
            if got["topic"] == "gap":
                assert got["data"] == {"first": expected, "last": got["sequence"]}
                gaps += 1
            else:
                assert got["sequence"] == expected
            expected = got["sequence"] + 1
        assert gaps >= 1


def test_a_gone_subscriber_is_forgotten(serve: Serve, transport: str) -> None:
    served = serve()
    with peer(served, transport) as one:
        subscribe(one)
        assert served.api.notifier.subscribers == 1
    until(lambda: served.api.notifier.subscribers == 0)


def test_publishing_goes_on_when_the_loop_is_gone() -> None:
    log = events.EventLog()

    class Silent:
        async def send(self, frame: bytes) -> None: ...

    async def main() -> None:
        notifier = notify.Notifier(log, {})
        notifier.start()
        notifier.subscribe(notify.SubscribeParams(), callers.Caller("test", "unix", callers.Role.MONITOR, Silent()))
        notifier.stop()
        notifier.start()  # and never stopped: the agent died

    asyncio.run(main())
    assert log.publish("job", "a", {}) == 1
    assert log.publish("job", "b", {}) == 2


def test_subscribe_takes_strings_as_clients_send_them(serve: Serve) -> None:
    served = serve()
    served.events.publish("job", "a", {})
    with served.unix() as one:
        assert subscribe(one, since="0")["sequence"] == 0
        assert event(one)["sequence"] == 1


def test_topics_of_the_wire_are_those_of_the_log() -> None:
    schema = notify.SubscribeParams.model_json_schema()["properties"]["topics"]["anyOf"][0]
    assert set(schema["items"]["enum"]) == events.TOPICS
    assert issubclass(notify.SubscribeParams, verb.Params)
