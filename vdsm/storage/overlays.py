"""Working on a disk without touching it: a hidden overlay, committed or dropped as a whole (trap 39).

    before     disk -> data D
    begin      H (hidden snapshot: deleted, broken) -> D,  overlay O on D;  disk -> D still
    commit     H complete -> D,  disk -> O, based on H
    drop       as before

For jobs over several disks (sysprep): begin for each, work on the overlays, commit the VM's record with the names that
`begin` answered (the commit point of the whole), then commit each disk. A record of a VM whose `work` is "committing"
keeps every H that it names from being cleaned.

Runs in a job's worker. The caller's session holds the disk's data lease exclusively all the time, and from `begin` to
`commit` or `drop` also that of H, which `begin` takes. All functions may be called twice; a crash leaves H with its
lease free, to be committed when a VM's record names it and to be dropped otherwise.
"""

from typing import Any

from vdsm import ids, leases, record
from vdsm.storage import intents, models, removal
from vdsm.storage.repository import Repository


def begin(repo: Repository, session: leases.Session, disk_id: str, work: dict[str, Any]) -> dict[str, str]:
    """An empty overlay on the disk: {"hidden": id of H, "data": name of O}. `work` is the job's, for H's record.

    Raises `RepositoryFull`; then nothing is left.
    """
    disk = repo.get(disk_id)
    models.check_usable(disk, models.DISK)
    change = {"hidden": ids.new(), "data": models.data_name(disk_id)}
    slot = repo.slot(change["hidden"])
    repo.allocate(session, slot)
    session.acquire([slot.data_lease()], 0)
    try:
        record.create(slot, _hidden(repo, disk, change, work))
        overlay = {"name": change["data"], "format": models.QCOW2}
        intents.make_data(repo, session, overlay, disk["size_bytes"], disk["data"])
    except Exception:
        drop(repo, session, change)
        raise
    return change


def _hidden(repo: Repository, disk: record.Record, change: dict[str, str], work: dict[str, Any]) -> record.Record:
    kept = {name: disk[name] for name in ("size_bytes", "data", "base", "strategy")}
    fields = {"id": change["hidden"], "kind": models.SNAPSHOT, "deleted": True, "digest": "", **kept}
    names = {"disk": disk["id"], "data": change["data"]}
    return models.new(fields, repo.host_id, {**work, "names": names})


def commit(repo: Repository, session: leases.Session, disk_id: str, change: dict[str, str]) -> None:
    """The disk is what the overlay shows. The overlay's data must be on stable storage before."""
    overlay = {"name": change["data"], "format": models.QCOW2}
    hidden, disk = repo.get(change["hidden"]), repo.get(disk_id)
    if hidden["status"] == models.BROKEN:
        repo.update(session, change["hidden"], lambda found: models.done(found, repo.host_id))
    if disk["data"] != overlay:
        repo.update(session, disk_id, lambda found: _on_overlay(repo, found, overlay, change["hidden"]))
    session.release([repo.slot(change["hidden"]).data_lease()])


def _on_overlay(repo: Repository, disk: record.Record, overlay: dict[str, str], hidden_id: str) -> record.Record:
    changed = {**disk, "data": overlay, "base": hidden_id, "generation": disk["generation"] + 1}
    return {**changed, "status": models.settled(changed), "writer": models.writer(repo.host_id)}


def drop(repo: Repository, session: leases.Session, change: dict[str, str]) -> None:
    """The disk is as it was; nothing is left of the overlay."""
    removal.discard(repo, session, change["hidden"])
