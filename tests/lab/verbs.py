"""Every verb of storage once, by two agents on one repository: for each kind of repository the same list.

    verbs.prepare(one, two)                     once a host has been booted
    verbs.through(one, two, "main")             a repository that both have joined, and that is empty
    verbs.through(one, one, "local")            one host alone
    verbs.rest(one, two, "main")                of `through` what the tests of volume groups do not show anyway
    verbs.beside(one, two, "main", "local")     copies between it and another one, which `one` has joined

What one agent makes the other goes on with. What an image holds is judged by the SHA-256 of what qemu-img makes of it
as raw, against bytes that the test has. Images have at most `BYTES`, and there are seldom more than six at once: 64 MiB
of room are enough for any format. At the end the repository is as empty as before, and a check finds nothing.

Formatting, connecting and extending are the caller's: there kinds of repositories differ.
"""

import hashlib
import itertools
from typing import Any

from tests.lab import peers
from vdsm import ids

MIB = 1 << 20
BYTES = 4 * MIB
# Numbered lines, which a host makes by itself: nothing large has to get there.
_LINES = 600_000
_BEGIN = {"first": 10_000_000, "change": 30_000_000}
_DIRECTORY = "/run/vdsm/import"
_MAKE = """\
cd {directory}
seq {first} {first_end} | head -c {bytes} > first
cp first second
seq {change} {change_end} | head -c {mib} | dd of=second bs=1M seek=2 conv=notrunc status=none
qemu-img convert -f raw -O qcow2 second second.qcow2
chmod 644 first second second.qcow2
"""


def content(name: str) -> bytes:
    """What the file of that name holds: `second` is `first` with another third MiB."""
    if name == "second":
        first = content("first")
        return first[: 2 * MIB] + _lines("change")[:MIB] + first[3 * MIB :]
    return _lines(name)[:BYTES]


def _lines(name: str) -> bytes:
    return "".join(f"{number}\n" for number in range(_BEGIN[name], _BEGIN[name] + _LINES)).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def prepare(*hosts: peers.Peer) -> None:
    """The files that are imported are in each host: first and second, raw, and second.qcow2."""
    ends = {f"{name}_end": begin + _LINES - 1 for name, begin in _BEGIN.items()}
    script = _MAKE.format(directory=_DIRECTORY, bytes=BYTES, mib=MIB, **_BEGIN, **ends)
    for peer in set(hosts):
        peer.host.sh(script, 60)


def shown(peer: peers.Peer, repo_id: str, image_id: str) -> str:
    """The SHA-256 of what the image shows."""
    path = f"/run/vdsm/export/{ids.new()}"
    peer.done("exportImage", repositoryId=repo_id, imageId=image_id, path=path, format="raw")
    said = peer.host.sh(f"sha256sum {path}; rm {path}", 60).out
    return said.split()[0]


def through(one: peers.Peer, two: peers.Peer, repo_id: str) -> None:
    """Raises where a verb does not do as it should; what it has made by then stays."""
    whole = _Round(one, two, repo_id)
    first, second = whole.imported()
    whole.disks()
    whole.chain(first)
    whole.difference(second)
    whole.mended()
    whole.leases()
    whole.nothing_left()


def rest(one: peers.Peer, two: peers.Peer, repo_id: str) -> None:
    """A shorter `through`: work that was only noted, leases."""
    whole = _Round(one, two, repo_id)
    whole.mended()
    whole.leases()
    whole.nothing_left()


def beside(one: peers.Peer, two: peers.Peer, repo_id: str, other_id: str) -> None:
    """Copies between two repositories: a snapshot keeps its id, a difference is stored to what is there already."""
    whole = _Round(one, two, repo_id)
    first, changed = sha256(content("first")), sha256(content("second"))
    disk = _imported(one, other_id, "first", "raw", "space")
    snapshot = one("createSnapshot", targetRepoId=other_id, baseVirtualDiskId=disk)["imageId"]
    assert one.done("copyImage", targetRepoId=repo_id, imageId=snapshot)["imageId"] == snapshot
    whole.shows(snapshot, first)
    source = _imported(one, other_id, "second.qcow2", "qcow2", "performance")
    copy = one.done("copyImage", targetRepoId=repo_id, imageId=source, baseImageId=snapshot)["imageId"]
    whole.shows(copy, changed)
    back = one.done("copyImage", targetRepoId=other_id, imageId=copy, options={"strategy": "performance"})["imageId"]
    assert shown(one, other_id, back) == changed
    whole.remove(copy, snapshot)
    for image_id in (disk, snapshot, source, back):
        one("removeImage", repositoryId=other_id, imageId=image_id)
    whole.nothing_left()
    assert one.image_ids(other_id) == set()


def _imported(peer: peers.Peer, repo_id: str, name: str, image_format: str, strategy: str) -> str:
    given = {"path": f"{_DIRECTORY}/{name}", "format": image_format, "options": {"strategy": strategy}}
    return str(peer.done("importImage", targetRepoId=repo_id, **given)["imageId"])


