"""The whole matrix, for an hour or two. It may be stopped at any time: the next run of the same code goes on.

Its cases are dealt out to `SHARES` tests, which may run at the same time (`pytest -n`). The one that ends last writes
the proof. What went wrong is in build/torture at once, with the command that repeats it.
"""

import random
import zlib

import pytest

from tests import proof
from tests.crash import matrix, progress, selection, verbs

NAME = "crash-localfs"
SHARES = 3
# The cases call storage and jobs as the wire's verbs do, without the wire.
CODE = ("vdsm", "tests/crash", *(f":!vdsm/{above}" for above in ("api", "client", "hooks", "standalone", "tool")))


@pytest.mark.torture
@pytest.mark.timeout(0)
@pytest.mark.parametrize("share", range(SHARES))
def test_no_moment_of_death_loses_anything_at_all(share: int) -> None:
    code_sum = progress.code(CODE)
    kept = progress.Progress(_name(share), code_sum)
    with matrix.ground() as ground:
        every = [case for verb in verbs.MATRIX for case in ground.cases(verb)]
        ours = [case for case in every if zlib.crc32(str(case).encode()) % SHARES == share]
        kept.plan({str(case): case.kind for case in ours})
        left = [case for case in ours if str(case) not in kept.done]
        random.Random(kept.told["seed"]).shuffle(left)
        print(f"seed {kept.told['seed']}: {len(left)} of {len(ours)} cases of share {share}")
        wrong = selection.run(ground, left, lambda case, wrong: kept.add(str(case), wrong))
    assert not wrong, "\n".join([f"{len(wrong)} of {len(left)} cases failed:", *wrong])
    kept.end()
    _write_proof(code_sum)


def _name(share: int) -> str:
    return f"{NAME}-{share}"


def _write_proof(code_sum: str) -> None:
    """Once each share has come to its end with this code."""
    shares = [known for share in range(SHARES) if (known := progress.known(_name(share)))]
    if len(shares) < SHARES or any(share["code"] != code_sum or not share["ended"] for share in shares):
        return
    kinds = {name: kind for share in shares for name, kind in share["cases"].items()}
    with proof.writing(NAME, None) as told:
        told["seeds"] = ", ".join(str(share["seed"]) for share in shares)
        told |= progress.counted(kinds)
        told["seconds"] = ", ".join(f"{share['seconds']:.0f}" for share in shares) + ": each share, all its runs"
        told["lost or changed bytes, images in an unnamed state, things left behind"] = 0


@pytest.mark.torture
@pytest.mark.guest
@pytest.mark.timeout(0)
@pytest.mark.parametrize("write", [5, 6], ids=["before virt-sysprep", "while it changes the guest"])
def test_real_sysprep_that_is_killed_leaves_the_guest_as_it_was(write: int) -> None:
    """Writes of the VM's record: the fifth says that virt-sysprep is going to look at the guest, the sixth that it has
    begun to change it."""
    with matrix.ground(real_tools=True) as ground:
        assert not ground.run_before(selection.named(f"sysprep-real/sysprep-1/pwritev2#{write}/kill"))
