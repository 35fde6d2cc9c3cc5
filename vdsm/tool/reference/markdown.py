"""Pieces of Markdown."""

from collections.abc import Iterable, Sequence

NOTE = "Made from the code by `make docs`; what is changed here by hand is lost.\n"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Nothing without rows."""
    lines = [f"| {' | '.join(cell(each) for each in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *lines])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    return f"`{text}`"


def page(*parts: str) -> str:
    """The parts with an empty line between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
