"""`rpc.discover`: the OpenRPC document, made from the verbs' own models.

https://spec.open-rpc.org, version 1.3. Every schema stands once under components/schemas and every error under
components/errors. OpenRPC has no word for these, so they are extensions:

    x-role      of a method: the role that it needs
    x-aliases   of a method: its older names
    x-events    what a subscriber gets: the notification, and the schema of its data for each topic
"""

import inspect
from typing import Any

import orjson
import pydantic
from pydantic.json_schema import JsonSchemaMode

from vdsm import errors
from vdsm.api import shapes, verb

_OPENRPC = "1.3.2"
# Of the verbs on the wire. What old clients do not notice raises the second number, what breaks them the first.
VERSION = "0.1.0"
_SCHEMAS = "#/components/schemas/"
# What any verb may answer besides its own errors.
_COMMON: tuple[type[errors.VdsmError], ...] = (
    errors.InvalidParameters,
    errors.Forbidden,
    errors.Unexpected,
    errors.Stopping,
)

_ByVerb = dict[str, dict[str, Any]]
_Wanted = list[tuple[tuple[str, str], JsonSchemaMode, pydantic.TypeAdapter[Any]]]


class Discovery:
    """The namespace `rpc`. The document is made at the first call, when all verbs are known; that takes a moment."""

    def __init__(self, verbs: verb.Verbs) -> None:
        self._verbs = verbs
        self._encoded: orjson.Fragment | None = None

    @verb.verb(role="monitor", result=dict[str, Any])
    def discover(self) -> orjson.Fragment:
        """The OpenRPC document of this agent."""
        if self._encoded is None:
            self._encoded = orjson.Fragment(orjson.dumps(document(self._verbs)))
        return self._encoded


def document(verbs: verb.Verbs) -> dict[str, Any]:
    """The OpenRPC document of all verbs, by name."""
    entries = sorted(verbs.entries, key=lambda entry: entry.name)
    params, results, topics, schemas = _schemas(entries)
    methods = [_method(entry, params[entry.name], results[entry.name], schemas) for entry in entries]
    used = {kind for entry in entries for kind in (*entry.errors, *_COMMON)}
    return {
        "openrpc": _OPENRPC,
        "info": {
            "title": "vdsm",
            "version": VERSION,
            "description": "The agent of one host: virtual machines, storage repositories and host jobs.",
        },
        "methods": methods,
        "x-events": _events(topics),
        "components": {
            "schemas": schemas,
            "errors": {kind.key: _error(kind) for kind in sorted(used, key=lambda kind: kind.key)},
        },
    }


def _schemas(entries: list[verb.Entry]) -> tuple[_ByVerb, _ByVerb, _ByVerb, _ByVerb]:
    """The schemas of each verb's parameter model and result, of each topic's data, and those that they refer to."""
    models: dict[str, type[verb.Result]] = {"": shapes.Event, **shapes.MODELS}
    wanted: _Wanted = [
        ((name, "event"), "serialization", pydantic.TypeAdapter(model)) for name, model in models.items()
    ]
    for entry in entries:
        wanted.append(((entry.name, "params"), "validation", pydantic.TypeAdapter(entry.params)))
        wanted.append(((entry.name, "result"), "serialization", pydantic.TypeAdapter(entry.result)))
    made, shared = pydantic.TypeAdapter.json_schemas(wanted, by_alias=True, ref_template=_SCHEMAS + "{model}")
    schemas: _ByVerb = shared.get("$defs", {})
    # A parameter model is no type of the wire: its fields are the verb's parameters. Only what is inside them stays.
    tops = {entry.name: _resolved(made[(entry.name, "params"), "validation"], schemas) for entry in entries}
    for entry in entries:
        reference = made[(entry.name, "params"), "validation"].get("$ref")
        if reference is not None:
            schemas.pop(reference.removeprefix(_SCHEMAS), None)
    results = {entry.name: made[(entry.name, "result"), "serialization"] for entry in entries}
    topics = {name: schema for ((name, kind), _), schema in made.items() if kind == "event"}
    return tops, results, topics, schemas


def _resolved(schema: dict[str, Any], schemas: _ByVerb) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schemas[reference.removeprefix(_SCHEMAS)] if reference is not None else schema


def _method(entry: verb.Entry, params: dict[str, Any], result: dict[str, Any], schemas: _ByVerb) -> dict[str, Any]:
    summary, _, description = entry.doc.partition("\n")
    required = params.get("required", [])
    method = {
        "name": entry.name,
        "summary": summary,
        "description": description.strip(),
        "paramStructure": "either",
        "params": [_parameter(name, params["properties"][name], name in required, schemas) for name in entry.fields],
        "result": {"name": "result", "schema": result},
        "errors": [{"$ref": f"#/components/errors/{kind.key}"} for kind in (*entry.errors, *_COMMON)],
        "x-role": entry.role.name.lower(),
        "x-aliases": list(entry.aliases),
    }
    return {key: value for key, value in method.items() if value != ""}


def _parameter(name: str, schema: dict[str, Any], required: bool, schemas: _ByVerb) -> dict[str, Any]:
    """A parameter without words of its own has those of its type."""
    description = schema.get("description") or _resolved(schema, schemas).get("description", "")
    return {"name": name, "description": description, "required": required, "schema": schema}


def _error(kind: type[errors.VdsmError]) -> dict[str, Any]:
    """An error object; its message and its hint are templates over the facts, whose names are listed."""
    message, hint = kind.templates()
    data = {
        "key": kind.key,
        "branch": kind.branch().__name__,
        "meaning": inspect.getdoc(kind.branch()),
        "facts": list(kind.fact_names()),
        "hint": hint,
    }
    return {"code": kind.code, "message": message, "data": data}


def _events(topics: _ByVerb) -> dict[str, Any]:
    return {
        "subscribe": "Host.subscribe",
        "notification": "event",
        "params": topics[""],
        "topics": [
            {"name": name, "summary": inspect.getdoc(model), "data": topics[name]}
            for name, model in shapes.MODELS.items()
        ],
    }
