"""NFS in a lab: one host serves a LUN's file system in versions 3 and 4, the others mount it.

The exported data is on the LUN, so it outlives the server's power cut; `start` after the next boot serves it again.
What a server must remember of its clients' locks does not: it begins with a grace period, the longer one of version 4's
and version 3's, for both.
"""

import contextlib
from collections.abc import Iterator
from typing import Self

from tests.lab import host, lun

EXPORT = "/data"
# Long enough for a client to notice, short enough for a test. Seconds.
GRACE_S = 10
START_S = 60.0

# Version 4 needs a root that is no overlay: a directory of its own in memory, with the exported one in it.
START = """\
mkdir -p /run/nfs && mount -t tmpfs root /run/nfs && mkdir /run/nfs{export}
[ "$(blkid -o value -s TYPE {disk})" = ext4 ] || mkfs.ext4 -q -F {disk}
mount {disk} /run/nfs{export}
mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
rpcbind -w
rpc.statd
echo {grace} > /proc/fs/nfsd/nfsv4gracetime
echo {grace} > /proc/fs/nfsd/nfsv4leasetime
echo {grace} > /proc/sys/fs/nfs/nlm_grace_period
printf '[exports]\\nrootdir=/run/nfs\\n' > /etc/nfs.conf
exportfs -o rw,sync,fsid=1,{root},no_subtree_check,insecure '*:{export}'
rpc.mountd
rpc.nfsd 4
"""
STOP = """\
rpc.nfsd 0
exportfs -ua
pkill -x rpc.mountd
pkill -x rpc.statd
pkill -x rpcbind
umount /run/nfs{export}
umount /run/nfs
"""
# Version 3 has locks and their recovery in daemons of their own.
CLIENT = """\
pidof rpcbind >/dev/null || rpcbind -w
pidof rpc.statd >/dev/null || rpc.statd
"""
# soft: an I/O that the server does not answer fails, and is not sent again when it comes back (trap 4).
OPTIONS = "soft,timeo=20,retrans=1,nosharecache"


class Server:
    """A context manager. The host of `disk` serves it; nobody else may use it then. `squash`: root is nobody there."""

    def __init__(self, disk: lun.Lun, *, squash: bool = False) -> None:
        self.owner = disk.owner
        self.root = "/run/nfs"  # where names of exports begin in the server itself
        self.path = f"{self.root}{EXPORT}"
        self._disk = disk
        self._root = "root_squash" if squash else "no_root_squash"

    def start(self) -> None:
        """Returns when it serves."""
        self.owner.run(["modprobe", "nfsd"])
        self.owner.sh(START.format(export=EXPORT, disk=self._disk.path, grace=GRACE_S, root=self._root), START_S)

    def export(self, name: str, number: int) -> None:
        """Serves another directory, which is there: `name` begins at the root of exports, `number` tells clients what
        file system it is."""
        options = f"rw,sync,fsid={number},{self._root},no_subtree_check,insecure"
        self.owner.run(["exportfs", "-o", options, f"*:{name}"])

    def stop(self) -> None:
        """No longer served, and the LUN is free; nothing where the host is off."""
        if self.owner.running:
            self.owner.sh(STOP.format(export=EXPORT), START_S)

    def mount(self, client: host.Host, path: str, version: str, options: str = OPTIONS) -> None:
        """`client` sees the export at `path`, which it makes; over the network `lan`."""
        client.sh(CLIENT)
        source = f"{self.owner.address('lan')}:{EXPORT}"
        client.run(["mkdir", "-p", path])
        client.run(["mount", "-t", "nfs", "-o", f"vers={version},{options}", source, path], START_S)

    @contextlib.contextmanager
    def mounted(self, client: host.Host, path: str, version: str, options: str = OPTIONS) -> Iterator[str]:
        """As `mount`; no longer after the block, also when the server is gone."""
        self.mount(client, path, version, options)
        try:
            yield path
        finally:
            if client.running:
                client.run(["umount", "--force", "--lazy", path])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
