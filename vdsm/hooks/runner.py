"""Runs the scripts of a point, one after the other.

    exit code   the script            the others        what it left in its files
    0           did its work          go on             taken
    2           failed                do not run        not taken
    others      failed                go on             not taken

Killed by a signal, killed at the deadline, files that cannot be used: failed as with 1. A script that must not be run
(`installed`) has failed too: nobody shall believe that it was asked. What failure means is the point's business: where
scripts may veto, the operation fails (`Outcome.check`), elsewhere it is told and no more.

The files are in a directory of this run's own, which only the agent's user can enter, and which ends with the run. When
the agent dies, the scripts die with it; a directory of a few KiB stays among the temporary files.
"""

import dataclasses
import json
import os
import stat
import tempfile
import threading
import time
import xml.parsers.expat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vdsm import config, errors, logs
from vdsm.hooks import environment, installed, points, process

_log = logs.get("hooks")

STOP = 2  # the exit code
# What scripts may leave in their files. The XML of a domain with 24 disks takes 20 KiB.
MAX_DATA_BYTES = 4 << 20
VARIABLES = {"domxml": "_hook_domxml", "json": "_hook_json"}
FLAGS_VARIABLE = "_hook_launchflags"

Check = Callable[[str], object]
"""Looks at what a script left. Raises ValueError with the reason why it cannot be taken."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How one script ended. `problem` is None when it did its work; `exit_code` None when it has none of its own."""

    script: str
    exit_code: int | None
    seconds: float
    problem: str | None
    stderr: str

    def to_dict(self) -> dict[str, Any]:
        """For events: names of one word, the same on the wire."""
        return {
            "script": self.script,
            "exit": self.exit_code,
            "seconds": round(self.seconds, 3),
            "problem": self.problem,
            "stderr": self.stderr,
        }


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a point came to. `data` is what to go on with, None at points without data and where no script is."""

    point: points.Point
    data: str | None
    launch_flags: int
    results: tuple[Result, ...]

    def check(self) -> None:
        """Raises `HookFailed`, naming the first script that failed, if the point's scripts may veto."""
        failed = [result for result in self.results if result.problem is not None]
        if failed and self.point.may_veto:
            first = failed[0]
            raise errors.HookFailed(
                point=self.point.name,
                script=first.script,
                reason=_reason(first),
                exit_code=first.exit_code,
                stderr=first.stderr,
            )


