"""Waiting for what a host of a lab must be asked: each question keeps its only processor busy."""

import time
from collections.abc import Callable

SHORTEST_S, LONGEST_S = 0.01, 1.0


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """As `tests.until`; the longer it has waited, the less often it asks."""
    began = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"not true within {timeout_s} s"
        time.sleep(min(max(waited_s / 10, SHORTEST_S), LONGEST_S))
