"""docs/reference/verbs.md: every verb with its parameters, result and errors."""

from collections.abc import Iterator
from typing import Any

from vdsm.client import schema
from vdsm.tool.reference import markdown

_HEAD = """\
A verb is called as `Namespace.verb` over JSON-RPC 2.0, with parameters by name or by position (their order here), or as
`vdsm-client Namespace verb name=value ...`. For programs, `rpc.discover` answers the same as an OpenRPC document.
[errors.md](errors.md) explains the errors, [events.md](events.md) the events, [jobs.md](jobs.md) the kinds of jobs.

*Role* is what the connection must have: monitor looks, operator runs virtual machines and jobs, admin changes storage
and the host. Names with dots are members of objects; `[]` stands for each item of a list, `*` for each key of an
object. Ids are UUIDs unless it says otherwise."""


def page(document: dict[str, Any]) -> str:
    methods = schema.methods(document)
    common = set.intersection(*(set(_keys(document, method)) for method in methods.values()))
    named = ", ".join(_link(key) for key in sorted(common))
    return markdown.page(
        "# Verbs",
        markdown.NOTE,
        _HEAD,
        f"Any verb may also answer {named}.",
        *_namespaces(document, methods, common),
    )


def _namespaces(document: dict[str, Any], methods: dict[str, Any], common: set[str]) -> Iterator[str]:
    for namespace in dict.fromkeys(name.partition(".")[0] for name in methods):
        within = {name: method for name, method in methods.items() if name.startswith(f"{namespace}.")}
        yield f"## {namespace}"
        rows = [(f"[{name}](#{name.replace('.', '').lower()})", method["x-role"], method["summary"])
                for name, method in within.items()]  # fmt: skip
        yield markdown.table(("verb", "role", ""), rows)
        for name, method in within.items():
            yield from _verb(document, name, method, common)


def _verb(document: dict[str, Any], name: str, method: dict[str, Any], common: set[str]) -> Iterator[str]:
    yield f"### {name}"
    yield method["summary"]
    yield method.get("description", "")
    aliases = ", ".join(map(markdown.code, method["x-aliases"]))
    yield f"Role: {method['x-role']}." + (f" Also called {aliases}." if aliases else "")
    params = [
        (markdown.code(field.name), field.kind, field.need, field.description)
        for field in schema.param_fields(document, method)
    ]
    yield markdown.table(("parameter", "type", "", ""), params) or "No parameters."
    answer = schema.result(document, method)
    yield f"Result: {schema.type_name(document, answer)}."
    fields = [
        (markdown.code(field.name), field.kind, field.description) for field in schema.fields_within(document, answer)
    ]
    yield markdown.table(("field", "type", ""), fields)
    errors = ", ".join(_link(key) for key in _keys(document, method) if key not in common)
    yield f"Errors: {errors}." if errors else ""


def _keys(document: dict[str, Any], method: dict[str, Any]) -> list[str]:
    return [schema.resolved(document, error)["data"]["key"] for error in method["errors"]]


def _link(key: str) -> str:
    return f"[{key}](errors.md#{key})"
