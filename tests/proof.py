"""What a long run of a torture test leaves: `docs/proofs/NAME.md` with commit, seed, counts and time."""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seed() -> int:
    """SEED of the environment, to repeat a run; a fresh one otherwise."""
    return int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))


def commit() -> str:
    """What the working tree is, and whether it is more than that."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def writing(name: str, used_seed: int | None) -> Iterator[dict[str, object]]:
    """Writes the proof of what the block has put into the dictionary; nothing when the block fails. No seed:
    nothing is left to chance."""
    told: dict[str, object] = {}
    started, day, ran = time.monotonic(), time.strftime("%Y-%m-%d"), commit()
    yield told
    chance = {} if used_seed is None else {"seed": used_seed}
    facts = {"commit": ran, "day": day, **chance, "seconds": round(time.monotonic() - started), **told}
    lines = [
        f"# {name}",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
    ]
    place = ROOT / "docs" / "proofs" / f"{name}.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join([*lines, ""]))
