"""A stack of undo steps, for work that is done in steps and must leave nothing half made.

    with undo.Stack() as steps:
        prepare(disk)
        steps.push("tear down the disk", lambda: teardown(disk))
        start(vm)

A failure inside the block runs the pushed steps, the last one first, and goes on to the caller. A step that fails is
logged and hides neither the first failure nor the steps below it. Success forgets the steps. Belongs to one thread.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from vdsm import logs

_log = logs.get("undo")


class Stack:
    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def push(self, what: str, step: Callable[[], object]) -> None:
        """Remembers how to undo what has just been done. `what` names it in the log."""
        self._steps.append((what, step))

    def clear(self) -> None:
        """Forgets all steps: what was done stays."""
        self._steps.clear()

    def unwind(self) -> None:
        """Runs all steps, the last one first. Never raises."""
        while self._steps:
            what, step = self._steps.pop()
            try:
                step()
            except Exception:  # noqa: BLE001 - one failed step must not keep the others from running
                _log.exception("cannot undo: %s", what)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        if failure is None:
            self.clear()
        else:
            self.unwind()
