"""What a benchmark reports: ratios of two things measured in turn in the same run, and a table of them.

The machines are shared and noisy. Seconds mean little; the ratio of a pair measured side by side, its median over
several rounds, means something. Each row names what it was compared with and the goal.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One comparison. `ratios` has one entry for each round; `goal` is the largest ratio that is good enough."""

    what: str
    against: str
    ratios: list[float]
    goal: float | None
    figures: str  # the medians behind the ratio, with units

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "ok" if self.median <= self.goal else "MISSED"


def compare(
    what: str, against: str, ours: Callable[[], float], theirs: Callable[[], float], rounds: int, goal: float | None
) -> Row:
    """Runs both in turn, `rounds` times, each giving its cost (seconds, bytes, ...); one warm-up of each first."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratios = [mine / other for mine, other in pairs]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return Row(what, against, ratios, goal, f"{medians[0]:.4g} / {medians[1]:.4g}")


def render(rows: list[Row]) -> str:
    """The table as text: the ratio's median, its spread, the goal and whether it was reached."""
    header = ("what", "against", "median", "min", "max", "goal", "", "figures")
    lines = [header] + [
        (
            row.what,
            row.against,
            f"{row.median:.2f}",
            f"{min(row.ratios):.2f}",
            f"{max(row.ratios):.2f}",
            "" if row.goal is None else f"<= {row.goal:g}",
            row.verdict,
            row.figures,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
