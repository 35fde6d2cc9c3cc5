"""Whether QEMU can use KVM here: found out by booting something.

That /dev/kvm exists and answers says little. Inside some virtual machines it does, and a guest under it hangs without
an error, or crawls: the boot below took 6 to 9 s there, and 0.13 s under TCG. So QEMU boots a sector of 512 bytes that
does nothing but end QEMU with an exit code of its own.
"""

import os
import threading

from vdsm import errors, logs, programs

_log = logs.get("virt.domaintype")

# Under a KVM that is good for something the boot takes 0.2 s.
PROBE_S = 2.0
EXIT_PORT = 0xF4
EXIT_VALUE = 0x2A
# QEMU's isa-debug-exit ends it with (value << 1) | 1.
EXIT_CODE = EXIT_VALUE << 1 | 1
BOOT_SECTOR = bytes([0xB0, EXIT_VALUE, 0xE6, EXIT_PORT, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"  # mov al; out; hlt


class DomainType:
    """The `type` of our domains: "kvm" or "qemu". Asked for by any thread, found out once."""

    def __init__(self, emulator: str, configured: str = "auto") -> None:
        self._emulator = emulator
        self._known = None if configured == "auto" else configured
        self._lock = threading.Lock()

    def get(self) -> str:
        """The type; the first call takes up to `PROBE_S`."""
        with self._lock:
            if self._known is None:
                self._known = "kvm" if boots(self._emulator, "kvm", PROBE_S) else "qemu"
                _log.info("domains are of type %s", self._known)
            return self._known


def boots(emulator: str, accelerator: str, timeout_s: float) -> bool:
    """Whether a guest really runs under that accelerator within `timeout_s`."""
    sector = os.memfd_create("boot-sector")
    try:
        os.write(sector, BOOT_SECTOR)
        command = [emulator, "-machine", "pc", "-accel", accelerator, "-m", "16", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-boot", "c"]
        command += ["-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=0x04"]
        command += ["-drive", f"file=/proc/self/fd/{sector},format=raw,if=ide"]
        ended = programs.run(command, timeout_s=timeout_s, pass_fds=[sector])
    except errors.DeadlinePassed:
        _log.info("a guest under %s did not run within %s s", accelerator, timeout_s)
        return False
    finally:
        os.close(sector)
    if ended.exit_code != EXIT_CODE:
        _log.info(
            "QEMU under %s ended with %s: %s", accelerator, ended.exit_code, ended.stderr.decode(errors="replace")
        )
    return ended.exit_code == EXIT_CODE
