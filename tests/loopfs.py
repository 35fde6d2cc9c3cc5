"""A small file system of a test's own, on a loop device: to be filled, and to be frozen."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(size_bytes: int, inside: Sequence[str] = (), place: Path | None = None) -> Iterator[Path]:
    """An empty ext4, at `place` if given. Unmounted at the end, thawed before if need be; skips where loop mounts are
    impossible. `inside` are the words that run a command in another mount namespace."""
    if os.geteuid() != 0:
        pytest.skip("loop mounts need root")
    with tempfile.TemporaryDirectory(prefix="vdsm-loopfs-") as directory:
        image, place = Path(directory, "image"), place or Path(directory, "mounted")
        place.mkdir()
        with image.open("wb") as made:
            made.truncate(size_bytes)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        mount = subprocess.run(
            [*inside, "mount", "-n", "-o", "loop", image, place], capture_output=True, text=True, check=False
        )
        if mount.returncode != 0:
            pytest.skip(f"no loop mounts here: {mount.stderr.strip()}")
        try:
            yield place
        finally:
            subprocess.run([*inside, "fsfreeze", "-u", place], capture_output=True, check=False)
            subprocess.run([*inside, "umount", "-n", "-l", place], check=True)


def freeze(place: Path, inside: Sequence[str] = ()) -> None:
    """From now on a writer waits in D state, which no signal ends."""
    subprocess.run([*inside, "fsfreeze", "-f", place], check=True)


def thaw(place: Path, inside: Sequence[str] = ()) -> None:
    subprocess.run([*inside, "fsfreeze", "-u", place], check=True)


def fill(place: Path) -> None:
    """Leaves no space at all."""
    with (place / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        for size_bytes in (1 << 20, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(size_bytes))
                    os.fsync(ballast.fileno())


@contextlib.contextmanager
def filled(place: Path, free_bytes: int) -> Iterator[None]:
    """Inside the block no more than `free_bytes` are free."""
    left, ballast = place / "left", place / "ballast"
    with left.open("wb") as kept:
        if free_bytes:
            os.posix_fallocate(kept.fileno(), 0, free_bytes)
    try:
        fill(place)
        left.unlink()
        yield
    finally:
        left.unlink(missing_ok=True)
        ballast.unlink()


def unreserve(place: Path) -> None:
    """What is free is free for everybody: nothing is kept back for root."""
    found = subprocess.run(["findmnt", "-no", "SOURCE", place], check=True, capture_output=True, text=True)
    subprocess.run(["tune2fs", "-m", "0", found.stdout.strip()], check=True, capture_output=True)
