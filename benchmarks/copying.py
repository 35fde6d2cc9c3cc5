"""copyImage of a full raw disk, request to done, against the bare tools on the same file system.

Per round each once: the job (record, worker, leases, measure, convert, flush, final record), qemu-img with the same
options, and dd. The bare tools flush nothing; the job does. VDSM_BENCH_COPY_MIB changes the size (2048).
"""

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import table
from tests import sanlock_fixture, storage_fixture
from vdsm.storage.rules import models

MIB = 1 << 20
SIZE_BYTES = int(os.environ.get("VDSM_BENCH_COPY_MIB", "2048")) * MIB


def rows(rounds: int) -> list[table.Row]:
    with _service() as service:
        bench = _Bench(service)
        timed = [bench.job, bench.qemu_img, bench.dd]
        for once in timed:
            once()  # not counted
        costs = [[once() for once in timed] for _ in range(rounds)]
    job, bare, dd = zip(*costs, strict=True)
    what, against = f"copyImage of {SIZE_BYTES // MIB} MiB raw, request to done", "dd bs=1M iflag=direct oflag=direct"
    return [
        _row(what, "qemu-img convert -W -m 16 -t none -T none, falloc", job, bare, 1.05),
        _row(what, against, job, dd, 0.77),
        _row("that qemu-img", against, bare, dd, None),  # what the storage gives to more than one writer
    ]


def _row(what: str, against: str, ours: tuple[float, ...], theirs: tuple[float, ...], goal: float | None) -> table.Row:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    figures = f"{statistics.median(ours):.2f} s / {statistics.median(theirs):.2f} s"
    return table.Row(what, against, ratios, goal, figures)


@contextlib.contextmanager
def _service() -> Iterator[storage_fixture.Service]:
    with sanlock_fixture.running() as daemon, tempfile.TemporaryDirectory(prefix="vdsm-bench-") as directory:
        world = storage_fixture.World(Path(directory), daemon.run_dir)
        with storage_fixture.Service(world).running() as running:
            yield running


class _Bench:
    def __init__(self, service: storage_fixture.Service) -> None:
        self._service = service
        options = {"strategy": models.PERFORMANCE}
        self._source = service.storage.create_virtual_disk("main", SIZE_BYTES, options=options)["image_id"]
        self._path = service.storage.plan_disk(self._source, "main", False).path
        self._copy = service.world.directory / "copy"
        _fill(self._path)

    def job(self) -> float:
        began = time.perf_counter()
        copy = self._service.storage.copy_image("other", self._source, options={"strategy": models.PERFORMANCE})
        self._service.ended(copy["job_id"])
        took_s = time.perf_counter() - began
        self._service.storage.remove_image("other", copy["image_id"])
        return took_s

    def qemu_img(self) -> float:
        fast = ["-W", "-m", "16", "-t", "none", "-T", "none", "-o", "preallocation=falloc"]
        return self._timed(["qemu-img", "convert", "-f", "raw", "-O", "raw", *fast, self._path, str(self._copy)])

    def dd(self) -> float:
        direct = ["bs=1M", "iflag=direct", "oflag=direct", "status=none"]
        return self._timed(["dd", f"if={self._path}", f"of={self._copy}", *direct])

    def _timed(self, argv: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run(argv, check=True)
        took_s = time.perf_counter() - began
        self._copy.unlink()
        return took_s


def _fill(path: str) -> None:
    """No zeros: those would not be copied."""
    block = os.urandom(MIB)
    with Path(path).open("r+b") as source:
        for _ in range(SIZE_BYTES // MIB):
            source.write(block)
        os.fsync(source.fileno())
