"""docs/reference/errors.md: every error, by what the caller can do about it."""

import inspect
from collections.abc import Iterator
from typing import Any

from vdsm import errors
from vdsm.client import exits, failures, schema
from vdsm.tool.reference import markdown

_HEAD = """\
A failed call, and a failed job, carries an error:

    {"code": 10041, "message": "Image 7... is in use by VM web-1",
     "data": {"key": "image_in_use", "facts": {"imageId": "7...", "holder": "VM web-1"}, "state": "optimized",
              "hint": "Wait for the holder to end, or end it."}}

`code` and `key` are stable: numbers are upstream VDSM's where the meaning is, otherwise from 10000, and are never used
again for something else. `facts` are what the words in braces below stand for. `state` is the condition that the thing
is in now, or null. `hint` is the next thing to do. `vdsm-client explain KEY` (or the code) shows an entry of this page.

The sections are the branches of the tree of errors: they say what the caller can do. *Exit* is the exit code of
`vdsm-client`, as [its page](../vdsm-client.md) lists them."""


def page(document: dict[str, Any]) -> str:
    raised = _raised(document)
    parts = ["# Errors", markdown.NOTE, _HEAD]
    for branch in errors.VdsmError.__subclasses__():
        kinds = [kind for kind in errors.VdsmError.by_key.values() if kind.branch() is branch]
        parts += [f"## {branch.__name__}", inspect.getdoc(branch) or ""]
        for kind in sorted(kinds, key=lambda kind: kind.key):
            parts += _entry(kind, raised.get(kind.key, []))
    return markdown.page(*parts, "## Of the client", *_of_the_client())


def _entry(kind: type[errors.VdsmError], verbs: list[str]) -> Iterator[str]:
    message, hint = kind.templates()
    code = exits.of(failures.ClientError(kind.code, "", {"key": kind.key}))
    links = ", ".join(f"[{name}](verbs.md#{name.replace('.', '').lower()})" for name in verbs)
    facts = ", ".join(map(markdown.code, kind.fact_names())) or "none"
    yield f"### {kind.key}"
    yield f"{kind.code}: {message}"
    yield inspect.cleandoc(kind.__doc__ or "")
    yield f"- hint: {hint}\n- facts: {facts}\n- exit: {code}\n- answered by: {links or 'any verb, or a job'}"


def _raised(document: dict[str, Any]) -> dict[str, list[str]]:
    """The verbs that name an error among theirs. Those that all verbs name are left out."""
    methods = schema.methods(document)
    found: dict[str, list[str]] = {}
    for name, method in methods.items():
        for error in method["errors"]:
            found.setdefault(schema.resolved(document, error)["data"]["key"], []).append(name)
    return {key: names for key, names in found.items() if len(names) < len(methods)}


def _of_the_client() -> Iterator[str]:
    yield "What `vdsm-client` says by itself when no agent answered. Their code is 0."
    rows = [
        (kind.key_of_class, inspect.getdoc(kind) or "", kind.hint, str(exits.of(kind("")))) for kind in failures.LOCAL
    ]
    yield markdown.table(("key", "", "hint", "exit"), rows)
