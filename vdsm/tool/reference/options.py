"""docs/reference/configuration.md: every option, with the comment above it in vdsm/config.py."""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from vdsm import config
from vdsm.tool.reference import markdown

_HEAD = """\
The agent reads one TOML file, `/etc/vdsm/vdsm.toml` in production. What is not in it has the default below. An unknown
section or option, or a value of the wrong type, is an error at start."""


def page() -> str:
    parts = ["# Configuration", markdown.NOTE, _HEAD]
    defaults = config.Config()
    for section in dataclasses.fields(defaults):
        options = getattr(defaults, section.name)
        parts += [f"## {section.name}", markdown.table(("option", "default", ""), _rows(section.name, options))]
    return markdown.page(*parts)


def _rows(section: str, options: Any) -> Iterator[tuple[str, str, str]]:
    """Raises ValueError for an option without a comment: nobody else could say what it is for."""
    lines = textwrap.dedent(inspect.getsource(type(options))).splitlines()
    body = next(node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ClassDef)).body
    for node in body:
        if isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
            comment = _comment_above(lines, node.lineno)
            if not comment:
                raise ValueError(f"{section}.{name} has no comment above it in vdsm/config.py with its reason and unit")
            yield markdown.code(name), markdown.code(json.dumps(getattr(options, name))), comment


def _comment_above(lines: list[str], number: int) -> str:
    """The comment that ends above line `number`, counted from 1, as one text."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(found)
