"""How far a long run has come: kept on disk, so that it may be stopped at any time and goes on with the same code."""

import hashlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import proof
from tests.crash import verbs

STATE_DIR = proof.ROOT / "build" / "torture"


def known(name: str) -> dict[str, Any]:
    """What the runs of that name have told, with whatever code; empty when there were none."""
    found: dict[str, Any] = json.loads(_place(name).read_text()) if _place(name).exists() else {}
    return found


def _place(name: str) -> Path:
    return STATE_DIR / f"{name}.json"


def code(paths: Sequence[str]) -> str:
    """A checksum of all that a case runs, by what git calls it: of tracked and new files, as they are now."""
    listed = subprocess.run(
        ["git", "-C", str(proof.ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    total = hashlib.sha256()
    for name in sorted(set(listed.split("\0")) - {""}):
        path = proof.ROOT / name
        total.update(f"{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return total.hexdigest()


class Progress:
    """What the runs of that name have done so far with this code, on disk after each case."""

    def __init__(self, name: str, code_sum: str) -> None:
        self._place = _place(name)
        found = known(name)
        fresh: dict[str, Any] = {
            "code": code_sum,
            "seed": proof.seed(),
            "seconds": 0.0,
            "cases": {},
            "done": [],
            "wrong": {},
            "ended": False,
        }
        self.told: dict[str, Any] = found if found.get("code") == code_sum else fresh
        self.told |= {"wrong": {}, "ended": False}
        self.done = set(self.told["done"])
        self._since = time.monotonic()

    def plan(self, cases: dict[str, str], begin: str = "") -> None:
        """That these, each with its kind, are to be run of those whose names begin so."""
        others = {name: kind for name, kind in self.told["cases"].items() if not name.startswith(begin)}
        self.told["cases"] = others | cases
        self.write()

    def add(self, case: str, wrong: str | None) -> None:
        if wrong is None:
            self.done.add(case)
            self.told["done"].append(case)
        else:
            self.told["wrong"][case] = wrong
        self.write()

    def end(self) -> None:
        self.told["ended"] = True
        self.write()

    def write(self) -> None:
        now = time.monotonic()
        self.told["seconds"] += now - self._since
        self._since = now
        STATE_DIR.mkdir(parents=True, exist_ok=True)
        fresh = self._place.with_suffix(".new")
        fresh.write_text(json.dumps(self.told))
        fresh.rename(self._place)


def counted(kinds: dict[str, str]) -> dict[str, object]:
    """How many cases there were of each kind, and of each verb: steps, deaths, errnos."""
    of_kind = Counter(kinds.values())
    told: dict[str, object] = {"cases": len(kinds), **{f"steps with {kind}": of_kind[kind] for kind in sorted(of_kind)}}
    for verb in verbs.MATRIX:
        of_verb = [name for name in kinds if name.startswith(f"{verb}/")]
        steps = {name.rpartition("/")[0] for name in of_verb}
        deaths = sum(1 for name in of_verb if kinds[name].startswith("kill"))
        told[verb] = f"{len(steps)} steps, {deaths} deaths, {len(of_verb) - deaths} errors"
    return told
