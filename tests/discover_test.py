"""The OpenRPC document says what the verbs do: every reference leads somewhere, every schema is one, and they agree."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing.jsonschema

from tests.sample_verbs import World
from vdsm import errors, events
from vdsm.api import discover, dispatch
from vdsm.client import transport
from vdsm.tool import reference

OFFICIAL = Path(__file__).resolve().parent / "data" / "openrpc"


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
    assert document.keys() == {"openrpc", "info", "methods", "x-events", "components"}


def official() -> jsonschema.Draft7Validator:
    """Of OpenRPC documents, as tests/data/openrpc/README.md tells."""
    texts = [(OFFICIAL / name).read_text() for name in ("openrpc-1.3.json", "json-schema.json")]
    openrpc, json_schema = (referencing.jsonschema.DRAFT7.create_resource(json.loads(text)) for text in texts)
    # The address in the schema's own $id ends with a slash; what refers to it has none.
    registry = referencing.Registry().with_resources(
        [("https://meta.json-schema.tools", json_schema), ("https://meta.json-schema.tools/", json_schema)]
    )
    return jsonschema.Draft7Validator(openrpc.contents, registry=registry)


def test_it_is_what_openrpc_says(document: dict[str, Any], agents_document: dict[str, Any]) -> None:
    for made in (document, agents_document):
        assert [f"{error.json_path}: {error.message}" for error in official().iter_errors(made)] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made["methods"][0].update(role="admin"),
        lambda made: made["methods"][0]["params"].append({"name": "x"}),
        lambda made: made["components"]["errors"]["forbidden"].update(key="forbidden"),
        lambda made: made["components"]["schemas"]["TypedResult"].update(type="text"),
    ],
    ids=["word of our own", "parameter without schema", "member of an error", "no JSON schema"],
)
def test_the_official_schema_sees_mistakes(document: dict[str, Any], spoil: Callable[[Any], None]) -> None:
    spoiled = copy.deepcopy(document)
    spoil(spoiled)
    assert not official().is_valid(spoiled)


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
    assert described == {
        "code": 1,
        "message": "There is no VM {vmId} on this host",
        "data": {
            "key": "no_such_vm",
            "branch": "Missing",
            "meaning": "The thing is not there.",
            "facts": ["vmId"],
            "hint": errors.NoSuchVm.hint,
        },
    }


def test_events_are_described(document: dict[str, Any]) -> None:
    described = document["x-events"]
    assert (described["subscribe"], described["notification"]) == ("Host.subscribe", "event")
    topics = {topic["name"]: topic for topic in described["topics"]}
    assert topics.keys() == {*events.TOPICS, "gap"}
    assert topics["job"]["data"] == {"$ref": "#/components/schemas/JobEvent"}
    schemas = document["components"]["schemas"]
    assert schemas["Event"]["properties"].keys() >= {"instanceId", "sequence", "topic", "subject", "time", "data"}
    assert all(topic["summary"] for topic in topics.values())


# -- the agent's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def agents_document() -> dict[str, Any]:
    return reference.document()


def test_a_running_agent_serves_what_the_reference_is_made_from(
    agent: transport.Client, agents_document: dict[str, Any]
) -> None:
    served = agent.call("rpc.discover")
    assert official().is_valid(served)
    for made in (served, agents_document):
        for method in made["methods"]:
            method["params"] = [(param["name"], param["required"], param["description"]) for param in method["params"]]
            del method["result"]  # its schema is the library's business
    assert served["methods"] == agents_document["methods"]
    assert served["components"]["errors"] == agents_document["components"]["errors"]
    assert served["x-events"] == agents_document["x-events"]


def test_the_agents_document_holds_together(agents_document: dict[str, Any]) -> None:
    test_every_reference_leads_somewhere_and_everything_is_referred_to(agents_document)
    test_every_schema_is_one(agents_document)


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
