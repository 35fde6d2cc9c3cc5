"""Runs a daemon and buries its orphans.

    python3 -P -m vdsm.standalone.reaper PROGRAM [ARGUMENT...]

libvirtd's QEMU processes detach themselves, so whoever adopts them has to take note of their end, and libvirtd waits
until that is done. The first process of a container does it late (two seconds for each end of a guest, seen) or never.
Ends as PROGRAM does; SIGTERM is handed on to it.
"""

import ctypes
import os
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    daemon = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(daemon, signal.SIGTERM))
    while True:
        ended, status = os.wait()
        if ended == daemon:
            return abs(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.exit(main())
