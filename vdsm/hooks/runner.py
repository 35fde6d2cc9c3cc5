"""Runs the scripts of a point, one after the other.

    exit code   the script            the others        what it left in its files
    0           did its work          go on             taken
    2           failed                do not run        not taken
    others      failed                go on             not taken

Killed by a signal, killed at the deadline, files that cannot be used: failed as with 1. A script that must not be run
(`installed`) has failed too: nobody shall believe that it was asked. What failure means is the point's business: where
scripts may veto, the operation fails (`Outcome.check`), elsewhere it is told and no more.

Each script has its files in a directory of its own, which only the agent's user can enter, and which ends with it. When
the agent dies, the scripts die with it; a directory of a few KiB stays among the temporary files.
"""

import dataclasses
import os
import stat
import tempfile
import threading
import time
import xml.parsers.expat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

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
        launch_flags: int = 0,
    ) -> Outcome:
        """Runs the point's scripts in the order of their names.

        `data` gives what they find in their file, and is only asked when there are scripts. `check` looks at what each
        left, after it was seen to be XML or JSON at all. `unwanted` is asked now and then: once it says so, scripts are
        killed and no more are run. Raises what `data` raises, and nothing of its own.
        """
        scripts = installed.scripts(self._root / point.name)
        if not scripts:
            return Outcome(point, None, 0, ())
        chain = _Chain(
            point,
            data() if data is not None else "",
            check or (lambda _: None),
            lambda files: environment.build(properties or {}, vm_id, files),
            lambda: self._stopping.is_set() or unwanted(),
            launch_flags,
        )
        results = tuple(self._each(scripts, chain))
        return Outcome(point, chain.text if point.data != "none" else None, chain.flags, results)

    def _each(self, scripts: list[installed.Script], chain: "_Chain") -> Iterator[Result]:
        deadline = time.monotonic() + self._point_s
        for script in scripts:
            left_s = min(self._script_s, deadline - time.monotonic())
            late = f"the scripts before it took {self._point_s} s" if left_s <= 0 else None
            refused = script.refused or late
            if refused is not None:
                result = Result(script.name, None, 0.0, f"it is not run: {refused}", "")
            else:
                result = chain.run(script, left_s)
            _tell(chain.point, result)
            yield result
            if result.exit_code == STOP or chain.unwanted():
                return


class _Chain:
    """What goes from script to script. Each has files of its own, so that none finds what a failed one left."""

    def __init__(
        self,
        point: points.Point,
        text: str,
        check: Check,
        environment_with: Callable[[Mapping[str, Path]], dict[str, str]],
        unwanted: Callable[[], bool],
        flags: int,
    ) -> None:
        self.point, self.text, self.flags = point, text, flags
        self.unwanted = unwanted
        self._check = check
        self._environment_with = environment_with

    def run(self, script: installed.Script, timeout_s: float) -> Result:
        """How the script did; takes over what it left if it did well."""
        try:
            with tempfile.TemporaryDirectory(prefix="vdsm-hook-", ignore_cleanup_errors=True) as directory:
                files = self._write(Path(directory))
                ended = process.run(script.path, self._environment_with(files), timeout_s, self.unwanted)
                problem = _problem(ended) or self._take(files)
        except OSError as error:
            return Result(script.name, None, 0.0, f"it is not run: {error}", "")
        return Result(script.name, ended.exit_code, ended.seconds, problem, ended.stderr)

    def _write(self, directory: Path) -> dict[str, Path]:
        """{variable: file}"""
        contents: dict[str, str] = {}
        if self.point.data != "none":
            contents[VARIABLES[self.point.data]] = self.text
        if self.point.launch_flags:
            contents[FLAGS_VARIABLE] = str(self.flags)
        for variable, content in contents.items():
            (directory / variable).write_text(content, encoding="utf-8")
        return {variable: directory / variable for variable in contents}

    def _take(self, files: Mapping[str, Path]) -> str | None:
        """The reason why what the script left cannot be taken, None when it was."""
        try:
            text = self._read_data(files) if self.point.data != "none" else ""
            flags = int(_read(files[FLAGS_VARIABLE])) if self.point.launch_flags else 0
            if flags & ~self.point.launch_flags:
                raise ValueError(f"launch flags {flags}; of them only {self.point.launch_flags} means something here")
        except (ValueError, OSError) as error:
            return f"what it left is not taken: {error}"
        self.flags = flags
        if self.point.may_change:
            self.text = text
        return None

    def _read_data(self, files: Mapping[str, Path]) -> str:
        text = _read(files[VARIABLES[self.point.data]])
        if self.point.may_change:
            _PARSERS[self.point.data](text)
            self._check(text)
        return text


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
    if not isinstance(orjson.loads(text), dict):
        raise ValueError("JSON, but no object")


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
