"""What a call of the root helper is, and how it is written on the wire. The closed list of calls: `calls`.

    call               a frozen dataclass: its fields are the arguments, its docstring says what root does
    its result         the dataclass named in `Call[...]`
    its deadline       seconds, counted in the helper from the moment the call was read

A call checks its fields when it is made, so the same rules hold in the agent and, once more, in the helper. There are
no command lines and no free paths: a field has a plain type or is a list of one, and text has a `Rule`. A new call is
one dataclass in `calls`, one function in a room of the helper, and one line in the table of `worker.py`. Fields of a
result may also be dataclasses of such fields, and lists of them.

On the wire (`frames.py`) a call is {"call": name, "arguments": {field: value}}, a reply is {"result": {field: value}}
or {"error": {"kind", "reason"}}. Nothing else is understood; an unknown or missing name, or another type, is refused.

    HelperError
      +- Refused           the call breaks the contract, or the helper's rules; nothing was done
      +- Failed            the helper tried and it went wrong; calls may be repeated
      +- DeadlinePassed    no answer in time; the work may still go on in a process that hangs
      +- Stopped           the helper was ended under the call; what was begun is cut off
      +- Unavailable       no helper, or it has no room for the call

Standard library only, imports nothing: the agent and the root helper both load this file.
"""

import dataclasses
import json
import math
import types
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R")


class HelperError(Exception):
    """A call that has no result. `reason` is one line in plain words."""

    kind: ClassVar[str]
    by_kind: ClassVar[dict[str, type["HelperError"]]] = {}

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __init_subclass__(cls) -> None:
        cls.by_kind[cls.kind] = cls


class Refused(HelperError):
    """The call breaks the contract or a rule of the helper. Nothing was done."""

    kind = "refused"


class Failed(HelperError):
    """The helper tried and it went wrong."""

    kind = "failed"


class DeadlinePassed(HelperError):
    """No answer in time. What was begun may still go on."""

    kind = "deadline"


class Stopped(HelperError):
    """The helper was ended under the call, which was cut off."""

    kind = "stopped"


