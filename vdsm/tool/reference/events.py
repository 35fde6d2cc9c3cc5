"""docs/reference/events.md: what subscribers get."""

from collections.abc import Iterator
from typing import Any

from vdsm.client import schema
from vdsm.tool.reference import markdown

_HEAD = """\
`Host.subscribe` makes the agent send events over the same connection (Unix socket or WebSocket), as notifications
named `event`. `vdsm-client events` prints them. They come in the order of their numbers. A subscriber that comes back
tells the `instanceId` and the `sequence` that it saw last, and gets what it missed, or a marker of topic `gap` when
that is lost."""


def page(document: dict[str, Any]) -> str:
    described = document["x-events"]
    parts = ["# Events", markdown.NOTE, _HEAD, "## The notification", _fields(document, described["params"])]
    for topic in described["topics"]:
        parts += [f"## {topic['name']}", topic["summary"], _fields(document, topic["data"])]
    return markdown.page(*parts)


def _fields(document: dict[str, Any], shape: dict[str, Any]) -> str:
    return markdown.table(("field", "type", ""), _rows(document, shape))


def _rows(document: dict[str, Any], shape: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for field in schema.fields_within(document, shape):
        yield markdown.code(field.name), field.kind, field.description
