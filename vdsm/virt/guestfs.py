"""virt-sysprep on a set of disks, from inside a job's worker.

libguestfs boots a small appliance (QEMU) that opens the disks. The appliance is the writer, so it gets the job's lease
descriptors through its launcher; see `jobs.worker.Context.adoption` and `leased_exec`.

Progress comes from virt-sysprep's own lines, `[  12.3] Performing "machine-id" ...`: one for each operation that it is
going to do. While it examines the guest it says nothing, and so does the progress (-1).
"""

import os
import re
from collections.abc import Callable, Sequence

from vdsm import programs
from vdsm.jobs import worker

PROGRAM = "virt-sysprep"
EXAMINE, SYSPREP = "examine", "sysprep"  # stages

# TCG needs 30 s for a small guest here, and 171 s were seen on a slow host; a guest with many files needs more for
# its logs and caches. Past this the appliance hangs.
TIMEOUT_S = 1800.0
_PERFORMING = re.compile(r"^\[ *[\d.]+\] (Performing|Setting|Installing|Uploading|Running) ")
_ENABLED = re.compile(r"^(\S+) \* ")


def operations() -> int:
    """How many operations virt-sysprep does unless told otherwise, by its own list."""
    listing = programs.run([PROGRAM, "--list-operations"], timeout_s=30)
    programs.check(listing, PROGRAM)
    return sum(1 for line in listing.stdout.decode().splitlines() if _ENABLED.match(line))


class Progress:
    """Turns virt-sysprep's lines into stages and percents of the job."""

    def __init__(self, total: int, stage: Callable[[str], None], percent: Callable[[int], None]) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._stage = stage
        self._percent = percent

    def line(self, text: str) -> None:
        """One line of output. Runs in the worker's main thread."""
        if not _PERFORMING.match(text):
            return
        if self._done == 0:
            self._stage(SYSPREP)
        self._percent(min(self._done * 100 // self._total, 100))
        self._done += 1


def sysprep(ctx: worker.Context, disks: Sequence[tuple[str, str]]) -> None:
    """Removes what makes a guest unique from `disks`, (path, format) each, all of one guest.

    The job's argument says whether KVM works here (`accelerated`) and where there is room (`scratch_dir`). The leases
    are held by the worker. Raises `ToolFailed` (no operating system found, a damaged disk, ...) or `Aborted`. Writes
    to the disks at any moment until it returns; a kill leaves them half done.
    """
    command = [PROGRAM, "--no-network"]
    for path, data_format in disks:
        command += ["--format", data_format, "-a", path]
    progress = Progress(operations(), ctx.stage, ctx.progress)
    ctx.stage(EXAMINE)
    ctx.progress(-1)
    with ctx.adoption() as adoption:
        environment = {**os.environ, **adoption, **_appliance(ctx.argument["accelerated"], ctx.argument["scratch_dir"])}
        ctx.tool(command, on_line=progress.line, env=environment, timeout_s=TIMEOUT_S)


def _appliance(accelerated: bool, scratch_dir: str) -> dict[str, str]:
    """What libguestfs needs: no libvirt in between, its caches in our scratch space, KVM only where it was proved."""
    return {
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "" if accelerated else "force_tcg",
        "LIBGUESTFS_CACHEDIR": scratch_dir,
        "TMPDIR": scratch_dir,
        "HOME": scratch_dir,
    }
