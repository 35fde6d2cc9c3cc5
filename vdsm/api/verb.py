"""How a verb is declared, and the table of all verbs.

A namespace is a class; a verb is a method of it with `@verb()`. Its one parameter model and its result type are read
from the method's annotations, so they are written once: they validate, and they are the OpenRPC document, the help
and the reference.

    class DiskParams(verb.Params):
        repo_id: str = pydantic.Field(description="the repository")          # "repoId" on the wire
        size: int = pydantic.Field(gt=0, description="bytes")                # "5" is taken for 5

    class Storage:
        @verb.verb(role="admin", pool=lambda params: params.repo_id, errors=(errors.NoSuchRepository,))
        def createVirtualDisk(self, params: DiskParams) -> CreatedImage: ...

Three ways to run:
- blocking (the default): a plain function, run in a thread of its repository's pool (`pool` gives the repository's id
  from the parameters), of its VM's pool (`hooked` gives the VM's id: hook scripts may hold the thread for long), of
  the pool that its namespace was added with, or of the general one.
- `blocking=False` on a plain function: inline on the event loop. It must end within microseconds.
- a coroutine function: awaited on the event loop. It waits for something (Job.wait) and is cancelled when its caller
  is gone or the agent stops; the work itself belongs elsewhere.

A method takes its parameters, or nothing, and after them a `caller.Caller` if it asks for one by its annotation.
"""

import enum
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import alias_generators

from vdsm import errors as named_errors
from vdsm.api import caller as callers
from vdsm.api import pools

Function = TypeVar("Function", bound=Callable[..., Any])
RoleName = Literal["monitor", "operator", "admin"]
ErrorClass = type[named_errors.VdsmError]

_MARK = "__verb__"


class Params(pydantic.BaseModel):
    """Base of parameter models and of the objects inside them.

    Fields are snake_case here and camelCase on the wire; `Field(alias="vmID")` where upstream spells otherwise.
    Positional parameters are the fields in their order. Strings are taken for numbers and booleans, as upstream's
    clients send them; unknown parameters are refused.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, alias_generator=alias_generators.to_camel
    )


class Result(pydantic.BaseModel):
    """Base of result models. Made with snake_case names, sent as camelCase."""

    model_config = pydantic.ConfigDict(
        extra="forbid", alias_generator=alias_generators.to_camel, validate_by_name=True, serialize_by_alias=True
    )


class Way(enum.Enum):
    """How a verb's method runs."""

    INLINE = "inline"
    BLOCKING = "blocking"
    WAITING = "waiting"


