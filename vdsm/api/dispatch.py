"""From the bytes of a request to the bytes of its answer.

A well-formed single call by name takes a short path of our own: orjson, the verb's pydantic-core validator, the
method, orjson. Everything else (batches, notifications, positional parameters, odd envelopes) goes member by member
through jsonrpcserver, which takes many times as long and knows the protocol. Both run a verb by `_begin`, so they
differ in the envelope alone; `envelope` says how each corner is decided, and one corpus holds the two together.

The members of a batch run one after the other, in order.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import jsonrpcserver
import orjson
import pydantic
from jsonrpcserver import async_main, codes

from vdsm import errors, logs
from vdsm.api import caller as callers
from vdsm.api import calls, envelope, faults, verb

Answer = bytes | None  # one line, with its end; None: nothing is sent

_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS
_ANSWER_OPTIONS = _OPTIONS | orjson.OPT_APPEND_NEWLINE


class _Call(NamedTuple):
    """A call that goes on after dispatch has returned."""

    name: str
    ident: Any
    caller: callers.Caller
    began: float
    entry: verb.Entry
    parameters: verb.Params


class Dispatcher:
    """Answers requests. One for all transports; its methods belong to the event loop."""

    def __init__(self, verbs: verb.Verbs, max_batch: int) -> None:
        self.log = calls.CallLog()
        self._verbs = verbs.by_name
        # The lowest role may call these: there is nothing to ask.
        self._quiet = {name: entry for name, entry in verbs.by_name.items() if entry.quiet}
        self._max_batch = max_batch
        self._methods = _Methods(self._member)
        self._working: set[asyncio.Future[bytes]] = set()  # calls in a pool
        self._waits: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def stop(self, timeout_s: float) -> bool:
        """Refuses new calls, ends waiting ones with `Stopping`, and lets those at work end: whether all did in time."""
        self._stopping = True
        for task in self._waits:
            task.cancel()
        _, late = await asyncio.wait(self._working, timeout=timeout_s) if self._working else ((), ())
        self.log.flush()
        return not late

    def answer(self, text: bytes, caller: callers.Caller) -> Answer | Awaitable[Answer]:
        """The answer to one request or batch: at once where it can be had at once, else something to await.

        Never raises, and neither does what it returns, except for `asyncio.CancelledError`.
        """
        began = time.perf_counter()
        try:
            request = envelope.parse(text)
        except errors.ParseError as error:
            return self._refused(None, error, caller)
        if type(request) is not dict or (plain := envelope.plain(request)) is None:
            return self.odd(request, caller)
        name, params, ident = plain
        entry = self._quiet.get(name)
        if entry is None or self._stopping:
            return self._call(name, params, ident, caller)
        # What follows is `_call` of a verb that looks at something in memory, as almost all calls are: a third faster.
        try:
            parameters = entry.validate(params)
        except pydantic.ValidationError as error:
            return envelope.failure(ident, self._failed(faults.of_parameters(error), name, ident, caller, began))
        try:
            answer = orjson.dumps(
                {"jsonrpc": "2.0", "result": entry.invoke(parameters, caller), "id": ident}, _model, _ANSWER_OPTIONS
            )
        except Exception as error:  # noqa: BLE001 - the border, as in _begin
            return envelope.failure(ident, self._failed(error, name, ident, caller, began))
        self.log.short(name, caller.name, ident, time.perf_counter() - began)
        return answer

    def _call(
        self, name: str, params: dict[str, Any], ident: Any, caller: callers.Caller
    ) -> Answer | Awaitable[Answer]:
        try:
            result = self._begin(name, params, ident, caller)
        except errors.VdsmError as error:
            return envelope.failure(ident, error)
        if isinstance(result, bytes):
            return envelope.success(ident, result)
        return _later(result, ident)

    async def odd(self, request: Any, caller: callers.Caller) -> Answer:
        """The answer to any parsed request, through jsonrpcserver."""
        if not isinstance(request, list):
            return await self._odd_member(request, caller)
        if not 0 < len(request) <= self._max_batch:
            reason = f"a batch of {len(request)} calls; 1 to {self._max_batch} are taken"
            return self._refused(None, errors.InvalidRequest(reason=reason), caller)
        answers = [await self._odd_member(member, caller) for member in request]
        sent = [answer.rstrip() for answer in answers if answer is not None]
        return b"[%b]\n" % b",".join(sent) if sent else None

    async def _odd_member(self, member: Any, caller: callers.Caller) -> Answer:
        if (fault := envelope.check(member)) is not None:
            return self._refused(envelope.id_of(member), fault, caller)
        ident = member.get("id")
        # Text and schema are checked already, by our decisions; the library's own check is two thirds of its time.
        answer = await async_main.dispatch_to_serializable(
            "",
            methods=self._methods,
            context=_Context(caller, ident),
            deserializer=lambda _: member,
            validator=lambda _: member,
        )
        if answer is None:
            return None
        if isinstance(answer, dict) and answer.get("error", {}).get("code") == codes.ERROR_SERVER_ERROR:
            # The library itself failed. It has logged the exception, and put its text into the answer.
            return envelope.failure(ident, errors.Unexpected(reason="logged by jsonrpcserver"))
        return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)

    async def _member(self, name: str, context: "_Context", /, *positional: Any, **named: Any) -> Any:
        """Any verb, as a method of jsonrpcserver. It raises nothing: the library would send an exception's text."""
        try:
            params = self._by_name(name, positional) if positional else named
            result = self._begin(name, params, context.ident, context.caller)
            encoded = result if isinstance(result, bytes) else await result
            return jsonrpcserver.Success(orjson.Fragment(encoded))
        except errors.VdsmError as error:
            wire = error.to_wire()
            return jsonrpcserver.Error(wire["code"], wire["message"], wire["data"])

    def _by_name(self, name: str, positional: tuple[Any, ...]) -> dict[str, Any]:
        entry = self._verbs.get(name)
        if entry is None:
            return {}
        if len(positional) > len(entry.fields):
            reason = f"{len(positional)} positional parameters; {entry.name} takes {len(entry.fields)}"
            raise errors.InvalidParameters(parameter="params", reason=reason)
        return dict(zip(entry.fields, positional, strict=False))

    def _begin(self, name: str, params: dict[str, Any], ident: Any, caller: callers.Caller) -> bytes | Awaitable[bytes]:
        """Runs a verb, or starts it: its encoded result, or something that will give it.

        Raises `errors.VdsmError`, and so does what it returns. Every call is logged once, by whoever ends it.
        """
        began = time.perf_counter()
        try:
            entry = self._allowed(name, caller)
            parameters = _parameters(entry, params)
            if not entry.inline:
                call = _Call(name, ident, caller, began, entry, parameters)
                return self._in_pool(call) if entry.way is verb.Way.BLOCKING else self._waiting(call)
            result = encode(entry.invoke(parameters, caller))
        except Exception as error:  # noqa: BLE001 - the border: what has no name is logged, never sent
            raise self._failed(error, name, ident, caller, began) from None
        if entry.quiet:
            self.log.short(name, caller.name, ident, time.perf_counter() - began)
        else:
            self.log.ended(name, caller.name, ident, began)
        return result

    def _allowed(self, name: str, caller: callers.Caller) -> verb.Entry:
        if self._stopping:
            raise errors.Stopping
        entry = self._verbs.get(name)
        if entry is None:
            raise errors.UnknownMethod(method=name[:100])
        if caller.role < entry.role:
            raise errors.Forbidden(verb=entry.name, role=entry.role.name.lower(), has=caller.role.name.lower())
        return entry

    def _in_pool(self, call: _Call) -> Awaitable[bytes]:
        """Runs a blocking verb in its pool. The call goes on there and is logged even when nobody waits any more."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bytes] = loop.create_future()

        def work() -> None:
            outcome = self._outcome(call)
            with contextlib.suppress(RuntimeError):  # the agent has ended while a stuck repository held this thread
                loop.call_soon_threadsafe(_settle, ended, outcome)

        call.entry.pool(call.parameters).submit(work)
        self._working.add(ended)
        ended.add_done_callback(self._working.discard)
        return ended

    def _outcome(self, call: _Call) -> bytes | errors.VdsmError:
        try:
            with logs.about(calls.request(call.caller.name, call.ident)):
                result = encode(call.entry.invoke(call.parameters, call.caller))
        except BaseException as error:  # noqa: BLE001 - the border of the pool's thread: somebody waits for the outcome
            return self._failed(error, *call[:4])
        self.log.ended(call.name, call.caller.name, call.ident, call.began)
        return result

    async def _waiting(self, call: _Call) -> bytes:
        """Awaits a verb that only waits, until `Caller.stop_waiting`."""
        with logs.about(calls.request(call.caller.name, call.ident)):
            task = asyncio.get_running_loop().create_task(call.entry.invoke(call.parameters, call.caller))
        call.caller.waiting.add(task)
        self._waits.add(task)
        try:
            result = encode(await task)
        except asyncio.CancelledError:
            if not task.cancelled() or _cancelled():
                raise
            raise self._failed(errors.Stopping(), *call[:4]) from None
        except Exception as error:  # noqa: BLE001 - the border, as in _begin
            raise self._failed(error, *call[:4]) from None
        finally:
            call.caller.waiting.discard(task)
            self._waits.discard(task)
        self.log.ended(call.name, call.caller.name, call.ident, call.began)
        return result

    def _failed(
        self, error: BaseException, name: str, ident: Any, caller: callers.Caller, began: float
    ) -> errors.VdsmError:
        named = faults.of_handler(error, calls.request(caller.name, ident))
        self.log.ended(name if name in self._verbs else calls.shown(name), caller.name, ident, began, named.key)
        return named

    def _refused(self, ident: Any, error: errors.VdsmError, caller: callers.Caller) -> bytes:
        self.log.ended("(no call)", caller.name, ident, time.perf_counter(), error.key)
        return envelope.failure(ident, error)


class _Context(NamedTuple):
    """What jsonrpcserver hands through to `_member`."""

    caller: callers.Caller
    ident: Any


class _Methods(dict[str, Callable[..., Awaitable[Any]]]):
    """jsonrpcserver's table of methods: every name leads to `_member`, which knows the verbs and their errors."""

    def __init__(self, member: Callable[..., Awaitable[Any]]) -> None:
        super().__init__()
        self._member = member

    def __missing__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return functools.partial(self._member, name)


