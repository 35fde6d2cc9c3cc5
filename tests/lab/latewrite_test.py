"""Trap 4: a host loses its NFS server, its writer is killed, its lease passes on, and the cable comes back.

By sanlock and mounts alone, with the root helper's options: what is shown is the kernel's doing.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator

import pytest

from supervdsm import mounts
from tests import lab
from tests.lab import blocks, nfs
from tests.lab.waiting import until

IO_TIMEOUT_S = "1"
PLACE = "/run/late"
LOCKSPACE = "LATE:{number}:/run/late/safe/leases:0"
LEASE = "LATE:lease:/run/late/safe/leases:1048576"
# sanlock gives a dead host's lease away after 8 x io_timeout + 60 s.
TAKEOVER_S = 200.0
# By then the kernel's connections have tried again, or never will; the one of version 4 does within 15 s.
WATCHED_S, LEAST_S = 120.0, 45.0
SAFE = ",".join(f"{name}={value}" if value else name for name, value in mounts.OPTIONS.items())
# The name of each mount is that of the file that is written through it. Of version 3 the options do not save what the
# connection holds: for that there is the check of io_timeout.
MOUNTS = {"safe": ("4.2", SAFE), "hard": ("4.1", "hard"), "three": ("3", f"{SAFE},nolock")}

# Writes its letter again and again until it is killed.
WRITER = """\
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
page.write(b"y" * 4096)
while True:
    try:
        os.pwrite(fd, page, 0)
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.fixture
def server(one: lab.Host, two: lab.Host) -> Iterator[nfs.Server]:
    """Both hosts have its export, and are in a lockspace there."""
    served = nfs.Server(one.luns[2], squash=True)
    served.start()
    names = " ".join(MOUNTS)
    one.sh(f"cd {served.path}; truncate -s 2M leases; for name in {names}; do head -c 4096 /dev/zero > $name; done")
    one.sh(f"cd {served.path}; chown vdsm:kvm leases {names}; chmod 660 leases {names}; chmod 755 .")
    served.mount(one, f"{PLACE}/safe", *MOUNTS["safe"])
    for name, (version, options) in MOUNTS.items():
        served.mount(two, f"{PLACE}/{name}", version, options)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lab.Host.start_sanlock, (one, two)))
        one.run(["sanlock", "client", "init", "-s", LOCKSPACE.format(number=0), "-o", IO_TIMEOUT_S])
        one.run(["sanlock", "client", "init", "-r", LEASE])
        list(pool.map(join, (one, two)))
    yield served
    with contextlib.suppress(lab.HostError):
        two.restore("lan")
    for host in (one, two):
        host.renew()  # the quickest way out of a lockspace


def join(host: lab.Host) -> None:
    lockspace = LOCKSPACE.format(number=host.number)
    host.run(["sanlock", "client", "add_lockspace", "-s", lockspace, "-o", IO_TIMEOUT_S], 90)


def write(host: lab.Host, name: str, *, leased: bool) -> None:
    """Starts a writer, as a user whom the server does not squash; returns when it has written."""
    writer = f"/usr/bin/python3 /root/writer.py {PLACE}/{name}/{name}"
    command = f"sanlock client command -r {LEASE} -c {writer}" if leased else writer
    user = "setpriv --reuid vdsm --regid vdsm --groups kvm --"
    host.sh(f"{user} {command} > /tmp/{name} 2>&1 & echo $! > /tmp/{name}.pid")
    until(lambda: "written" in host.run(["tail", "-n1", f"/tmp/{name}"]).out, 60)


def ended(host: lab.Host, name: str) -> bool:
    return host.sh(f"kill -0 $(cat /tmp/{name}.pid)", check=False).code != 0


def take(host: lab.Host) -> bool:
    """Whether it could have the lease, for a moment."""
    command = ["sanlock", "client", "command", "-r", LEASE, "-c", "/bin/echo", "mine"]
    return "mine" in host.run(command, TAKEOVER_S, check=False).out


@pytest.mark.timeout(900)
def test_a_late_write_does_not_arrive_after_a_takeover(one: lab.Host, two: lab.Host, server: nfs.Server) -> None:
    """Through the other two mounts it does arrive: that is what would be lost."""
    two.sh("chmod 755 /root")
    two.run(["sh", "-c", "cat > /root/writer.py"], given=WRITER)
    for name in MOUNTS:
        write(two, name, leased=name == "safe")
    two.cut("lan")
    until(lambda: ended(two, "safe"), 120)  # sanlock has killed it
    two.sh("kill -KILL $(cat /tmp/hard.pid) $(cat /tmp/three.pid)")
    until(lambda: take(one), TAKEOVER_S)
    for name in MOUNTS:
        blocks.write(one, f"{server.path}/{name}", "z")
    two.restore("lan")
    began = time.monotonic()
    late: set[str] = set()
    while (watched_s := time.monotonic() - began) < WATCHED_S and (watched_s < LEAST_S or len(late) < 2):
        late |= {name for name in MOUNTS if blocks.read(one, f"{server.path}/{name}") == "y"}
    assert late == {"hard", "three"}
