"""Small verbs for tests of the wire: the JSON-RPC 2.0 specification's own examples, and one of each kind we have."""

import asyncio
import collections
import threading
from typing import Any

import orjson
import pydantic

from vdsm import errors
from vdsm.api import caller as callers
from vdsm.api import pools, verb


class SubtractParams(verb.Params):
    minuend: int
    subtrahend: int


class SumParams(verb.Params):
    first: int
    second: int
    third: int


class UpdateParams(verb.Params):
    a: int
    b: int
    c: int
    d: int
    e: int


class HelloParams(verb.Params):
    number: int


class Spec:
    """The methods that the specification's examples call."""

    def __init__(self) -> None:
        self.called: list[str] = []

    @verb.verb(role="monitor", blocking=False, aliases=("minus",))
    def subtract(self, params: SubtractParams) -> int:
        """The difference."""
        self.called.append("subtract")
        return params.minuend - params.subtrahend

    @verb.verb(role="monitor", blocking=False)
    def sum(self, params: SumParams) -> int:
        return params.first + params.second + params.third

    @verb.verb(role="monitor", blocking=False)
    def update(self, params: UpdateParams) -> None:
        self.called.append("update")

    @verb.verb(role="monitor", blocking=False)
    def notify_hello(self, params: HelloParams) -> None:
        self.called.append("notify_hello")

    @verb.verb(role="monitor", blocking=False)
    def get_data(self) -> list[Any]:
        return ["hello", 5]


class Disk(verb.Params):
    image_id: str
    read_only: bool = False


class TypedParams(verb.Params):
    vm_id: str = pydantic.Field(alias="vmID")
    count: int = 1
    force: bool = False
    ratio: float = 1.0
    disks: list[Disk] = []


class TypedResult(verb.Result):
    vm_id: str = pydantic.Field(alias="vmID")
    count: int
    force: bool
    ratio: float
    first_image: str | None


class ValueParams(verb.Params):
    value: Any


class NameParams(verb.Params):
    name: str


class WhereParams(verb.Params):
    repo_id: str


SECRET = "/etc/secret/path of a trusting admin"


class Sample:
    """One verb of each kind."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.ended: collections.deque[str] = collections.deque()

    @verb.verb(role="monitor", blocking=False)
    def echo(self, params: ValueParams) -> Any:
        return params.value

    @verb.verb(role="monitor", blocking=False)
    def typed(self, params: TypedParams) -> TypedResult:
        first = params.disks[0].image_id if params.disks else None
        return TypedResult(
            vm_id=params.vm_id, count=params.count, force=params.force, ratio=params.ratio, first_image=first
        )

    @verb.verb(role="operator", errors=(errors.NoSuchVm,))
    def blocking(self, params: NameParams) -> str:
        """Runs in the general pool."""
        self.called.append(params.name)
        return threading.current_thread().name

    @verb.verb(role="operator", pool=lambda params: params.repo_id)
    def stuck(self, params: WhereParams) -> str:
        """Runs in a repository's pool, until the gate opens."""
        self.started.release()
        self.gate.wait(30)
        self.ended.append(params.repo_id)
        return threading.current_thread().name

    @verb.verb(role="monitor")
    async def wait(self, caller: callers.Caller) -> str:
        """Waits for ever."""
        self.started.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(caller.transport)
        return "never"

    @verb.verb(role="admin", blocking=False)
    def rule(self) -> str:
        return "ruled"

    @verb.verb(role="monitor", blocking=False)
    def whoami(self, caller: callers.Caller) -> list[str]:
        """The caller's kind, name and other names."""
        return [caller.identity.kind, caller.identity.name, *caller.identity.names]

    @verb.verb(role="monitor", blocking=False, result=list[int])
    def bulk(self) -> orjson.Fragment:
        return orjson.Fragment(b"[1,2,3]")

    @verb.verb(role="monitor", blocking=False)
    def fail(self, params: NameParams) -> Any:
        return self._fail(params.name)

    @verb.verb(role="monitor", name="failInPool")
    def fail_in_pool(self, params: NameParams) -> Any:
        return self._fail(params.name)

    @verb.verb(role="monitor", name="failWaiting")
    async def fail_waiting(self, params: NameParams) -> Any:
        return self._fail(params.name)

    @staticmethod
    def _fail(how: str) -> Any:
        match how:
            case "named":
                raise errors.VmWrongState(vm_id="a", status="Down", verb="pause", needed="Up", state="it is down")
            case "unknown":
                raise KeyError(SECRET)
            case "exit":
                raise SystemExit(SECRET)
            case "model":
                SubtractParams.model_validate({"minuend": SECRET})
            case "facts":
                raise errors.NoSuchVm(vm_id=SECRET.encode())
            case "object":
                return object()
            case "surrogate":
                return "\ud800" + SECRET
            case "integer":
                return 1 << 70
            case "keys":
                return {1: 2}
        return "nothing failed"


class World:
    """The verbs with their pools; `close` lets everything go."""

    def __init__(self) -> None:
        self.spec = Spec()
        self.sample = Sample()
        self.pools = pools.Pools(repository_threads=2)
        self.verbs = verb.Verbs(self.pools)
        self.verbs.add("Spec", self.spec)
        self.verbs.add("Sample", self.sample)

    def close(self) -> None:
        self.sample.gate.set()
        self.pools.close()
