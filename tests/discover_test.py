"""The OpenRPC document says what the verbs do: every reference leads somewhere, every schema is one, and they agree."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.sample_verbs import World
from vdsm import errors
from vdsm.api import discover, dispatch


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """As it comes over the wire."""
    world = World()
    world.verbs.add("rpc", discover.Discovery(world.verbs))
    made: dict[str, Any] = json.loads(dispatch.encode(discover.Discovery(world.verbs).discover()))
    world.close()
    return made


@pytest.fixture(scope="module")
def methods(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in document["methods"]}


def test_the_frame(document: dict[str, Any]) -> None:
    assert document["openrpc"].startswith("1.3.")
    assert document["info"].keys() >= {"title", "version"}
    assert document.keys() == {"openrpc", "info", "methods", "components"}


def test_every_verb_is_there_once_by_name(document: dict[str, Any]) -> None:
    names = [method["name"] for method in document["methods"]]
    assert names == sorted(set(names))
    assert {"Spec.subtract", "Sample.typed", "Sample.failInPool", "rpc.discover"} <= set(names)


def test_parameters_stand_in_positional_order_by_their_wire_names(methods: dict[str, dict[str, Any]]) -> None:
    params = methods["Sample.typed"]["params"]
    assert [one["name"] for one in params] == ["vmID", "count", "force", "ratio", "disks"]
    assert [one["required"] for one in params] == [True, False, False, False, False]
    assert methods["Sample.typed"]["paramStructure"] == "either"
    assert methods["Spec.get_data"]["params"] == []


def test_results(methods: dict[str, dict[str, Any]]) -> None:
    assert methods["Spec.subtract"]["result"] == {"name": "result", "schema": {"type": "integer"}}
    assert methods["Sample.bulk"]["result"]["schema"]["items"] == {"type": "integer"}
    assert methods["Sample.typed"]["result"]["schema"] == {"$ref": "#/components/schemas/TypedResult"}


def test_roles_aliases_and_errors(methods: dict[str, dict[str, Any]]) -> None:
    assert methods["Sample.rule"]["x-role"] == "admin"
    assert methods["Spec.subtract"]["x-aliases"] == ["Spec.minus"]
    named = {error["$ref"].rsplit("/", 1)[-1] for error in methods["Sample.blocking"]["errors"]}
    assert named == {"no_such_vm", "invalid_parameters", "forbidden", "internal_error", "stopping"}


def test_words_come_from_the_docstring(methods: dict[str, dict[str, Any]]) -> None:
    assert methods["Sample.blocking"]["summary"] == "Runs in the general pool."
    assert "summary" not in methods["Sample.bulk"]


def test_errors_are_described(document: dict[str, Any]) -> None:
    described = document["components"]["errors"]["no_such_vm"]
    kind = errors.NoSuchVm
    assert described == {"code": kind.code, "message": kind.message, "data": {"key": kind.key, "hint": kind.hint}}


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_leads_somewhere_and_everything_is_referred_to(document: dict[str, Any]) -> None:
    found = set(references(document))
    kept = {f"#/components/{kind}/{name}" for kind, of in document["components"].items() for name in of}
    assert found == kept


def test_every_schema_is_one(document: dict[str, Any]) -> None:
    schemas = list(document["components"]["schemas"].values())
    for method in document["methods"]:
        schemas += [method["result"]["schema"], *(one["schema"] for one in method["params"])]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ([{"imageId": "a", "readOnly": True}], True),
        ([{"imageId": "a"}], True),
        ([{"image_id": "a"}], False),
        ([{"imageId": "a", "more": 1}], False),
    ],
    ids=["whole", "defaults", "snake-case", "unknown"],
)
def test_schemas_say_what_the_validator_does(
    document: dict[str, Any], methods: dict[str, dict[str, Any]], value: Any, fits: bool
) -> None:
    world = World()
    entry = world.verbs.by_name["Sample.typed"]
    schema = methods["Sample.typed"]["params"][4]["schema"] | {"components": document["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == fits
    try:
        entry.validate({"vmID": "x", "disks": value})
    except ValueError:
        assert not fits
    else:
        assert fits
