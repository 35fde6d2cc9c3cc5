"""Reading an OpenRPC document (`rpc.discover`): methods, and the fields of parameters and results by dotted names."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Schema = dict[str, Any]
    Document = dict[str, Any]

_DEEPEST = 4
_EMPTY: Schema = {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}


class Field:
    """A parameter, or a member of one or of a result. `name` is dotted, as the command line takes it: `disks[].bus`."""

    def __init__(self, name: str, kind: str, required: bool, schema: Schema) -> None:
        self.name = name
        self.kind = kind
        self.required = required
        self.default = schema.get("default")
        self.description = str(schema.get("description", ""))
        self.values = _values(schema)

    @property
    def need(self) -> str:
        """Whether it must be given, or what counts without it; of an object, its members say that."""
        if self.required:
            return "required"
        if self.default is None or isinstance(self.default, dict):
            return "optional"
        return f"default {json.dumps(self.default, ensure_ascii=False)}"


def methods(document: Document) -> dict[str, Schema]:
    return {method["name"]: method for method in document.get("methods", [])}


def params(document: Document, method: Schema) -> list[Schema]:
    return [resolved(document, param) for param in method.get("params", [])]


def param_fields(document: Document, method: Schema) -> Iterator[Field]:
    """Each parameter, followed by the members of its objects."""
    for param in params(document, method):
        text = param.get("description") or param.get("summary")
        schema = param.get("schema", {}) | ({"description": text} if text else {})
        yield from _fields(document, param["name"], schema, bool(param.get("required")), ())


def result(document: Document, method: Schema) -> Schema:
    """The schema of what a method answers; {} for anything."""
    return dict(resolved(document, method.get("result") or {}).get("schema", {}))


def fields_within(document: Document, schema: Schema) -> Iterator[Field]:
    """The members of the object that `schema` is; `[].name` in a list of objects, `*.name` in a map of them."""
    yield from _inner(document, "", schema, ())


def _fields(document: Document, name: str, schema: Schema, required: bool, above: tuple[str, ...]) -> Iterator[Field]:
    yield Field(name, type_name(document, schema), required, resolved(document, schema))
    yield from _inner(document, name, schema, above)


def _inner(document: Document, name: str, schema: Schema, above: tuple[str, ...]) -> Iterator[Field]:
    shape, mark, above = members(document, schema, above)
    for member, inner in shape.get("properties", {}).items():
        dotted = f"{name}{mark}.{member}".removeprefix(".")
        yield from _fields(document, dotted, inner, member in shape.get("required", ()), above)


def members(document: Document, schema: Schema, above: tuple[str, ...]) -> tuple[Schema, str, tuple[str, ...]]:
    """(the object schema that `schema` is or holds, a mark, the references it is in).

    The mark is "[]" for a list of such objects, ".*" for a map of them, "" for the object itself. The schema is {} when
    there is none, or it lies within itself: `above` names the references on the way here.
    """
    reference = schema.get("$ref")
    if reference in above:
        return {}, "", above
    above = (*above, reference) if reference else above
    schema = resolved(document, schema)
    for alternative in schema.get("anyOf") or schema.get("oneOf") or ():
        found = members(document, alternative, above)
        if found[0]:
            return found
    for holds, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(schema.get(holds), dict) and not schema.get("properties"):
            shape, deeper, within = members(document, schema[holds], above)
            return (shape, mark, within) if shape and not deeper else ({}, "", above)
    return (schema if schema.get("properties") else {}), "", above


def resolved(document: Document, schema: Schema) -> Schema:
    """`schema`, or what its `$ref` ("#/components/schemas/X") points at, with what stands beside the reference."""
    for _ in range(10):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        target: Any = document
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step, {})
        schema = target | {name: value for name, value in schema.items() if name != "$ref"}
    return {}


def type_name(document: Document, schema: Schema, depth: int = 0) -> str:
    """For people: `list of string or null`."""
    schema = resolved(document, schema)
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if "enum" in schema:
        return " or ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if depth == _DEEPEST:
        return "value"  # a type may lie within itself
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(type_name(document, each, depth + 1) for each in alternatives))
    kind = schema.get("type", "any value")
    if kind == "array" and schema.get("items"):
        return f"list of {type_name(document, schema['items'], depth + 1)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict) and not schema.get("properties"):
        return f"object of {type_name(document, schema['additionalProperties'], depth + 1)}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def skeleton(document: Document, schema: Schema, above: tuple[str, ...] = ()) -> Any:
    """A value of the schema's shape to fill in."""
    whole = resolved(document, schema)
    for fixed in ("default", "const"):
        if whole.get(fixed):
            return whole[fixed]
    shape, mark, above = members(document, schema, above)
    if shape:
        one = {name: skeleton(document, inner, above) for name, inner in shape["properties"].items()}
        return {"": one, "[]": [one], ".*": {"": one}}[mark]
    for alternative in whole.get("anyOf") or whole.get("oneOf") or [whole]:
        kind = resolved(document, alternative)
        if kind.get("enum"):
            return kind["enum"][0]
        if kind.get("type") in _EMPTY:
            return _EMPTY[kind["type"]]
    return None


def _values(schema: Schema) -> tuple[str, ...]:
    """The few values that a text or a boolean can have; () where there are many."""
    for each in (schema, *(schema.get("anyOf") or ()), schema.get("items") or {}):
        if each.get("type") == "boolean":
            return ("true", "false")
        if "enum" in each or "const" in each:
            return tuple(str(value) for value in each.get("enum") or [each["const"]])
    return ()
