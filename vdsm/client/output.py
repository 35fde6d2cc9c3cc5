"""What people and scripts read: results on standard output, failures on standard error.

JSON has sorted keys and 4 spaces; a null result prints nothing. Text that comes from the agent may have been chosen by
a guest or a stranger: control characters are spelled out, so that no escape sequence reaches a terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TextIO

    from vdsm.client import failures

# What JSON leaves as it is: DEL and the C1 controls, which some terminals obey.
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}

# Members of answers that are seconds since 1970.
_TIMES = ("created", "started", "ended", "time", "statusSince")
_BETWEEN = "  "
_NARROWEST = 8
_USUAL_WIDTH = 80


def result(value: Any, output_format: str | None, columns: Sequence[str] = ()) -> None:
    """Prints what a verb answered. `columns` of a table: which, and in what order; all without."""
    if value is not None:
        as_table = output_format == "table"
        line("\n".join(table(value, columns, terminal_width(sys.stdout))) if as_table else pretty(value))


def line(text: str) -> None:
    """Print `text` now: who reads a pipe wants each event when it comes."""
    print(text, flush=True)


def pretty(value: Any) -> str:
    return _json(value, 4)


def compact(value: Any) -> str:
    return _json(value, None)


def _json(value: Any, indent: int | None) -> str:
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=not _speaks_unicode())
    return text.translate(_CONTROLS)


def _speaks_unicode() -> bool:
    return (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")


def failure(error: failures.ClientError, output_format: str | None) -> None:
    """A failed call: message, then state, hint, facts, code and the request's id; the error object for `-o json`."""
    if output_format == "json":
        note(json.dumps(error.to_wire(), indent=4, sort_keys=True))
        return
    facts = error.data.get("facts")
    code = f"{error.code} ({error.key})" if error.key else error.code
    details = {
        "state": error.data.get("state"),
        "did you mean": " or ".join(error.near) or None,
        "hint": error.data.get("hint"),
        **(facts if isinstance(facts, dict) else {}),
        "code": code if error.code else None,
        "request": error.request_id,
    }
    note(f"vdsm-client: {plain(error.message)}")
    for name, value in details.items():
        if value is not None:
            note(f"    {plain(name)}: {_cell('', value)}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(value: Any, columns: Sequence[str] = (), width: int | None = None) -> Iterator[str]:
    """Lines: a list of objects has a heading and aligned columns, an object a line for each member.

    Sizes and times are spelt for people. `width` is what a line of the terminal holds: long cells of a list are cut;
    those of a single object are not.
    """
    if isinstance(value, dict) and value and all(isinstance(member, dict) for member in value.values()):
        value = [member if "id" in member else {"": name} | member for name, member in value.items()]
    if isinstance(value, dict):
        yield from _aligned([[plain(name), _cell(name, member)] for name, member in value.items()], None)
    elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = columns or list(dict.fromkeys(name for row in value for name in row))
        cells = [[_cell(name, row.get(name)) for name in columns] for row in value]
        yield from _aligned([[plain(name) for name in columns], *cells], width)
    else:
        yield from (_cell("", item) for item in (value if isinstance(value, list) else [value]))


def terminal_width(stream: TextIO) -> int | None:
    """Characters in a line of the terminal that `stream` is; None when it is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_WIDTH
    except OSError:
        return _USUAL_WIDTH


def plain(text: str) -> str:
    """`text` on one line, without control characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if name == "size" or name.endswith(("Size", "Bytes")):
            from vdsm import sizes  # only tables need it

            return sizes.human(value)
        if name in _TIMES:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _aligned(rows: list[list[str]], width: int | None) -> Iterator[str]:
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        widths = _narrowed(widths, width - len(_BETWEEN) * (len(widths) - 1))
    for row in rows:
        yield _BETWEEN.join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _narrowed(widths: list[int], room: int) -> list[int]:
    """The widest columns give way, as far as they can."""
    widths = list(widths)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def _padded(cell: str, width: int) -> str:
    if _width(cell) > width:
        while _width(cell) > width - 1:
            cell = cell[:-1]
        cell += "…" if _speaks_unicode() else "~"
    return cell + " " * (width - _width(cell))


def _width(text: str) -> int:
    """Of a terminal's cells: some characters take two of them, some none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