def encode(result: Any) -> bytes:
    """A verb's result as JSON: plain values, result models, `orjson.Fragment` of bytes encoded before.

    Raises TypeError for what is not JSON; data classes too, whose snake_case names have no place on the wire.
    """
    return orjson.dumps(result, _model, _OPTIONS)


def _model(value: Any) -> orjson.Fragment:
    if isinstance(value, pydantic.BaseModel):
        return orjson.Fragment(value.__pydantic_serializer__.to_json(value, by_alias=True))
    raise TypeError(f"{type(value).__name__} is not JSON")


def _parameters(entry: verb.Entry, params: dict[str, Any]) -> verb.Params:
    try:
        return entry.validate(params)
    except pydantic.ValidationError as error:
        raise faults.of_parameters(error) from None


async def _later(result: Awaitable[bytes], ident: Any) -> Answer:
    try:
        return envelope.success(ident, await result)
    except errors.VdsmError as error:
        return envelope.failure(ident, error)


def _settle(ended: "asyncio.Future[bytes]", outcome: bytes | errors.VdsmError) -> None:
    if ended.done():
        return  # the one who waited was cancelled
    if isinstance(outcome, bytes):
        ended.set_result(outcome)
    else:
        ended.set_exception(outcome)


def _cancelled() -> bool:
    """Whether the running task itself is asked to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
