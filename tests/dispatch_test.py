"""From bytes to bytes: the corpus on both paths, errors that leak nothing, pools, batches, roles, the log of calls."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import jsonrpc_corpus as corpus
from tests.sample_verbs import SECRET, World
from tests.until import until
from tests.wire_fixture import request
from vdsm import errors
from vdsm.api import caller as callers
from vdsm.api import dispatch, envelope, frames, pools, verb

ADMIN = callers.Caller("test-1", "unix", callers.Role.ADMIN)
SHORT = [case for case in corpus.CASES if case.short]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for many examples: to make one takes longer than a hundred calls."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def dispatcher() -> dispatch.Dispatcher:
    """One for many examples, as `runner`."""
    return dispatch.Dispatcher(World().verbs, 100)


async def answer_of(dispatcher: dispatch.Dispatcher, text: bytes, caller: callers.Caller = ADMIN) -> dispatch.Answer:
    """The answer by whatever path it takes."""
    answer = dispatcher.answer(text, caller)
    return answer if answer is None or isinstance(answer, bytes) else await answer


async def odd_answer_of(dispatcher: dispatch.Dispatcher, text: bytes) -> dispatch.Answer:
    """The answer by the long path."""
    return await dispatcher.odd(envelope.parse(text), ADMIN)


def ask(world: World, text: bytes, caller: callers.Caller = ADMIN) -> bytes | None:
    async def main() -> bytes | None:
        return await answer_of(dispatch.Dispatcher(world.verbs, 100), text, caller)

    return asyncio.run(main())


def ask_oddly(world: World, text: bytes) -> bytes | None:
    async def main() -> bytes | None:
        return await odd_answer_of(dispatch.Dispatcher(world.verbs, 100), text)

    return asyncio.run(main())


def call(world: World, method: str, params: Any = None, caller: callers.Caller = ADMIN) -> Any:
    answer = ask(world, request(method, params), caller)
    assert answer is not None
    return json.loads(answer)


# -- the corpus


@pytest.mark.parametrize("case", corpus.CASES, ids=lambda case: case.name)
def test_corpus(world: World, case: corpus.Case) -> None:
    corpus.check(case.expected, ask(world, case.text))


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_well_formed_calls_by_name_take_the_short_path(
    world: World, case: corpus.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The long path is the one that uses the library.
    monkeypatch.setattr(dispatch.async_main, "dispatch_to_serializable", None)
    corpus.check(case.expected, ask(world, case.text))


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_both_paths_agree(world: World, case: corpus.Case) -> None:
    short, long = ask(world, case.text), ask_oddly(world, case.text)
    assert short is not None and long is not None
    assert json.loads(short) == json.loads(long)


SCALARS = st.none() | st.booleans() | st.integers(-(1 << 66), 1 << 66) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
METHODS = st.sampled_from(["Spec.subtract", "Spec.minus", "Sample.echo", "Sample.typed", "Sample.fail", "No.no"])
NAMES = st.sampled_from(["minuend", "subtrahend", "value", "vmID", "count", "name", "x"])
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | SCALARS,
        "method": METHODS | SCALARS,
        "params": st.dictionaries(NAMES, VALUES, max_size=3) | VALUES,
        "id": SCALARS,
        "more": st.none(),
    },
)


@settings(deadline=None, max_examples=300)
@given(REQUESTS | st.lists(REQUESTS, max_size=3) | VALUES)
def test_any_json_gets_the_same_sound_answer_on_both_paths(
    runner: asyncio.Runner, dispatcher: dispatch.Dispatcher, value: Any
) -> None:
    text = json.dumps(value).encode()
    answer = runner.run(answer_of(dispatcher, text))
    _check_sound(answer)
    try:
        parsed = envelope.parse(text)
    except errors.ParseError:
        assert answer is not None and json.loads(answer)["error"]["code"] == -32700
        return
    if isinstance(parsed, dict) and envelope.plain(parsed) is not None:
        assert envelope.check(parsed) is None
        long = runner.run(odd_answer_of(dispatcher, text))
        assert answer is not None and long is not None
        assert json.loads(answer) == json.loads(long)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_get_a_sound_answer(runner: asyncio.Runner, dispatcher: dispatch.Dispatcher, text: bytes) -> None:
    _check_sound(runner.run(answer_of(dispatcher, text)))


def _check_sound(answer: bytes | None) -> None:
    if answer is None:
        return
    assert answer.endswith(b"\n") and answer.count(b"\n") == 1
    parsed = json.loads(answer, parse_constant=pytest.fail)
    for one in parsed if isinstance(parsed, list) else [parsed]:
        assert one["jsonrpc"] == "2.0" and "id" in one and ("result" in one) != ("error" in one)


# -- errors


FAILURES = ["unknown", "model", "facts", "object", "surrogate", "integer", "keys"]
FAILING = [(name, how) for name in ("Sample.fail", "Sample.failInPool", "Sample.failWaiting") for how in FAILURES]


@pytest.mark.parametrize(("verb_name", "how"), [*FAILING, ("Sample.failInPool", "exit")])
@pytest.mark.parametrize("positional", [False, True], ids=["short", "long"])
def test_what_has_no_name_is_logged_and_not_sent(
    world: World, verb_name: str, how: str, positional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    text = request(verb_name, [how] if positional else {"name": how}, "the-id")
    answer = ask(world, text)
    assert answer is not None and b"secret" not in answer and b"minuend" not in answer
    error = json.loads(answer)["error"]
    assert (error["code"], error["data"]["key"]) == (-32603, "internal_error")
    assert error["data"]["facts"] == {"reason": "logged under test-1 id 'the-id'"}
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1 and "test-1 id 'the-id'" in logged[0].getMessage()


def test_a_pool_outlives_work_that_wants_to_exit(world: World) -> None:
    call(world, "Sample.failInPool", {"name": "exit"})
    assert call(world, "Sample.blocking", {"name": "a"})["result"] == "general"


def test_facts_and_state_of_a_named_error(world: World) -> None:
    error = call(world, "Sample.fail", {"name": "named"})["error"]
    assert error["message"] == "VM a is Down; pause needs Up"
    assert error["data"]["facts"] == {"vmId": "a", "status": "Down", "verb": "pause", "needed": "Up"}
    assert error["data"]["state"] == "it is down"


@pytest.mark.parametrize(
    ("params", "parameter", "reason"),
    [
        ({"vmID": "x", "disks": [{"imageId": "a"}, {}]}, "disks.1.imageId", "required"),
        ({"count": 1}, "vmID", "required"),
        ({"vmID": "x", "nosuch": 1}, "nosuch", "unknown parameter"),
        ({"vmID": "x", "y" * 5000: 1}, "y" * 200, "unknown parameter"),
    ],
    ids=["inside", "missing", "unknown", "very-long"],
)
def test_bad_parameters_are_named_as_on_the_wire(
    world: World, params: dict[str, Any], parameter: str, reason: str
) -> None:
    facts = call(world, "Sample.typed", params)["error"]["data"]["facts"]
    assert facts == {"parameter": parameter, "reason": reason}


def test_a_failure_of_the_library_leaks_nothing(world: World) -> None:
    class Broken(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            raise RuntimeError(SECRET)

    async def main() -> bytes | None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        # Nothing that comes over the wire makes it fail, so its table of methods is made to.
        dispatcher._methods = Broken()  # type: ignore[assignment]  # has what is called of a dict
        return await answer_of(dispatcher, request("Spec.subtract", [3, 1], 7))

    answer = asyncio.run(main())
    assert answer is not None and b"secret" not in answer
    corpus.check(corpus.Failure(-32603, "internal_error", 7), answer)


# -- roles


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        (callers.Role.MONITOR, {"Spec.get_data"}),
        (callers.Role.OPERATOR, {"Spec.get_data", "Sample.blocking"}),
        (callers.Role.ADMIN, {"Spec.get_data", "Sample.blocking", "Sample.rule"}),
    ],
    ids=lambda value: value.name if isinstance(value, callers.Role) else "",
)
@pytest.mark.parametrize("positional", [False, True], ids=["short", "long"])
def test_each_verb_needs_its_role(world: World, role: callers.Role, allowed: set[str], positional: bool) -> None:
    caller = callers.Caller("test-1", "unix", role)
    params: dict[str, Any] = {"Spec.get_data": {}, "Sample.blocking": {"name": "a"}, "Sample.rule": {}}
    for method, named in params.items():
        answer = call(world, method, list(named.values()) if positional else named, caller)
        assert ("result" in answer) == (method in allowed)
        if method not in allowed:
            facts = answer["error"]["data"]["facts"]
            assert answer["error"]["code"] == errors.Forbidden.code
            assert (facts["verb"], facts["has"]) == (method, role.name.lower())
    assert world.sample.called == (["a"] if "Sample.blocking" in allowed else [])


# -- batches and notifications


def test_a_batch_runs_in_order(world: World) -> None:
    names = [f"call {number}" for number in range(20)]
    batch = b"[" + b",".join(request("Sample.blocking", {"name": name}) for name in names) + b"]"
    ask(world, batch)
    assert world.sample.called == names


def test_notifications_run(world: World) -> None:
    assert ask(world, b'{"jsonrpc":"2.0","method":"Sample.blocking","params":{"name":"alone"}}') is None
    assert ask(world, b'[{"jsonrpc":"2.0","method":"Sample.blocking","params":["in a batch"]}]') is None
    assert world.sample.called == ["alone", "in a batch"]


def test_a_batch_over_the_limit_runs_nothing(world: World) -> None:
    one = request("Sample.blocking", {"name": "a"})
    answer = ask(world, b"[" + b",".join([one] * 101) + b"]")
    corpus.check(corpus.invalid_request(), answer)
    assert world.sample.called == []


# -- pools


def test_nothing_queues_behind_a_stuck_repository(world: World) -> None:
    async def main() -> None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        stuck = [dispatcher.answer(request("Sample.stuck", {"repoId": "one"}), ADMIN) for _ in range(5)]
        waits = [asyncio.ensure_future(each) for each in stuck]  # type: ignore[arg-type]  # none of them was answered at once
        await asyncio.to_thread(world.sample.started.acquire)
        await asyncio.to_thread(world.sample.started.acquire)
        # Its two threads are stuck. Inline verbs, the general pool and other repositories go on.
        corpus.check(corpus.Result(1, 1), await answer_of(dispatcher, request("Sample.echo", {"value": 1})))
        assert b"general" in (await answer_of(dispatcher, request("Sample.blocking", {"name": "a"})) or b"")
        other = asyncio.ensure_future(answer_of(dispatcher, request("Sample.stuck", {"repoId": "two"})))
        await asyncio.to_thread(world.sample.started.acquire)
        world.sample.gate.set()
        assert b"repo two" in (await other or b"")
        assert all(b"repo one" in answer for answer in await asyncio.gather(*waits))

    asyncio.run(main())


def test_a_full_pool_refuses(world: World) -> None:
    async def main() -> None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        text = request("Sample.stuck", {"repoId": "one"})
        taken = [dispatcher.answer(text, ADMIN) for _ in range(2 + pools.REPOSITORY_QUEUE)]
        assert not any(isinstance(answer, bytes) for answer in taken)
        corpus.check(corpus.Failure(1100, "resource_exhausted", 1), await answer_of(dispatcher, text))
        world.sample.gate.set()
        for answer in taken:
            assert b"result" in await answer  # type: ignore[operator, misc]  # not bytes: seen above

    asyncio.run(main())


def test_a_pool_keeps_its_bounds() -> None:
    pool = pools.BoundedPool("test", threads=2, queue=3)
    gate, threads = threading.Event(), []

    def work() -> None:
        threads.append(threading.current_thread())
        gate.wait(10)

    for _ in range(5):
        pool.submit(work)
    until(lambda: len(threads) == 2)
    with pytest.raises(errors.Overloaded):
        pool.submit(work)
    gate.set()
    until(lambda: len(threads) == 5)
    assert len(set(threads)) <= 2
    pool.close()
    until(lambda: pool.unused)


def test_a_pool_begins_work_in_order() -> None:
    pool = pools.BoundedPool("test", threads=1, queue=100)
    begun: list[int] = []
    for number in range(100):
        pool.submit(lambda number=number: begun.append(number))
    until(lambda: len(begun) == 100)
    assert begun == list(range(100))
    pool.close()


def test_a_pool_outlives_what_its_work_raises(caplog: pytest.LogCaptureFixture) -> None:
    pool = pools.BoundedPool("test", threads=1, queue=2)
    done = threading.Event()

    def leave() -> None:
        raise SystemExit(1)

    pool.submit(leave)
    pool.submit(done.set)
    assert done.wait(10)
    pool.close()
    assert "work in pool test" in caplog.text


def test_idle_threads_end_and_come_back() -> None:
    pool = pools.BoundedPool("test", threads=1, queue=1, idle_s=0.01)
    for _ in range(3):
        done = threading.Event()
        pool.submit(done.set)
        assert done.wait(10)
        until(lambda: pool.unused)


def test_a_dropped_repository_gets_fresh_threads() -> None:
    all_pools = pools.Pools(repository_threads=1)
    gate, begun, done = threading.Event(), threading.Event(), threading.Event()
    all_pools.repository("one").submit(lambda: (begun.set(), gate.wait(10)))
    assert begun.wait(10)
    all_pools.drop("one")
    all_pools.repository("one").submit(done.set)
    assert done.wait(10)
    gate.set()
    all_pools.close()


def test_the_number_of_repository_pools_is_bounded() -> None:
    all_pools = pools.Pools(repository_threads=1)
    for number in range(1000):
        all_pools.repository(f"made up {number}")  # without work, each makes room for the next
    gate = threading.Event()
    with pytest.raises(errors.Overloaded):
        for number in range(pools.REPOSITORIES + 1):
            all_pools.repository(f"busy {number}").submit(lambda: gate.wait(10))
    gate.set()
    all_pools.close()


# -- verbs that wait, and the end


def test_waiting_verbs_end_when_their_caller_has_gone(world: World) -> None:
    async def main() -> None:
        caller = callers.Caller("test-2", "unix", callers.Role.MONITOR)
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        waiting = asyncio.ensure_future(answer_of(dispatcher, request("Sample.wait"), caller))
        await asyncio.sleep(0)
        await asyncio.to_thread(world.sample.started.acquire)
        caller.stop_waiting()
        corpus.check(corpus.Failure(10005, "stopping", 1), await waiting)
        assert list(world.sample.ended) == ["unix"] and not caller.waiting

    asyncio.run(main())


def test_stop_ends_waiting_lets_work_end_and_takes_nothing_new(world: World) -> None:
    async def main() -> None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        waiting = asyncio.ensure_future(answer_of(dispatcher, request("Sample.wait")))
        working = asyncio.ensure_future(answer_of(dispatcher, request("Sample.stuck", {"repoId": "one"})))
        await asyncio.to_thread(world.sample.started.acquire)
        await asyncio.to_thread(world.sample.started.acquire)
        stopping = asyncio.ensure_future(dispatcher.stop(10))
        corpus.check(corpus.Failure(10005, "stopping", 1), await waiting)
        for text in (request("Spec.get_data"), request("Spec.subtract", [3, 1]), request("Sample.wait")):
            corpus.check(corpus.Failure(10005, "stopping", 1), await answer_of(dispatcher, text))
        assert not stopping.done()
        world.sample.gate.set()
        assert await stopping is True
        assert b"repo one" in (await working or b"")

    asyncio.run(main())


def test_stop_does_not_wait_for_ever(world: World) -> None:
    async def main() -> None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        working = asyncio.ensure_future(answer_of(dispatcher, request("Sample.stuck", {"repoId": "one"})))
        await asyncio.to_thread(world.sample.started.acquire)
        assert await dispatcher.stop(0.01) is False
        world.sample.gate.set()
        await working

    asyncio.run(main())


# -- the log of calls


def logged(world: World, caplog: pytest.LogCaptureFixture, *texts: bytes) -> list[str]:
    """The lines of the log of calls for these requests."""

    async def main() -> None:
        dispatcher = dispatch.Dispatcher(world.verbs, 100)
        for text in texts:
            await answer_of(dispatcher, text)
        await dispatcher.stop(1)

    with caplog.at_level(logging.INFO, "vdsm.api.calls"):
        asyncio.run(main())
    messages = [record.getMessage() for record in caplog.records if record.name == "vdsm.api.calls"]
    return [line.strip() for message in messages for line in message.splitlines() if "short calls" not in line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (request("Spec.subtract", {"minuend": 3, "subtrahend": 1}, 5), "Spec.subtract test-1 id 5: done in "),
        (request("Spec.subtract", [3, 1], "five"), "Spec.subtract test-1 id 'five': done in "),
        (request("Spec.minus", [3, 1]), "Spec.minus test-1 id 1: done in "),
        (request("Sample.blocking", {"name": "hidden"}), "Sample.blocking test-1 id 1: done in "),
        (request("Sample.rule"), "Sample.rule test-1 id 1: done in "),
        (request("Sample.fail", {"name": "named"}), "Sample.fail test-1 id 1: vm_wrong_state in "),
        (request("Sample.failInPool", {"name": "unknown"}), "Sample.failInPool test-1 id 1: internal_error in "),
        (request("Sample.failWaiting", {"name": "named"}), "Sample.failWaiting test-1 id 1: vm_wrong_state in "),
        (request("Sample.typed", {"hidden": 1}), "Sample.typed test-1 id 1: invalid_parameters in "),
        (request("No.no\nforged", None, "a\nb"), r"'No.no\nforged' test-1 id 'a\nb': unknown_method in "),
        (b'{"jsonrpc":"2.0","method":"Spec.get_data"}', "Spec.get_data test-1 id None: done in "),
        (b"nonsense", "(no call) test-1 id None: parse_error in "),
        (request("Spec.get_data", None, True), "(no call) test-1 id None: invalid_request in "),
    ],
    ids=lambda value: value[:40].decode() if isinstance(value, bytes) else "",
)
def test_each_call_is_logged_once_without_its_parameters(
    world: World, caplog: pytest.LogCaptureFixture, text: bytes, line: str
) -> None:
    lines = logged(world, caplog, text)
    assert len(lines) == 1 and lines[0].startswith(line), lines
    assert "hidden" not in lines[0]


def test_short_calls_share_a_record(world: World, caplog: pytest.LogCaptureFixture) -> None:
    lines = logged(world, caplog, *[request("Spec.get_data", None, number) for number in range(50)])
    assert [line.split(":")[0] for line in lines] == [f"Spec.get_data test-1 id {number}" for number in range(50)]
    assert len([record for record in caplog.records if record.name == "vdsm.api.calls"]) == 1


# -- declarations


class Wrong:
    @verb.verb(role="monitor")
    def two(self, first: corpus.Case, second: corpus.Case) -> None: ...


class Twice:
    @verb.verb(role="monitor", aliases=("a",))
    def a(self) -> None: ...


class PoolOnTheLoop:
    @verb.verb(role="monitor", blocking=False, pool=lambda params: "one")
    def a(self) -> None: ...


class PoolOfACoroutine:
    @verb.verb(role="monitor", pool=lambda params: "one")
    async def a(self) -> None: ...


@pytest.mark.parametrize("kind", [Wrong, Twice, PoolOnTheLoop, PoolOfACoroutine])
def test_a_wrong_declaration_fails_at_start(kind: type) -> None:
    with pytest.raises(TypeError):
        verb.Verbs(pools.Pools(1)).add("Some", kind())


# -- frames

LIMIT = 20


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.data())
def test_frames_do_not_depend_on_how_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    splitter, found, rest = frames.Splitter(LIMIT), [], stream
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        found += [None if frame is None else frame.removesuffix(b"\n") for frame in splitter.feed(rest[:cut])]
        rest = rest[cut:]
    expected = [line if len(line) <= LIMIT else None for line in lines if line.strip() or len(line) > LIMIT]
    assert found == expected
    assert not splitter.unfinished


def test_a_frame_over_the_limit_is_told_at_once_and_not_kept() -> None:
    splitter = frames.Splitter(LIMIT)
    assert splitter.feed(b"x" * LIMIT) == []
    assert splitter.feed(b"x") == [None]
    assert splitter.feed(b"x" * 1000) == []
    assert splitter.unfinished
    assert splitter.feed(b"x\n{}\n{") == [b"{}"]
    assert splitter.unfinished
