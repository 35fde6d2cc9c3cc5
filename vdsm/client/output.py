"""What people and scripts read: results on standard output, failures on standard error.

JSON has sorted keys and 4 spaces; a null result prints nothing. Text that comes from the agent may have been chosen by
a guest or a stranger: control characters are spelled out, so that no escape sequence reaches a terminal.
"""

from __future__ import annotations

import json
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from vdsm.client import failures

# What JSON leaves as it is: DEL and the C1 controls, which some terminals obey.
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}


def result(value: Any, output_format: str | None, columns: Sequence[str] = ()) -> None:
    """Prints what a verb answered. `columns` of a table: which, and in what order; all without."""
    if value is not None:
        line("\n".join(table(value, columns)) if output_format == "table" else pretty(value))


def line(text: str) -> None:
    """Print `text` now: who reads a pipe wants each event when it comes."""
    print(text, flush=True)


def pretty(value: Any) -> str:
    return _json(value, 4)


def compact(value: Any) -> str:
    return _json(value, None)


def _json(value: Any, indent: int | None) -> str:
    unicode = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=not unicode)
    return text.translate(_CONTROLS)


def failure(error: failures.ClientError, output_format: str | None) -> None:
    """A failed call: message, then state, hint, facts, code and the request's id; the error object for `-o json`."""
    if output_format == "json":
        note(json.dumps(error.to_wire(), indent=4, sort_keys=True))
        return
    facts = error.data.get("facts")
    code = f"{error.code} ({error.key})" if error.key else error.code
    details = {
        "state": error.data.get("state"),
        "hint": error.data.get("hint"),
        **(facts if isinstance(facts, dict) else {}),
        "code": code if error.code else None,
        "request": error.request_id,
    }
    note(f"vdsm-client: {plain(error.message)}")
    for name, value in details.items():
        if value is not None:
            note(f"    {plain(name)}: {_cell(value)}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(value: Any, columns: Sequence[str] = ()) -> Iterator[str]:
    """Lines: a list of objects has a heading and aligned columns, an object a line for each member."""
    if isinstance(value, dict) and value and all(isinstance(member, dict) for member in value.values()):
        value = [member if "id" in member else {"": name} | member for name, member in value.items()]
    if isinstance(value, dict):
        yield from _aligned([[plain(name), _cell(member)] for name, member in value.items()])
    elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = columns or list(dict.fromkeys(name for row in value for name in row))
        cells = [[_cell(row.get(name)) for name in columns] for row in value]
        yield from _aligned([[plain(name) for name in columns], *cells])
    else:
        yield from map(_cell, value if isinstance(value, list) else [value])


def plain(text: str) -> str:
    """`text` on one line, without control characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
