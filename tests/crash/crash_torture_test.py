"""The whole matrix, for an hour or two. It may be stopped at any time: the next run of the same commit goes on."""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import proof
from tests.crash import matrix, selection, verbs

NAME = "crash-localfs"
STATE = proof.ROOT / "build" / "torture" / f"{NAME}.json"


class Progress:
    """What runs of this commit have done so far, on disk after each case."""

    def __init__(self, place: Path) -> None:
        self._place = place
        commit = proof.commit()
        known = json.loads(place.read_text()) if place.exists() else {}
        fresh: dict[str, Any] = {"commit": commit, "seed": proof.seed(), "seconds": 0.0, "done": []}
        self.told: dict[str, Any] = known if known.get("commit") == commit else fresh
        self.done = set(self.told["done"])
        self._since = time.monotonic()

    def add(self, case: matrix.Case) -> None:
        self.done.add(str(case))
        self.told["done"].append(str(case))
        now = time.monotonic()
        self.told["seconds"] += now - self._since
        self._since = now
        self._place.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._place.with_suffix(".new")
        fresh.write_text(json.dumps(self.told))
        fresh.rename(self._place)


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_no_moment_of_death_loses_anything_at_all() -> None:
    progress = Progress(STATE)
    with matrix.ground() as ground, proof.writing(NAME, progress.told["seed"]) as told:
        cases = [case for verb in verbs.MATRIX for case in ground.cases(verb)]
        left = [case for case in cases if str(case) not in progress.done]
        random.Random(progress.told["seed"]).shuffle(left)
        print(f"seed {progress.told['seed']}: {len(left)} of {len(cases)} cases")
        wrong = selection.run(ground, left, progress.add)
        assert not wrong, "\n".join([f"{len(wrong)} of {len(left)} cases failed:", *wrong])
        told |= _counted(cases)
        told["seconds of all its runs"] = round(progress.told["seconds"])
        told["lost or changed bytes, images in an unnamed state, things left behind"] = 0


def _counted(cases: list[matrix.Case]) -> dict[str, object]:
    """How many cases there were of each kind, and of each verb: steps, deaths, errnos."""
    kinds = Counter(case.kind for case in cases)
    told: dict[str, object] = {"cases": len(cases), **{f"steps with {kind}": kinds[kind] for kind in sorted(kinds)}}
    for verb in verbs.MATRIX:
        of_verb = [case for case in cases if case.verb == verb]
        steps = {(case.process, case.step) for case in of_verb}
        deaths = sum(1 for case in of_verb if case.kind.startswith("kill"))
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
