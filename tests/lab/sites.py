"""Two hosts whose agents share repositories on NFS, and have directories of their own. The server, on the first one's
host, squashes root: all that is done there is done by users who are somebody there."""

import concurrent.futures
from typing import Any

from tests import lab
from tests.lab import nfs, peers

NFS, LOCALFS = "nfs-3.4", "localfs-1.0"
# Of version 3 the kernel's connection outlives 180 s of silence, and so must the leases: see `formats/nfs.py`.
IO_TIMEOUT_S = {"4.2": 2, "3": 22}

DISK = """\
mkfs.ext4 -q -F {disk}
mount {disk} /run/vdsm/import
for name in export storage; do
    mkdir /run/vdsm/import/$name
    chown --reference /run/vdsm/$name /run/vdsm/import/$name
    mount --bind /run/vdsm/import/$name /run/vdsm/$name
done
"""


def own_disk(host: lab.Host, path: str) -> None:
    """The agent's files are on this disk of the host's own, which it loses: what is in memory has no direct I/O."""
    host.sh(DISK.format(disk=path), 60)


class Site:
    """Both agents and the server, which is on the first one's host. Nothing is started or made twice."""

    def __init__(self, hosts: list[lab.Host]) -> None:
        self.hosts = hosts
        self.one, self.two = (peers.Peer(host) for host in hosts)
        self.server = nfs.Server(hosts[0].luns[2], squash=True)
        self.address = hosts[0].address("lan")

    def start(self) -> None:
        """Returns when the server serves, both agents answer, and each host has a disk of its own below their files."""
        if self.hosts[0].run(["mountpoint", "-q", self.server.path], check=False).code != 0:
            self.server.start()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lab.Host.start_agent, self.hosts))
        for host in self.hosts:
            if host.run(["mountpoint", "-q", "/run/vdsm/import"], check=False).code != 0:
                own_disk(host, host.luns[host.number - 1].path)

    def directory(self, name: str) -> str:
        """An empty exported directory as an admin prepares one; its name on the server."""
        path = self.place(name)
        self.hosts[0].run(["install", "-d", "-o", "vdsm", "-g", "kvm", "-m", "2770", path])
        return path

    def place(self, name: str) -> str:
        """Where an exported directory is on the server: below EXPORT or, with a slash before its name, beside it."""
        return f"{self.server.root}{name}" if name.startswith("/") else f"{self.server.path}/{name}"

    def parameters(self, name: str, version: str) -> dict[str, Any]:
        export = name if name.startswith("/") else f"{nfs.EXPORT}/{name}"
        connection = {"connection": f"{self.address}:{export}", "protocol_version": version}
        return {"repoFormat": NFS, "connectionParameters": connection}

    def connect(self, name: str, version: str, export: str = "") -> None:
        """The repository of that name, on both hosts; made when there is none. `export`: the directory, when its name
        is another one."""
        given = self.parameters(export or name, version)
        if self.hosts[0].run(["test", "-d", self.place(export or name)], check=False).code != 0:
            self.directory(export or name)
            self.one("formatStorageRepository", **given, options={"ioTimeout": IO_TIMEOUT_S[version]})
        for peer in (self.one, self.two):
            peer("connectStorageRepository", repoId=name, **given)
        for peer in (self.one, self.two):
            peer.joined(name)

    def connect_local(self, name: str, path: str) -> None:
        """The repository of that name in a directory of the first host; made when there is none."""
        given = {"repoFormat": LOCALFS, "connectionParameters": {"path": path}}
        if self.hosts[0].run(["test", "-d", path], check=False).code != 0:
            self.one("formatStorageRepository", **given, options={"ioTimeout": 1})
        self.one("connectStorageRepository", repoId=name, **given)
        self.one.joined(name)
