"""The whole matrix, for an hour or two. It may be stopped at any time: the next run of the same code goes on.

Its cases are dealt out to `SHARES` tests, which may run at the same time (`pytest -n`). The one that ends last writes
the proof. What went wrong is in build/torture at once, with the command that repeats it.
"""

import hashlib
import json
import random
import subprocess
import time
import zlib
from collections import Counter
from typing import Any

import pytest

from tests import proof
from tests.crash import matrix, selection, verbs

NAME = "crash-localfs"
SHARES = 3
# The cases call storage and jobs as the wire's verbs do, without the wire.
CODE = ("vdsm", "tests/crash", *(f":!vdsm/{above}" for above in ("api", "client", "hooks", "standalone", "tool")))
STATE_DIR = proof.ROOT / "build" / "torture"


def code() -> str:
    """A checksum of all that a case runs: of tracked and new files, as they are now."""
    listed = subprocess.run(
        ["git", "-C", str(proof.ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *CODE],
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
    """What the runs of one share have done so far with this code, on disk after each case."""

    def __init__(self, share: int, code_sum: str) -> None:
        self.place = STATE_DIR / f"{NAME}-{share}.json"
        known = json.loads(self.place.read_text()) if self.place.exists() else {}
        fresh: dict[str, Any] = {
            "code": code_sum,
            "seed": proof.seed(),
            "seconds": 0.0,
            "cases": {},
            "done": [],
            "wrong": {},
            "ended": False,
        }
        self.told: dict[str, Any] = known if known.get("code") == code_sum else fresh
        self.told |= {"wrong": {}, "ended": False}
        self.done = set(self.told["done"])
        self._since = time.monotonic()

    def plan(self, cases: list[matrix.Case]) -> None:
        self.told["cases"] = {str(case): case.kind for case in cases}
        self.write()

    def add(self, case: matrix.Case, wrong: str | None) -> None:
        if wrong is None:
            self.done.add(str(case))
            self.told["done"].append(str(case))
        else:
            self.told["wrong"][str(case)] = wrong
        self.write()

    def end(self) -> None:
        self.told["ended"] = True
        self.write()

    def write(self) -> None:
        now = time.monotonic()
        self.told["seconds"] += now - self._since
        self._since = now
        STATE_DIR.mkdir(parents=True, exist_ok=True)
        fresh = self.place.with_suffix(".new")
        fresh.write_text(json.dumps(self.told))
        fresh.rename(self.place)


@pytest.mark.torture
@pytest.mark.timeout(0)
@pytest.mark.parametrize("share", range(SHARES))
def test_no_moment_of_death_loses_anything_at_all(share: int) -> None:
    code_sum = code()
    progress = Progress(share, code_sum)
    with matrix.ground() as ground:
        every = [case for verb in verbs.MATRIX for case in ground.cases(verb)]
        ours = [case for case in every if zlib.crc32(str(case).encode()) % SHARES == share]
        progress.plan(ours)
        left = [case for case in ours if str(case) not in progress.done]
        random.Random(progress.told["seed"]).shuffle(left)
        print(f"seed {progress.told['seed']}: {len(left)} of {len(ours)} cases of share {share}")
        wrong = selection.run(ground, left, progress.add)
    assert not wrong, "\n".join([f"{len(wrong)} of {len(left)} cases failed:", *wrong])
    progress.end()
    _write_proof(code_sum)


def _write_proof(code_sum: str) -> None:
    """Once each share has come to its end with this code."""
    places = [STATE_DIR / f"{NAME}-{share}.json" for share in range(SHARES)]
    shares = [json.loads(place.read_text()) for place in places if place.exists()]
    if len(shares) < SHARES or any(share["code"] != code_sum or not share["ended"] for share in shares):
        return
    kinds = {name: kind for share in shares for name, kind in share["cases"].items()}
    with proof.writing(NAME, None) as told:
        told["seeds"] = ", ".join(str(share["seed"]) for share in shares)
        told |= _counted(kinds)
        told["seconds"] = ", ".join(f"{share['seconds']:.0f}" for share in shares) + ": each share, all its runs"
        told["lost or changed bytes, images in an unnamed state, things left behind"] = 0


def _counted(kinds: dict[str, str]) -> dict[str, object]:
    """How many cases there were of each kind, and of each verb: steps, deaths, errnos."""
    of_kind = Counter(kinds.values())
    told: dict[str, object] = {"cases": len(kinds), **{f"steps with {kind}": of_kind[kind] for kind in sorted(of_kind)}}
    for verb in verbs.MATRIX:
        of_verb = [name for name in kinds if name.startswith(f"{verb}/")]
        steps = {name.rpartition("/")[0] for name in of_verb}
        deaths = sum(1 for name in of_verb if kinds[name].startswith("kill"))
        told[verb] = f"{len(steps)} steps, {deaths} deaths, {len(of_verb) - deaths} errors"
    return told


@pytest.mark.torture
@pytest.mark.guest
@pytest.mark.timeout(0)
@pytest.mark.parametrize("write", [5, 6], ids=["before virt-sysprep", "while it changes the guest"])
def test_real_sysprep_that_is_killed_leaves_the_guest_as_it_was(write: int) -> None:
    """Writes of the VM's record: the fifth says that virt-sysprep is going to look at the guest, the sixth that it has
    begun to change it."""
    with matrix.ground(real_tools=True) as ground:
        assert not ground.run_before(selection.named(f"sysprep-real/sysprep-1/pwritev2#{write}/kill"))
