"""The formats on file systems: every verb of storage, on sectors of 512 and of 4096 bytes. One of each kind in
each run; the others, which take a minute each, are among the long tests."""

import pytest

from tests import lab
from tests.lab import peers, sites, verbs

# A disk of the server, or of the first host, whose sectors have 4096 bytes: a loop device on a file.
DISK = """\
modprobe loop
truncate -s 160M {file}
mkdir -p {place}
disk=$(losetup --find --show --sector-size 4096 --direct-io=on {file})
mkfs.ext4 -q -F $disk
mount $disk {place}
"""
HEADER = "from vdsm import record; print(record.read(record.Slot('', '', '{path}', 0))['sector_bytes'])"
EXPORT = "/large"
FSID = 2
LONG = pytest.mark.torture


def large_sectors(host: lab.Host, place: str) -> None:
    """A file system on such a disk is mounted there afterwards."""
    if host.run(["mountpoint", "-q", place], check=False).code != 0:
        file = f"/run/vdsm/import/{place.replace('/', '_')}"
        host.sh(DISK.format(file=file, place=place), 60)
    assert host.sh(f"blockdev --getss $(findmnt -n -o SOURCE {place})").out == "4096\n"


def sector_bytes(peer: peers.Peer, repo_id: str) -> int:
    """What the header says."""
    found = peer.repository(repo_id)
    assert found is not None
    program = HEADER.format(path=f"{found['place']}/repository")
    return int(peer.as_agent(f'python3 -P -c "{program}"'))


@LONG
@pytest.mark.timeout(800)
@pytest.mark.parametrize(
    ("version", "sectors"),
    [
        ("4.2", 512),
        ("4.2", 4096),
        ("3", 512),
        ("3", 4096),
    ],
)
def test_every_verb_on_nfs(site: sites.Site, version: str, sectors: int) -> None:
    """Names are not cached: what one host does the other sees at once (trap 21). The server's disk is its own affair:
    to clients all sectors are small."""
    repo_id, export = f"nfs-{version}-{sectors}", ""
    if sectors == 4096:
        large_sectors(site.hosts[0], site.place(EXPORT))
        site.server.export(EXPORT, FSID)
        export = f"{EXPORT}/{repo_id}"
    site.connect(repo_id, version, export)
    assert sector_bytes(site.two, repo_id) == 512
    verbs.prepare(site.one, site.two)
    verbs.through(site.one, site.two, repo_id)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sectors", [pytest.param(512, marks=LONG), 4096])
def test_every_verb_on_a_directory(site: sites.Site, sectors: int) -> None:
    place = "/run/vdsm/storage"
    if sectors == 4096:
        place = f"{place}/large"
        large_sectors(site.hosts[0], place)
    repo_id = f"local-{sectors}"
    site.connect_local(repo_id, f"{place}/{repo_id}")
    assert sector_bytes(site.one, repo_id) == sectors
    verbs.prepare(site.one)
    verbs.through(site.one, site.one, repo_id)