class Runner:
    """All scripts of this host. `run` blocks, bounded by the deadlines, and may be called from any thread."""

    def __init__(self, settings: config.Hooks) -> None:
        self._root = Path(settings.dir)
        self._script_s = settings.script_deadline_s
        self._point_s = settings.point_deadline_s
        self._stopping = threading.Event()

    def start(self) -> None:
        """The agent starts: runs that point's scripts."""
        for name in installed.strangers(self._root):
            _log.warning("scripts in %s never run: no point has this name", self._root / name)
        self.run(points.BEFORE_VDSM_START)

    def cancel(self) -> None:
        """The agent stops: kills what runs; what would run later is refused."""
        self._stopping.set()

    def stop(self) -> None:
        """The agent has stopped: runs that point's scripts, the last of all."""
        self._stopping.clear()
        self.run(points.AFTER_VDSM_STOP)

    def has(self, point: points.Point) -> bool:
        """Whether the point has scripts now."""
        return bool(installed.scripts(self._root / point.name))

    def report(self) -> dict[str, dict[str, dict[str, Any]]]:
        """See `installed.report`."""
        return installed.report(self._root)

    def run(
        self,
        point: points.Point,
        data: Callable[[], str] | None = None,
        *,
        vm_id: str = "",
        properties: Mapping[str, str] | None = None,
        check: Check | None = None,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Runs the point's scripts in the order of their names.

        `data` gives what they find in their file, and is only asked when there are scripts. `check` looks at what each
        left, after it was seen to be XML or JSON at all. `unwanted` is asked now and then: once it says so, scripts are
        killed and no more are run. Raises what `data` raises, and `HookFailed` when scripts cannot be run at all.
        """
        scripts = installed.scripts(self._root / point.name)
        if not scripts:
            return Outcome(point, None, 0, ())
        text = data() if data is not None else ""
        try:
            with tempfile.TemporaryDirectory(prefix="vdsm-hook-") as directory:
                files = _Files(Path(directory), point, text, check)
                env = environment.build(properties or {}, vm_id, files.by_variable)
                results = tuple(self._each(scripts, files, env, unwanted))
        except OSError as error:
            raise errors.HookFailed(point=point.name, script="", reason=f"cannot be run: {error}") from error
        for result in results:
            _tell(point, result)
        return Outcome(point, files.text if point.data != "none" else None, files.flags, results)

    def _each(
        self, scripts: list[installed.Script], files: "_Files", env: Mapping[str, str], unwanted: Callable[[], bool]
    ) -> Iterator[Result]:
        def stops() -> bool:
            return self._stopping.is_set() or unwanted()

        deadline = time.monotonic() + self._point_s
        for script in scripts:
            left_s = min(self._script_s, deadline - time.monotonic())
            if script.refused is not None:
                yield Result(script.name, None, 0.0, f"it is not run: {script.refused}", "")
                continue
            if left_s <= 0:
                yield Result(script.name, None, 0.0, f"it is not run: the scripts before it took {self._point_s} s", "")
                continue
            result = files.judge(script, process.run(script.path, env, left_s, stops))
            yield result
            if result.exit_code == STOP or stops():
                return


class _Files:
    """What scripts read and write: put back after each that failed, so that the next one finds something usable."""

    def __init__(self, directory: Path, point: points.Point, text: str, check: Check | None) -> None:
        self.text, self.flags = text, 0
        self._point = point
        self._check = check
        self._data = directory / point.data
        self._flags = directory / "launchflags"
        self.by_variable = {}
        if point.data != "none":
            self.by_variable[VARIABLES[point.data]] = self._data
        if point.launch_flags:
            self.by_variable[FLAGS_VARIABLE] = self._flags
        self._put()

    def judge(self, script: installed.Script, ended: process.Ended) -> Result:
        """How the script did; takes over what it left if it did well."""
        problem = _problem(ended)
        if problem is None:
            try:
                self._take()
            except (ValueError, OSError) as error:
                problem = f"what it left is not taken: {error}"
        if problem is not None:
            self._put()
        return Result(script.name, ended.exit_code, ended.seconds, problem, ended.stderr)

    def _take(self) -> None:
        if self._point.data != "none":
            text = _read(self._data)
            _PARSERS[self._point.data](text)
            if self._check is not None:
                self._check(text)
        if self._point.launch_flags:
            self.flags = int(_read(self._flags))
        if self._point.data != "none" and self._point.may_change:
            self.text = text

    def _put(self) -> None:
        contents = {self._data: self.text, self._flags: str(self.flags)}
        for path in self.by_variable.values():
            path.unlink(missing_ok=True)
            path.write_text(contents[path], encoding="utf-8")


def _read(path: Path) -> str:
    """A regular file, not the end of a link that leads anywhere, and not more than one wants to parse."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("its file is no regular file any more")
        content = file.read(MAX_DATA_BYTES + 1)
    if len(content) > MAX_DATA_BYTES:
        raise ValueError(f"more than {MAX_DATA_BYTES} bytes")
    return content.decode("utf-8")


def _parse_xml(text: str) -> None:
    """Raises ValueError unless it is XML in UTF-8 without a document type: none means no entities, own or external."""

    def doctype(*_: object) -> None:
        raise ValueError("XML with a document type")

    def declaration(_: str, encoding: str | None, __: int) -> None:
        if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii"):
            raise ValueError(f"XML in {encoding}; it must be UTF-8")

    parser = xml.parsers.expat.ParserCreate("utf-8")
    parser.StartDoctypeDeclHandler = doctype
    parser.XmlDeclHandler = declaration
    try:
        parser.Parse(text.encode(), True)
    except xml.parsers.expat.ExpatError as error:
        raise ValueError(f"broken XML: {error}") from error


def _parse_json(text: str) -> None:
    """Raises ValueError unless it is a JSON object."""
    try:
        if not isinstance(json.loads(text), dict):
            raise ValueError("JSON, but no object")
    except RecursionError as error:
        raise ValueError("JSON nested too deep") from error


_PARSERS: Mapping[str, Check] = {"domxml": _parse_xml, "json": _parse_json}


def _problem(ended: process.Ended) -> str | None:
    if ended.why:
        return f"killed after {ended.seconds:.1f} s: {ended.why}"
    assert ended.exit_code is not None
    if ended.exit_code < 0:
        return f"ended by signal {-ended.exit_code}"
    return f"exit code {ended.exit_code}" if ended.exit_code else None


def _reason(result: Result) -> str:
    """The problem, with the last line the script said."""
    said = result.stderr.splitlines()
    return f"{result.problem}: {said[-1]}" if said else str(result.problem)


def _tell(point: points.Point, result: Result) -> None:
    said = " | ".join(result.stderr.splitlines())
    if result.problem is None:
        _log.info("%s/%s: %.2f s %s", point.name, result.script, result.seconds, said)
    else:
        _log.warning("%s/%s failed: %s; it said: %s", point.name, result.script, result.problem, said)
