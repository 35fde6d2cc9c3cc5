"""What tests do with the hosts of a lab before and after: disks for files, and a new beginning."""

from tests import lab


def mount(host: lab.Host, path: str) -> None:
    """A file system of this host's own over the directory, whose owner stays: what is in memory has no direct I/O."""
    disk = host.luns[host.number - 1].path
    host.sh(f"owner=$(stat -c %u:%g {path}); mkfs.ext4 -q -F {disk}; mount {disk} {path}; chown $owner {path}")


def renew(*hosts: lab.Host) -> None:
    """All are booted anew: the quickest way out of everything. In this thread, with which they would end."""
    for host in hosts:
        host.kill()
        host.start()
    for host in hosts:
        host.wait()