@dataclass(frozen=True)
class Declaration:
    """What `@verb()` was given."""

    role: callers.Role
    blocking: bool
    pool: Callable[[Any], str] | None
    hooked: Callable[[Any], str] | None
    name: str | None
    aliases: tuple[str, ...]
    result: Any
    errors: tuple[ErrorClass, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One verb as dispatch sees it."""

    name: str  # "Namespace.verb"
    aliases: tuple[str, ...]  # older names of it, "Namespace.verb" too
    role: callers.Role
    way: Way
    inline: bool  # way is INLINE
    quiet: bool  # inline and only looking: its calls are logged in bundles
    params: type[Params]
    fields: tuple[str, ...]  # the parameters' wire names, in positional order
    validate: Callable[[object], Params] = field(repr=False)
    invoke: Callable[[Params, callers.Caller], Any] = field(repr=False)
    pool: Callable[[Params], pools.BoundedPool] = field(repr=False)
    result: Any
    errors: tuple[ErrorClass, ...]
    doc: str


def verb(
    *,
    role: RoleName,
    blocking: bool = True,
    pool: Callable[[Any], str] | None = None,
    hooked: Callable[[Any], str] | None = None,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    result: Any = None,
    errors: tuple[ErrorClass, ...] = (),
) -> Callable[[Function], Function]:
    """Declares a method as a verb. `Verbs.add` reads the declaration.

    name: the verb's name where it is not the method's own. aliases: older names in the same namespace.
    pool: gives the id of the repository the verb touches. hooked: gives the id of the VM whose hook scripts it waits
    for. result: the result's type, where the annotation cannot say it (pre-encoded `orjson.Fragment`). errors: what it
    raises of its own; bad parameters and the like go without saying.
    """
    declaration = Declaration(callers.Role[role.upper()], blocking, pool, hooked, name, aliases, result, errors)

    def mark(method: Function) -> Function:
        setattr(method, _MARK, declaration)
        return method

    return mark


class Verbs:
    """All verbs by name. Filled at start, only read later."""

    def __init__(self, the_pools: pools.Pools) -> None:
        self.pools = the_pools
        self.entries: list[Entry] = []
        self.by_name: dict[str, Entry] = {}

    def add(self, namespace: str, holder: object, pool: pools.BoundedPool | None = None) -> None:
        """Adds every verb of `holder`. Several holders may share a namespace. Raises TypeError for a wrong one.

        `pool` is where those run that block and touch no repository: the general one when left out.
        """
        for method_name, function in inspect.getmembers(type(holder), inspect.isfunction):
            declaration = getattr(function, _MARK, None)
            if declaration is not None:
                method = getattr(holder, method_name)
                self._add(self._entry(namespace, method, declaration, pool or self.pools.general))

    def _add(self, entry: Entry) -> None:
        for name in (entry.name, *entry.aliases):
            if name in self.by_name:
                raise TypeError(f"verb {name} exists twice")
            self.by_name[name] = entry
        self.entries.append(entry)

    def _entry(
        self, namespace: str, method: Callable[..., Any], declared: Declaration, otherwise: pools.BoundedPool
    ) -> Entry:
        name = f"{namespace}.{declared.name or method.__name__}"
        hints = typing.get_type_hints(method)
        params, takes_params, takes_caller = _parameters(name, method, hints)
        way = _way(name, method, declared)
        return Entry(
            name=name,
            aliases=tuple(f"{namespace}.{alias}" for alias in declared.aliases),
            role=declared.role,
            way=way,
            inline=way is Way.INLINE,
            quiet=way is Way.INLINE and declared.role is callers.Role.MONITOR,
            params=params,
            fields=tuple(wire_names(params)),
            validate=params.__pydantic_validator__.validate_python,
            invoke=_adapted(method, takes_params, takes_caller),
            pool=self._pool(declared, otherwise),
            result=declared.result if declared.result is not None else hints.get("return", Any),
            errors=declared.errors,
            doc=inspect.getdoc(method) or "",
        )

    def _pool(self, declared: Declaration, otherwise: pools.BoundedPool) -> Callable[[Params], pools.BoundedPool]:
        repository_of, vm_of = declared.pool, declared.hooked
        if repository_of is not None:
            return lambda params: self.pools.repository(repository_of(params))
        if vm_of is not None:
            return lambda params: self.pools.hooked(vm_of(params))
        return lambda _: otherwise


def wire_names(model: type[pydantic.BaseModel]) -> Mapping[str, pydantic.fields.FieldInfo]:
    """The model's fields by their names on the wire, in their order."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _parameters(name: str, method: Callable[..., Any], hints: dict[str, Any]) -> tuple[type[Params], bool, bool]:
    """The parameter model of a method, and whether it takes parameters and a caller."""
    kinds = [hints.get(argument) for argument in inspect.signature(method).parameters]
    takes_caller = bool(kinds) and kinds[-1] is callers.Caller
    rest = kinds[:-1] if takes_caller else kinds
    if not rest:
        return Params, False, takes_caller
    model = rest[0]
    if len(rest) > 1 or not (isinstance(model, type) and issubclass(model, Params)):
        raise TypeError(f"verb {name} takes one parameter model and at most a caller, not {kinds}")
    return model, True, takes_caller


def _way(name: str, method: Callable[..., Any], declared: Declaration) -> Way:
    if inspect.iscoroutinefunction(method):
        if declared.pool or declared.hooked:
            raise TypeError(f"verb {name} is a coroutine: it runs in no pool")
        return Way.WAITING
    if not declared.blocking and (declared.pool or declared.hooked):
        raise TypeError(f"verb {name} has a pool and says that it does not block")
    return Way.BLOCKING if declared.blocking else Way.INLINE


def _adapted(
    method: Callable[..., Any], takes_params: bool, takes_caller: bool
) -> Callable[[Params, callers.Caller], Any]:
    """The method with the one signature that dispatch calls."""
    if takes_params and takes_caller:
        return method
    if takes_params:
        return lambda params, _: method(params)
    if takes_caller:
        return lambda _, caller: method(caller)
    return lambda _params, _caller: method()
