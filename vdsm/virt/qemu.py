"""Finding QEMU processes. libvirt does not tell their pids; their command lines do.

Anybody may start a process with such a command line: it is believed only as far as its leases go.
"""

from pathlib import Path


def find(vm_id: str) -> int | None:
    """The pid of the process that runs the VM, None when there is none."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return next((pid for pid in pids if runs(pid, vm_id)), None)


def runs(pid: int, vm_id: str) -> bool:
    """Whether the process `pid` is the QEMU of that VM."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"-uuid" in words and words[words.index(b"-uuid") + 1 :][:1] == [vm_id.encode()]
