"""Working on a disk without touching it: a hidden overlay, committed or dropped as a whole (trap 39).

    before     disk -> data D
    begin      H (hidden snapshot: deleted, broken) -> D,  overlay O on D;  disk -> D still
    claim      the disk's work names H: nobody else gets to use the disk
    commit     H complete -> D,  disk -> O, based on H, the claim's work done
    drop       as before

For jobs over several disks (sysprep): the VM's record names all changes from the request on, `begin` for each, work on
the overlays, `claim` each disk, write the VM's record as "committing" (the commit point of the whole), `commit` each
disk. As long as it says so, every H that it names is kept from being cleaned.

Leases end with their host, and what another VM wrote on D after the commit point would be hidden by O. So a disk that
is going to be switched says so in its own record, and the end of that claim is the same write as the switch.

Runs in a job's worker, whose leases cover the disk, exclusively, all the time. `begin` takes the lease of H, which is
held until `commit` or `drop`; in another process those take it themselves. Every function may be called twice, and
`drop` also when nothing was begun. A crash leaves H with its lease free, and the disk claimed or not: to be committed
when a VM's record says "committing" and names it, to be dropped otherwise.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from vdsm import errors, ids, leases, record
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, models
from vdsm.storage.steps import intents, removal

Change = dict[str, str]


def plan(disk_id: str) -> Change:
    """{"hidden": id of an H, "data": name of an O}: what `begin` is to make for the disk. Touches nothing."""
    return {"hidden": ids.new(), "data": models.data_name(disk_id)}


def begin(
    repo: Repository, session: leases.Session, disk_id: str, change: Change, work: dict[str, Any], vm: dict[str, str]
) -> None:
    """Makes an empty overlay on the disk. `work` is the job's, for H's record, and `vm` tells where the record of its
    VM is: {"repo": persistent name, "id"}. Raises `RepositoryFull`.

    Killed: before H's record at most a slot without a record; after it H names the overlay, made or not.
    """
    disk = repo.get(disk_id)
    models.check_usable(disk, models.DISK)
    slot = repo.allocate(session, change["hidden"])
    repo.keep(session, change["hidden"])
    record.create(slot, _hidden(repo, disk, change, work, vm))
    most_bytes = qemuimg.most_bytes(models.QCOW2, disk["size_bytes"])  # nobody grows it while a tool writes
    overlay = {**disk, "data": _overlay(change)}
    intents.make_data(repo, overlay, disk, intents.quickly(repo, session, disk), most_bytes)


def _overlay(change: Change) -> dict[str, str]:
    return {"name": change["data"], "format": models.QCOW2}


@contextlib.contextmanager
def changing(repo: Repository, disk_id: str, change: Change) -> Iterator[str]:
    """The overlay's path, for a tool that writes it and reads all that it lies on. On stable storage at the end."""
    below = [image["data"]["name"] for image in chain.down(disk_id, repo.find)]
    with repo.reading(below), repo.changing(change["data"]) as path:
        yield path


def _hidden(
    repo: Repository, disk: record.Record, change: Change, work: dict[str, Any], vm: dict[str, str]
) -> record.Record:
    kept = {name: disk[name] for name in ("size_bytes", "data", "base", "strategy")}
    fields = {"id": change["hidden"], "kind": models.SNAPSHOT, "deleted": True, "digest": "", **kept}
    names = {"disk": disk["id"], "data": change["data"], "vm": vm}
    return models.new(fields, repo.host_id, {**work, "names": names})


def claim(
    repo: Repository, session: leases.Session, disk_id: str, change: Change, work: dict[str, Any], vm: dict[str, str]
) -> None:
    """From here to `commit` or `drop` nobody else uses the disk, also when this host is lost. `work` and `vm` as for
    `begin`. To be called last before the commit point: what dies earlier leaves the disk free.

    Killed: the disk is claimed or it is not.
    """

    def claimed(disk: record.Record) -> record.Record | None:
        if _is_claimed(disk, change):
            return None
        models.check_usable(disk, models.DISK)
        names = {"hidden": change["hidden"], "vm": vm, "before": disk["work"]}
        fresh = models.work(work["kind"], repo.host_id, names, job_id=work["job_id"], host_generation=since)
        return {**disk, "work": {**fresh, "state": "running"}}

    since = repo.host_generation(repo.slot(disk_id))
    repo.update(session, disk_id, claimed)


def _is_claimed(disk: record.Record, change: Change) -> bool:
    return (chain.claim(disk) or {}).get("hidden") == change["hidden"]


def awaits(repo: Repository, disk_id: str, change: Change) -> bool:
    """Whether the disk is there and claimed for the change: `commit` has to switch it, and nobody else may touch it."""
    disk = repo.find(disk_id)
    return disk is not None and _is_claimed(disk, change)


def commit(repo: Repository, session: leases.Session, disk_id: str, change: Change) -> None:
    """The disk is what the overlay shows. The overlay's data must be on stable storage before.

    A disk that is not claimed for the change was switched before; whatever has become of it since, it stays so, also
    when it was removed.

    Killed: H is complete or not, the disk claimed on its old data, or on the overlay; the next call goes on.
    """
    hidden = change["hidden"]
    if awaits(repo, disk_id, change):
        repo.keep(session, hidden)
        if repo.get(hidden)["status"] == models.BROKEN:
            repo.update(session, hidden, lambda found: models.done(found))
        repo.update(session, disk_id, lambda found: _on_overlay(repo, found, change))
    lease = repo.slot(hidden).data_lease()
    if (lease.lockspace, lease.name, False) in session.held():
        session.release([lease])


def _on_overlay(repo: Repository, disk: record.Record, change: Change) -> record.Record:
    return models.done(disk, data=_overlay(change), base=change["hidden"])


def drop(repo: Repository, session: leases.Session, disk_id: str, change: Change) -> None:
    """The disk is as it was, its work too; nothing is left of the overlay. Needs no lease of the disk: it changes only
    one that is claimed for this. Killed: H is there still, or nothing is.

    The VM's record still names the overlay's data, so nobody else would take it for unused.
    """
    with contextlib.suppress(errors.NoSuchImage):
        repo.update(session, disk_id, lambda disk: _unclaimed(repo, disk) if _is_claimed(disk, change) else None)
    repo.remove_data(change["data"])
    removal.discard_held(repo, session, change["hidden"])


def _unclaimed(repo: Repository, disk: record.Record) -> record.Record:
    return {**disk, "work": disk["work"]["names"]["before"]}
