"""Every verb, killed at each of its steps on one host; the other host checks and fixes. One of them, another with each
commit (CRASH_OFFSET chooses); with the mark `torture` all, until they are done or CRASH_SECONDS have passed."""

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import lab, proof
from tests.crash import progress, selection, verbs
from tests.lab import crash

NAME = "crash-shared"
CODE = ("vdsm", "supervdsm", "tests/crash", "tests/lab/crash.py", ":!vdsm/client", ":!vdsm/tool")
# What the repositories lie on, and how the proof calls it.
GROUNDS = {"4.2": "NFS 4.2", crash.CLVM: "clvm-1.2", "3": "NFS 3"}
FEW = 2
# A run of the torture takes so many new cases of each verb, and ends after so long, for the sake of what it tells.
EACH, RUN_S, LEAST_S = 3, 600, 30


@pytest.fixture(scope="module")
def site(the_lab: lab.Lab) -> Iterator[crash.Site]:
    made = crash.Site(the_lab)
    made.start()
    yield made
    for host in the_lab.hosts:
        host.renew()


@pytest.mark.timeout(600)
def test_what_one_host_leaves_the_other_one_mends(site: crash.Site) -> None:
    start, every = selection.offset(), crash.verbs_on("4.2")
    verb = every[start % len(every)]
    told = site.run([verb], "4.2", 500, each=FEW, seed=start)
    met = [one for one in told if "case" in one]
    print(f"CRASH_OFFSET={start}: {len(met)} cases of {verb}")
    assert met and "failed" not in told[-1], told
    assert not [one for one in met if one["wrong"]], "\n".join(one["wrong"] for one in met if one["wrong"])


@pytest.mark.skipif("CRASH_CASE" not in os.environ, reason="CRASH_CASE=VERB/PROCESS/STEP/KIND names a case to repeat")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("on", GROUNDS)
def test_case_again(site: crash.Site, on: str) -> None:
    case = os.environ["CRASH_CASE"]
    if case.split("/")[0] not in crash.verbs_on(on):
        pytest.skip("on volumes only the verbs of ON_VOLUMES are run so far: a case takes minutes there")
    told = site.run([case.split("/")[0]], on, 800, named=(case,))
    assert [one["wrong"] for one in told if "case" in one] == [None], told


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_no_moment_of_death_loses_anything_between_hosts(site: crash.Site) -> None:
    """Those verbs first of which the fewest cases have been run. It may be stopped; the next run goes on."""
    kept = progress.Progress(NAME, progress.code(CODE))
    before = len(_met(kept))
    end = time.monotonic() + float(os.environ.get("CRASH_SECONDS", "inf"))
    while (grounds := [on for on in GROUNDS if _left(kept, on)]) and time.monotonic() < end:
        for on in grounds:
            done = [name.removeprefix(f"{on}/") for name in _met(kept) if name.startswith(f"{on}/")]
            seconds = max(min(RUN_S, (end - time.monotonic()) / len(grounds)), LEAST_S)
            given = {"each": EACH, "seed": kept.told["seed"], "done": done, "seconds": seconds}
            _keep(kept, on, site.run(_left(kept, on), on, RUN_S + 600, **given))
    if not any(_left(kept, on) for on in GROUNDS):
        kept.end()
    assert len(_met(kept)) > before or kept.told["ended"], "no case was run"
    _write_proof(kept.told)
    assert not kept.told["wrong"], "\n".join(kept.told["wrong"].values())


def _met(kept: progress.Progress) -> set[str]:
    return {*kept.done, *kept.told["wrong"]}


def _left(kept: progress.Progress, on: str) -> list[str]:
    """Verbs with cases that were not run yet, as far as is known; those with the fewest that were come first."""
    met, found = _met(kept), []
    for verb in random.Random(kept.told["seed"]).sample(crash.verbs_on(on), len(crash.verbs_on(on))):
        begin = f"{on}/{verb}/"
        cases = {name for name in kept.told["cases"] if name.startswith(begin)}
        if not cases or cases - met:
            found.append((len(cases & met), verb))
    return [verb for _, verb in sorted(found, key=lambda one: one[0])]


def _keep(kept: progress.Progress, on: str, told: list[dict[str, Any]]) -> None:
    for one in told:
        if "cases" in one:
            cases = {f"{on}/{case}": kind for case, kind in one["cases"].items()}
            kept.plan(cases, f"{on}/{one['verb']}/")
        elif "case" in one:
            kept.add(f"{on}/{one['case']}", one["wrong"])
    assert "failed" not in told[-1], told[-1]


def _write_proof(told: dict[str, Any]) -> None:
    """Of what was run, be it all or a part, which it says."""
    done = {name: told["cases"][name] for name in told["done"] if name in told["cases"]}
    with proof.writing(NAME, told["seed"]) as facts:
        facts["seconds"] = f"{told['seconds']:.0f}: all runs"
        for on, called in GROUNDS.items():
            begin, every = f"{on}/", crash.verbs_on(on)
            ours = {name.removeprefix(begin): kind for name, kind in done.items() if name.startswith(begin)}
            known = sum(1 for name in told["cases"] if name.startswith(begin))
            met = {name.split("/")[0] for name in ours}
            share = "all" if told["ended"] else "a part"
            facts[called] = (
                f"{share}: {len(ours)} cases of {len(met)} of {len(every)} verbs; {known} cases were seen so far"
            )
            counted = progress.counted(ours).items()
            facts |= {f"{called}: {name}": count for name, count in counted if name not in {*verbs.MATRIX} - met}
        facts["verbs that are run on clvm-1.2"] = ", ".join(crash.verbs_on(crash.CLVM))
        facts["cases in which bytes were lost or changed, a state had no name, or something was left behind"] = len(
            told["wrong"]
        )
