"""The storage API's flow of incremental backups from one repository to another of another format, and what becomes of
the copies on the other host."""

import json
from typing import Any, NamedTuple

import pytest

from tests.lab import peers, sites, verbs

MIB = 1 << 20
# A record of the first host's, as JSON.
READ = "import json; from vdsm import record; print(json.dumps(record.read(record.Slot('', '', '{path}', 0))))"
WRITTEN = ("write -P 1 1M 512k", "write -z 2M 512k", "write -P 2 3071k 3k")  # 0.5 MiB, and a little
# What is stored of the difference: the data, and what qcow2 needs.
LEAST, MOST = 512 << 10, 2 * MIB


class Repo(NamedTuple):
    """`other` is the host that goes on with what the first one has made."""

    repo_id: str
    other: peers.Peer


def repository(site: sites.Site, kind: str) -> Repo:
    if kind == sites.LOCALFS:
        site.connect_local("local", "/run/vdsm/storage/local")
        return Repo("local", site.one)
    repo_id = f"backup-{kind}"
    site.connect(repo_id, kind)
    return Repo(repo_id, site.two)


def known(one: peers.Peer, repo_id: str, image_id: str) -> dict[str, Any]:
    """The image's record, and the file with its data as `path`."""
    found = one.repository(repo_id)
    assert found is not None
    program = READ.format(path=f"{found['place']}/images/{image_id}")
    record: dict[str, Any] = json.loads(one.as_agent(f'python3 -P -c "{program}"'))
    return {**record, "path": f"{found['place']}/data/{record['data']['name']}"}


def write(one: peers.Peer, disk: dict[str, Any]) -> None:
    """What a guest would write, while none runs."""
    commands = " ".join(f"-c '{command}'" for command in WRITTEN)
    said = one.as_agent(f"qemu-io -f {disk['data']['format']} {commands} {disk['path']}")
    assert "failed" not in said, said


@pytest.mark.torture
@pytest.mark.timeout(800)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("4.2", "3"),
        (sites.LOCALFS, "4.2"),
        ("3", sites.LOCALFS),
    ],
    ids=lambda kind: f"of-{kind}",
)
def test_a_second_backup_stores_what_was_written_since(site: sites.Site, source: str, target: str) -> None:
    """The second copy is only noted by the first host, and done by a fix of whoever has both repositories."""
    one = site.one
    home, vault = repository(site, source), repository(site, target)
    verbs.prepare(one)
    given = {"path": "/run/vdsm/import/first", "format": "raw", "options": {"strategy": "performance"}}
    disk = one.done("importImage", targetRepoId=home.repo_id, **given)["imageId"]
    first = one.done("copyImage", targetRepoId=vault.repo_id, imageId=disk)["imageId"]
    write(one, known(one, home.repo_id, disk))
    before, content = known(one, home.repo_id, disk), verbs.shown(home.other, home.repo_id, disk)
    unread = one.checksum(before["path"])

    noted = {"baseImageId": first, "options": {"AutoFix": False}}
    second = one("copyImage", targetRepoId=vault.repo_id, imageId=disk, **noted)["imageId"]
    told = vault.other("getImageStatus", repositoryId=vault.repo_id, imageId=second)
    assert (told["status"], told["verdict"]["state"]) == ("broken", "wanted")
    found = finding(vault.other, vault.repo_id, second)
    fixer = one if home.other is one else vault.other
    assert (found["obstacle"] is None) == (fixer is vault.other), found
    fixer.done("fixStorageRepository", repositoryId=vault.repo_id, fix=finding(fixer, vault.repo_id, second))

    assert known(one, home.repo_id, disk) == before, "no snapshot, nothing written"
    assert one.checksum(before["path"]) == unread
    image = vault.other("getImage", repositoryId=vault.repo_id, imageId=second)
    assert image["status"] == "optimized" and LEAST < image["storedSize"] < MOST, image
    assert verbs.shown(vault.other, vault.repo_id, second) == content != verbs.sha256(verbs.content("first"))
    assert verbs.shown(vault.other, vault.repo_id, first) == verbs.sha256(verbs.content("first"))

    vault.other("removeImage", repositoryId=vault.repo_id, imageId=first)
    assert verbs.shown(one, vault.repo_id, second) == content
    merge = finding(one, vault.repo_id, None)
    assert merge["type"] == "merge"
    vault.other.done("fixStorageRepository", repositoryId=vault.repo_id, fix=merge)
    assert verbs.shown(one, vault.repo_id, second) == content
    one("removeImage", repositoryId=home.repo_id, imageId=disk)
    vault.other("removeImage", repositoryId=vault.repo_id, imageId=second)
    for repo in (home, vault):
        assert repo.other("checkStorageRepository", repositoryId=repo.repo_id) == []


def finding(peer: peers.Peer, repo_id: str, image_id: str | None) -> dict[str, Any]:
    """The only one; of that image, when one is named."""
    (found,) = peer("checkStorageRepository", repositoryId=repo_id)
    assert image_id in (None, found["imageId"])
    fix: dict[str, Any] = found
    return fix
