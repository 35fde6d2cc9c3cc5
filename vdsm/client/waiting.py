"""Following a job to its end, with its progress on standard error: a bar on a terminal, else a line per change."""

from __future__ import annotations

import sys
import time

from vdsm.client import failures, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vdsm.client import transport

ENDED = ("done", "failed", "aborted")

# How often the bar moves. The end of the job is not waited for by it: `Job.wait` answers then.
_STEP_S = 0.5
_BAR_CELLS = 30


def follow(client: transport.Client, job_id: str, timeout_s: float | None) -> dict[str, Any]:
    """The job's info once it has ended. Raises `NoAnswer` when it has not after `timeout_s`, and `ClientError`."""
    began = time.monotonic()
    view = _Bar() if sys.stderr.isatty() else _Log()
    try:
        while True:
            params = {"jobId": job_id, "timeout": _STEP_S}
            info: dict[str, Any] = client.call("Job.wait", params, _STEP_S + client.timeout_s)
            elapsed = time.monotonic() - began
            view.show(info, elapsed)
            if info["status"] in ENDED:
                return info
            if timeout_s is not None and elapsed >= timeout_s:
                raise failures.NoAnswer(f"Job {job_id} has not ended after {timeout_s:g} s; it goes on")
    finally:
        view.end()


class _Log:
    """One line when the status, the stage or the tens of the percentage change: for files and logs of CI."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()

    def show(self, info: dict[str, Any], elapsed_s: float) -> None:
        percent = _percent(info)
        now = (info["status"], info.get("stage"), info.get("stageName"), percent and percent // 10)
        if now != self._last:
            self._last = now
            output.note("  ".join(filter(None, (_clock(elapsed_s), _share(percent), _where(info)))))

    def end(self) -> None:
        pass


class _Bar:
    """One line of a terminal, written over again."""

    def show(self, info: dict[str, Any], elapsed_s: float) -> None:
        percent = _percent(info)
        if percent is None:
            # Nothing is known: a mark that wanders says that we still hear of the job.
            cells = " " * (int(elapsed_s / _STEP_S) % _BAR_CELLS) + "#"
        else:
            cells = "#" * (percent * _BAR_CELLS // 100)
        line = f"[{cells:<{_BAR_CELLS}}] {_share(percent):>5}  {_clock(elapsed_s)}  {_where(info)}"
        width = output.terminal_width(sys.stderr) or 0
        sys.stderr.write(f"\r{line[: width - 1]}\x1b[K")
        sys.stderr.flush()

    def end(self) -> None:
        sys.stderr.write("\n")
        sys.stderr.flush()


def _where(info: dict[str, Any]) -> str:
    parts = [str(info["status"])]
    if info.get("stages"):
        parts.append(f"stage {info.get('stage')}/{info['stages']}")
    parts += [str(info[name]) for name in ("stageName", "detail") if info.get(name)]
    return output.plain("  ".join(parts))


def _percent(info: dict[str, Any]) -> int | None:
    """None when the job cannot tell: the wire's -1 or null."""
    progress = info.get("progress")
    return min(int(progress), 100) if isinstance(progress, (int, float)) and progress >= 0 else None


def _share(percent: int | None) -> str:
    return "" if percent is None else f"{percent} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
