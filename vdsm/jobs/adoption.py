"""Hands a worker's lease descriptors to a process that closed everything it inherited: libguestfs's appliance."""

import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from vdsm import leases

ANSWER_TIMEOUT_S = 5.0  # for one asker; they are answered one after the other

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


@contextlib.contextmanager
def offered(fds: Sequence[int]) -> Iterator[dict[str, str]]:
    """Inside the block each process of this user that asks gets copies of `fds`; yields the environment that tells it.

    `LIBGUESTFS_HV` names our launcher, which asks at `VDSM_LEASE_SOCKET` and then becomes QEMU. The address is in the
    kernel's abstract namespace: a killed worker leaves no file behind.
    """
    name = f"vdsm-lease-{os.getpid()}-{secrets.token_hex(8)}"
    launcher = Path(leases.__file__).with_name("leased_exec.py")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        server = threading.Thread(target=_serve, args=(listener, list(fds)), name="adoption", daemon=True)
        server.start()
        try:
            yield {"LIBGUESTFS_HV": str(launcher), "VDSM_LEASE_SOCKET": f"@{name}"}
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()


def _serve(listener: socket.socket, fds: list[int]) -> None:
    while True:
        try:
            asker, _ = listener.accept()
        except OSError:
            return  # shut down
        with asker, contextlib.suppress(OSError):
            asker.settimeout(ANSWER_TIMEOUT_S)
            _, uid, _ = _CREDENTIALS.unpack(asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if uid == os.getuid() and asker.recv(1):
                socket.send_fds(asker, [b"!"], fds)
