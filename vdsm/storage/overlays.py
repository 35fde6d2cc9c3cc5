"""Working on a disk without touching it: a hidden overlay, committed or dropped as a whole (trap 39).

    before     disk -> data D
    begin      H (hidden snapshot: deleted, broken) -> D,  overlay O on D;  disk -> D still
    commit     H complete -> D,  disk -> O, based on H
    drop       as before

For jobs over several disks (sysprep): the VM's record names all changes from the request on, `begin` for each, work on
the overlays, write the VM's record as "committing" (the commit point of the whole), `commit` each disk. As long as it
says so, every H that it names is kept from being cleaned.

Runs in a job's worker, whose leases cover the disk, exclusively, all the time. `begin` takes the lease of H, which is
held until `commit` or `drop`; in another process those take it themselves. Every function may be called twice, and
`drop` also when nothing was begun. A crash leaves H with its lease free: to be committed when a VM's record says
"committing" and names it, to be dropped otherwise.
"""

from typing import Any

from vdsm import ids, leases, record
from vdsm.storage import intents, models, removal
from vdsm.storage.repository import Repository

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
    slot = repo.slot(change["hidden"])
    repo.allocate(session, slot)
    repo.keep(session, change["hidden"])
    record.create(slot, _hidden(repo, disk, change, work, vm))
    overlay = {"name": change["data"], "format": models.QCOW2}
    intents.make_data(repo, session, overlay, disk["size_bytes"], disk["data"])


def _hidden(
    repo: Repository, disk: record.Record, change: Change, work: dict[str, Any], vm: dict[str, str]
) -> record.Record:
    kept = {name: disk[name] for name in ("size_bytes", "data", "base", "strategy")}
    fields = {"id": change["hidden"], "kind": models.SNAPSHOT, "deleted": True, "digest": "", **kept}
    names = {"disk": disk["id"], "data": change["data"], "vm": vm}
    return models.new(fields, repo.host_id, {**work, "names": names})


def commit(repo: Repository, session: leases.Session, disk_id: str, change: Change) -> None:
    """The disk is what the overlay shows. The overlay's data must be on stable storage before.

    Killed: H is complete or not, the disk on its old data or on the overlay; the next call goes on.
    """
    repo.keep(session, change["hidden"])
    overlay = {"name": change["data"], "format": models.QCOW2}
    if repo.get(change["hidden"])["status"] == models.BROKEN:
        repo.update(session, change["hidden"], lambda found: models.done(found, repo.host_id))
    if repo.get(disk_id)["data"] != overlay:
        repo.update(session, disk_id, lambda found: _on_overlay(repo, found, overlay, change["hidden"]))
    session.release([repo.slot(change["hidden"]).data_lease()])


def _on_overlay(repo: Repository, disk: record.Record, overlay: dict[str, str], hidden_id: str) -> record.Record:
    changed = {**disk, "data": overlay, "base": hidden_id, "generation": disk["generation"] + 1}
    return {**changed, "status": models.settled(changed), "writer": models.writer(repo.host_id)}


def drop(repo: Repository, session: leases.Session, change: Change) -> None:
    """The disk is as it was; nothing is left of the overlay. Killed: H is there still, or nothing is.

    The VM's record still names the overlay's data, so nobody else would take it for unused.
    """
    repo.remove_data(change["data"])
    removal.discard_held(repo, session, change["hidden"])