class Unavailable(HelperError):
    """There is no helper, or it has no room for the call."""

    kind = "unavailable"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value of the right type must be besides: `words` for people, `holds` decides. A `secret` is in no log."""

    words: str
    holds: Callable[[Any], bool]
    secret: bool = False


class Call(Generic[R]):
    """One thing that root does. Subclasses are frozen dataclasses; making one raises `Refused` for a bad field."""

    by_name: ClassVar[dict[str, type["Call[Any]"]]] = {}
    deadline_s: ClassVar[float]
    result_type: ClassVar[type[Any]]

    def __init_subclass__(cls, *, deadline_s: float) -> None:
        cls.deadline_s = deadline_s
        cls.result_type = get_args(cls.__orig_bases__[0])[0]  # type: ignore[attr-defined]
        cls.by_name[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, hint in _fields(type(self)).items():
            _check_field(name, hint, getattr(self, name))


def is_absolute_path(text: str) -> bool:
    """Whether `text` addresses one place only: the rule of `AbsolutePath`."""
    names = text.split("/")
    return (
        len(names) > 1
        and names[0] == ""
        and not {"", ".", ".."} & set(names[1:])
        and text.isprintable()  # without control characters and without lone surrogates, which UTF-8 cannot hold
        and len(text.encode()) < 4096
    )


# A path is only an address inside directories that the helper's own configuration names; the rooms check that.
AbsolutePath = Annotated[
    str, Rule("an absolute path without '.', '..' or empty names, printable, under 4096 bytes", is_absolute_path)
]


# -- the wire --------------------------------------------------------------------------------------------------------


def encode_call(call: Call[Any]) -> bytes:
    """The JSON of a call."""
    return _dump({"call": type(call).__name__, "arguments": vars(call)})


def parse_call(data: bytes) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call, as sent and still unchecked. Raises `Refused`."""
    document = _load(data)
    if document.keys() != {"call", "arguments"}:
        raise Refused("not a call: it has exactly the members call and arguments")
    name, arguments = document["call"], document["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Refused("not a call: call is a name and arguments are an object")
    return name, arguments


def build_call(name: str, arguments: dict[str, Any]) -> Call[Any]:
    """The call of that name with every field checked. Raises `Refused`."""
    kind = Call.by_name.get(name)
    if kind is None:
        raise Refused("unknown call")
    _check_names(kind, arguments)
    return kind(**arguments)


def decode_call(data: bytes) -> Call[Any]:
    """The call in `data`. Raises `Refused` for everything that `encode_call` cannot have made."""
    return build_call(*parse_call(data))


def encode_result(call: Call[R], result: R) -> bytes:
    """The JSON reply of a call that worked. A result that is not of the call's type is a fault of the room."""
    if type(result) is not call.result_type:
        raise TypeError(f"{type(call).__name__} must give a {call.result_type.__name__}")
    # every result type is a dataclass, which its type does not say
    return _dump({"result": dataclasses.asdict(result)})  # type: ignore[call-overload]


def encode_error(error: HelperError) -> bytes:
    """The JSON reply of a call without a result."""
    return _dump({"error": {"kind": error.kind, "reason": error.reason}})


def decode_reply(call: Call[R], data: bytes) -> R:
    """The result of `call`, checked; or the error that the helper sent, raised. An odd reply is `Failed`."""
    try:
        document = _load(data)
        if document.keys() == {"result"}:
            # checked to be of the result type
            return _received("result", call.result_type, document["result"])  # type: ignore[no-any-return]
        if document.keys() != {"error"}:
            raise Refused("neither a result nor an error")
        error = document["error"]
        kind, reason = HelperError.by_kind[error["kind"]], str(error["reason"])
    except (Refused, LookupError, TypeError) as fault:
        raise Failed(f"the reply is not of this contract: {fault}") from fault
    raise kind(reason)


def _received(name: str, hint: Any, value: Any) -> Any:
    """A checked value of a result; objects become their dataclasses."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise Refused(f"{name}: an object expected, not {type(value).__name__}")
        _check_names(hint, value)
        return hint(**{field: _received(field, its, value[field]) for field, its in _fields(hint).items()})
    if get_origin(hint) is list and isinstance(value, list):
        (item,) = get_args(hint)
        return [_received(name, item, one) for one in value]
    _check_field(name, hint, value)
    return value


def concealed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call for people to read, checked or not: without what is secret in any call."""
    names = {name for kind in Call.by_name.values() for name, hint in _fields(kind).items() if _is_secret(hint)}
    return {name: _CONCEALED if name in names and value is not None else value for name, value in arguments.items()}


_CONCEALED = "(not shown)"


def _is_secret(hint: Any) -> bool:
    _, rule = _parts(hint)
    return rule is not None and rule.secret


def describe() -> str:
    """The whole list for people: calls with their fields, results and deadlines."""
    lines = []
    for name, kind in Call.by_name.items():
        lines += [f"{name}  (deadline {kind.deadline_s:g} s)", f"    {kind.__doc__}"]
        lines += [f"    argument  {_describe_field(field, hint)}" for field, hint in _fields(kind).items()]
        lines += [f"    result    {_describe_field(field, hint)}" for field, hint in _fields(kind.result_type).items()]
        lines.append("")
    return "\n".join(lines)


def _describe_field(name: str, hint: Any) -> str:
    return f"{name}: {_describe(hint)}"


def _describe(hint: Any) -> str:
    kind, rule = _parts(hint)
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return f"list of ({_describe(item)})"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return ", ".join(_describe_field(field, its) for field, its in _fields(kind).items())
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return text + (f", {rule.words}" if rule else "")


# -- checking --------------------------------------------------------------------------------------------------------


def _fields(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _parts(hint: Any) -> tuple[Any, Rule | None]:
    if get_origin(hint) is Annotated:
        kind, rule = get_args(hint)
        return kind, rule
    return hint, None


def _check_names(kind: type[Any], members: dict[str, Any]) -> None:
    wanted = _fields(kind).keys()
    for problem, names in (("unknown", members.keys() - wanted), ("missing", wanted - members.keys())):
        if names:
            raise Refused(f"{problem} field {min(names)!a:.80}")


def _check_field(name: str, hint: Any, value: object) -> None:
    kind, rule = _parts(hint)
    if get_origin(kind) is list and isinstance(value, list):
        (item,) = get_args(kind)
        for number, one in enumerate(value):
            _check_field(f"{name}[{number}]", item, one)
        return
    if not _fits(value, kind):
        raise Refused(f"{_describe_field(name, kind)} expected, not {type(value).__name__}")
    if rule is not None and not rule.holds(value):
        raise Refused(f"{name} must be {rule.words}")


def _fits(value: object, kind: Any) -> bool:
    """Exact types only: True is no int, 1 is no float."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(kind))
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    return type(value) is kind


# -- JSON ------------------------------------------------------------------------------------------------------------


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode()


def _load(data: bytes) -> dict[str, Any]:
    """Strict JSON: UTF-8, no member twice (two readers would see two calls), no NaN or Infinity, an object outside."""
    try:
        document = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused("not strict JSON") from error
    if not isinstance(document, dict):
        raise Refused("not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number