class _Round:
    def __init__(self, one: peers.Peer, two: peers.Peer, repo_id: str) -> None:
        self.one = one
        self.two = two
        self.repo_id = repo_id
        self.first, self.second = content("first"), content("second")
        self._lookers = itertools.cycle((two, one))

    def shows(self, image_id: str, wanted: str) -> None:
        """To both in turn: in a lab host each look takes seconds."""
        peer = next(self._lookers)
        assert shown(peer, self.repo_id, image_id) == wanted, f"{image_id} on {peer.host}"

    def imported(self) -> tuple[str, str]:
        first = _imported(self.one, self.repo_id, "first", "raw", "performance")
        second = _imported(self.two, self.repo_id, "second.qcow2", "qcow2", "space")
        assert self.one.image_ids(self.repo_id) == self.two.image_ids(self.repo_id) == {first, second}
        self.shows(first, sha256(self.first))
        self.shows(second, sha256(self.second))
        return first, second

    def disks(self) -> None:
        """Empty ones are empty (trap 40), grow, and keep what callers say of them."""
        for strategy in ("performance", "space"):
            asked = {"size": MIB, "userData": {"by": "one"}, "options": {"strategy": strategy}}
            disk = self.one("createVirtualDisk", targetRepoId=self.repo_id, **asked)["imageId"]
            self.shows(disk, sha256(bytes(MIB)))
            self.two("resizeVirtualDisk", repositoryId=self.repo_id, imageId=disk, size=3 * MIB)
            self.one("setImageUserData", repositoryId=self.repo_id, imageId=disk, userData={"by": "both"})
            found = self.get(disk)
            assert (found["size"], found["userData"], found["status"]) == (3 * MIB, {"by": "both"}, "optimized")
            self.shows(disk, sha256(bytes(3 * MIB)))
            self.remove(disk)

    def chain(self, disk: str) -> None:
        """A snapshot with two on it; one of them leaves it, the other is joined with it."""
        snapshot = self.two("createSnapshot", targetRepoId=self.repo_id, baseVirtualDiskId=disk)["imageId"]
        grown = self.one("createVirtualDisk", targetRepoId=self.repo_id, size=0, baseSnapshotId=snapshot)["imageId"]
        self.two("resizeVirtualDisk", repositoryId=self.repo_id, imageId=grown, size=BYTES + MIB)
        self.shows(snapshot, sha256(self.first))
        self.shows(grown, sha256(self.first + bytes(MIB)))
        assert self.get(disk)["status"] == "degraded"
        self.fix(self.one, "optimize", disk)
        assert self.get(disk)["status"] == "optimized"
        self.shows(disk, sha256(self.first))
        self.remove(snapshot)
        self.fix(self.two, "merge", snapshot)
        self.shows(grown, sha256(self.first + bytes(MIB)))
        self.remove(grown, disk)

    def difference(self, source: str) -> None:
        """A copy as the difference to a disk, which then goes; and a whole one."""
        base = _imported(self.one, self.repo_id, "first", "raw", "space")
        asked = {"targetRepoId": self.repo_id, "imageId": source}
        copy = self.two.done("copyImage", baseImageId=base, **asked)["imageId"]
        whole = self.one.done("copyImage", options={"strategy": "performance"}, **asked)["imageId"]
        for image_id in (copy, whole):
            self.shows(image_id, sha256(self.second))
        self.shows(base, sha256(self.first))
        self.remove(base)
        (merge,) = self.two("checkStorageRepository", repositoryId=self.repo_id)
        assert merge["type"] == "merge"
        self.one.done("fixStorageRepository", repositoryId=self.repo_id, fix=merge)
        self.shows(copy, sha256(self.second))
        self.remove(copy, whole, source)

    def mended(self) -> None:
        """What one host has only noted another one does."""
        asked = {"path": f"{_DIRECTORY}/first", "format": "raw", "options": {"AutoFix": False}}
        disk = self.one("importImage", targetRepoId=self.repo_id, **asked)["imageId"]
        told = self.two("getImageStatus", repositoryId=self.repo_id, imageId=disk)
        assert (told["status"], told["verdict"]["state"]) == ("broken", "wanted")
        self.fix(self.two, "mend", disk)
        told = self.one("getImageStatus", repositoryId=self.repo_id, imageId=disk)
        assert (told["status"], told["hostID"]) == ("optimized", self.two.host.number)
        self.shows(disk, sha256(self.first))
        self.remove(disk)

    def leases(self) -> None:
        lease = {"repoId": self.repo_id, "leaseId": ids.new()}
        made = self.one("Lease.create", lease=lease)
        assert self.two("Lease.info", lease=lease) == made
        before = self.two("Lease.status", lease=lease)
        assert (before["owners"], before["work"]) == ([], None)
        assert self.two("Lease.fence", lease=lease)["generation"] == before["generation"] + 1
        self.one("Lease.delete", lease=lease)
        assert self.two.refused("Lease.info", lease=lease) == "no_such_lease"

    def nothing_left(self) -> None:
        for peer in (self.one, self.two):
            assert peer.image_ids(self.repo_id) == set()
            assert peer("checkStorageRepository", repositoryId=self.repo_id) == []

    def get(self, image_id: str) -> dict[str, Any]:
        """As both tell of it."""
        told = [peer("getImage", repositoryId=self.repo_id, imageId=image_id) for peer in (self.one, self.two)]
        assert told[0] == told[1]
        found: dict[str, Any] = told[0]
        return found

    def fix(self, peer: peers.Peer, kind: str, image_id: str) -> None:
        """The other one has found it."""
        other = self.two if peer is self.one else self.one
        found = other("checkStorageRepository", repositoryId=self.repo_id)
        (fix,) = [one for one in found if (one["type"], one["imageId"]) == (kind, image_id)]
        peer.done("fixStorageRepository", repositoryId=self.repo_id, fix=fix)

    def remove(self, *image_ids: str) -> None:
        """By both in turn."""
        for number, image_id in enumerate(image_ids):
            peer, other = (self.one, self.two) if number % 2 == 0 else (self.two, self.one)
            peer("removeImage", repositoryId=self.repo_id, imageId=image_id)
            assert other.refused("getImage", repositoryId=self.repo_id, imageId=image_id) == "no_such_image"
