"""Programs that a call runs. They end with the call's process group, so the call's deadline is theirs."""

import subprocess
from collections.abc import Sequence

from supervdsm import contract

# Nothing of the helper's own environment: what root runs must not depend on who started the helper.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """How the program ended and what it said. Raises `Failed` when there is no such program."""
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", env=ENVIRONMENT
        )
    except FileNotFoundError as error:
        raise contract.Failed(f"{argv[0]} is not installed") from error


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that it said, for people."""
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended with {done.returncode} and said nothing"
