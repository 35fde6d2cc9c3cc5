"""docs/vdsm-client.md does what it says: its examples are run, its tables are compared with the code."""

import os
import re
import subprocess
from pathlib import Path

from tests import conftest
from vdsm import standalone
from vdsm.client import arguments, exits

MANUAL = (Path(__file__).resolve().parent.parent / "docs" / "vdsm-client.md").read_text()
END = "-- end of what an example prints --"


def examples() -> list[tuple[str, str]]:
    """(command, what it prints) of all console blocks, in their order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", MANUAL, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            matched = re.match(r"([^\n]*\\\n)*[^\n]*\n", part)
            assert matched is not None, part
            command = matched[0]
            found.append((command.rstrip(), part.removeprefix(command)))
    return found


def as_said(expected: str, printed: str) -> bool:
    """Whether it is what the manual says; "..." stands for anything, on a line of its own also for nothing."""
    lines = expected.splitlines(keepends=True)
    pattern = "".join(
        "(?:.*\n)*" if line == "...\n" else re.escape(line).replace(re.escape("..."), ".*") for line in lines
    )
    return re.fullmatch(pattern, printed) is not None


def test_the_examples(stack: standalone.Stack, repo: str, images: conftest.Images, tmp_path: Path) -> None:
    images.made += re.findall(r"options\.imageId=(\S+)", MANUAL)  # removed by an example; also when one fails
    script = "exec 2>&1\n"
    for command, _ in examples():
        script += f"(exit $status)\n{command}\nstatus=$?\nprintf '%s\\n' '{END}'\n"
    environment = {**os.environ, "PATH": f"{stack.place.client.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=100, cwd=tmp_path, env=environment
    )
    printed = done.stdout.split(f"{END}\n")
    assert len(printed) == len(examples()) + 1, done.stdout
    for (command, expected), output in zip(examples(), printed, strict=False):
        assert as_said(expected, output), f"$ {command}\n{output}\nThe manual says:\n{expected}"


def test_the_comparison_sees_differences() -> None:
    said = '{\n    "created": ...,\n...\n    "size": 5\n}\n'
    assert as_said(said, '{\n    "created": 7,\n    "kind": "disk",\n    "size": 5\n}\n')
    assert as_said(said, '{\n    "created": 7,\n    "size": 5\n}\n')
    assert not as_said(said, '{\n    "created": 7,\n    "size": 6\n}\n')
    assert not as_said(said, '{\n    "created": 7,\n    "size": 5\n}\nmore\n')
    assert not as_said("", "more\n")


def test_the_exit_codes() -> None:
    table = MANUAL.partition("## Exit codes")[2].partition("##")[0]
    assert {
        int(code): text for code, text in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)
    } == exits.MEANING


def test_the_options() -> None:
    table = MANUAL.partition("## Options")[2].partition("##")[0]
    told = set(re.findall(r"`--?([a-z-]+)", table))
    short = set(arguments.SHORT_OPTIONS) - {":"}
    assert told == {name.rstrip("=") for name in arguments.LONG_OPTIONS} | short
