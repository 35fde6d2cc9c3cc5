"""What somebody may have meant who spelt it wrong."""

from __future__ import annotations

import difflib
import re

from vdsm.client import failures, schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vdsm.client import transport

_UNKNOWN_METHOD = -32601


def of(name: str, known: Iterable[str]) -> list[str]:
    """At most three of `known`, the nearest first; the one alone that differs only in case."""
    by_lowered = {each.lower(): each for each in known}
    if name.lower() in by_lowered:
        return [by_lowered[name.lower()]]
    return [by_lowered[found] for found in difflib.get_close_matches(name.lower(), by_lowered, 3, 0.7)]


def spoken(name: str) -> str:
    """`Namespace.verb` as the command line has it."""
    return name.replace(".", " ", 1)


def meant(client: transport.Client, method: str, error: failures.ClientError) -> list[str]:
    """What the agent has instead of an unknown verb or parameter; [] when the error is another, or nothing is near."""
    parameter = _unknown_parameter(error)
    if error.code != _UNKNOWN_METHOD and parameter is None:
        return []
    try:
        document = client.call("rpc.discover")
    except failures.ClientError:
        return []  # the error itself is what must be told
    methods = schema.methods(document)
    if parameter is None:
        return [spoken(name) for name in of(method, methods)]
    if method not in methods:
        return []  # an older name of the verb
    return _beside(parameter, [field.name for field in schema.param_fields(document, methods[method])])


def _beside(parameter: str, known: list[str]) -> list[str]:
    """The members of the same object that are spelt nearly so."""
    # The agent says "disks.0.bus" where the field's name is "disks[].bus".
    above, _, last = re.sub(r"\.\d+\b", "[]", parameter).rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == above}
    return [siblings[found] for found in of(last, siblings)]


def _unknown_parameter(error: failures.ClientError) -> str | None:
    facts = error.data.get("facts")
    if error.key != "invalid_parameters" or not isinstance(facts, dict) or facts.get("reason") != "unknown parameter":
        return None
    return str(facts.get("parameter", ""))
