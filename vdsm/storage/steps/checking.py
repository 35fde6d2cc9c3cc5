"""Reading a whole repository for what could be better, and whether somebody is at it.

Only reads, takes no lease; runs in a repository's I/O child or in a worker. Data is listed before the records are read
(trap 37). Whether open work is alive is for `verdicts.py` to say.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from vdsm import errors, record
from vdsm.record import Record
from vdsm.storage.files import imageheader
from vdsm.storage.repository import Repository
from vdsm.storage.rules import findings, models, verdicts
from vdsm.storage.steps import reading

Argument = dict[str, Any]


def check(repo: Repository, argument: Argument) -> list[dict[str, Any]]:
    """All findings, as dictionaries. argument: active, takeover (see `survey`)."""
    found = findings.findings(survey(repo, argument["active"], takeover=argument["takeover"]))
    return [one._asdict() for one in found]


def survey(
    repo: Repository, active: Collection[str], *, takeover: bool = False, held: Collection[str] = ()
) -> findings.Survey:
    """What the repository holds. `active` are the ids of the jobs that this host's agent has; with `takeover` work in
    another host's queue counts as nobody's. `held` are the ids of entities whose leases the caller has exclusively."""
    data = repo.data_sizes()
    look = _Look(repo, active, takeover, held)
    images = {image_id: look.at(repo.slot(image_id)) for image_id in repo.image_ids()}
    vms = {vm_id: look.at(repo.vm_slot(vm_id)) for vm_id in repo.vm_ids()}
    known = {image_id: found for image_id, found in images.items() if found}
    return findings.Survey(
        repo_name=repo.name,
        data=data,
        images=known,
        vms={vm_id: found for vm_id, found in vms.items() if found},
        empty=frozenset(image_id for image_id, found in images.items() if not found) - look.live,
        empty_vms=frozenset(vm_id for vm_id, found in vms.items() if not found) - look.live,
        live=frozenset(look.live),
        headers=dict(_headers(repo, known.values())),
    )


def _headers(repo: Repository, images: Iterable[Record]) -> Iterator[tuple[str, dict[str, str | None] | None]]:
    """See `findings.Survey`. One that cannot be read now, for its image is just changing, is left out; so are volumes,
    each of which would have to be activated for it."""
    for image in images if repo.abilities.thin else ():
        if image["data"]["format"] == models.QCOW2 and image["status"] != models.BROKEN and not image["deleted"]:
            with contextlib.suppress(errors.BadImageFile):
                header = imageheader.read(repo.data_path(image["data"]["name"]), {models.QCOW2})
                below = {"name": header.backing_name, "format": header.backing_format}
                yield image["id"], below if header.has_backing else None


class _Look:
    def __init__(self, repo: Repository, active: Collection[str], takeover: bool, held: Collection[str]) -> None:
        self._repo = repo
        self._active = active
        self._takeover = takeover
        self._held = held
        self.live: set[str] = set()

    def at(self, slot: record.Slot) -> Record | None:
        """The slot's record; notes in `live` when somebody is at it."""
        try:
            known = record.read(slot)
            if models.is_open(known):
                evidence = reading.evidence(self._repo, slot, lambda: record.read(slot))
                known = evidence["record"]
                if models.is_open(known) and self._is_live(evidence, slot.name):
                    self.live.add(slot.name)
        except FileNotFoundError:
            self.live.add(slot.name)  # it is just going
            return None
        except errors.NoRecord:
            if slot.name not in self._held and reading.owners(self._repo, slot):  # its record is about to be written
                self.live.add(slot.name)
            return None
        return known

    def _is_live(self, evidence: dict[str, Any], entity: str) -> bool:
        """What cannot be told yet counts as live: nothing is taken from anybody who may be at it."""
        work = evidence["record"]["work"]
        if entity in self._held:  # by the one who asks, hence by nobody else
            evidence = {**evidence, "owners": []}
        here = verdicts.Here(self._repo.host_id, record.boot_id(), work["job_id"] in self._active)
        verdict = verdicts.judge(evidence, here)
        if verdict.state == verdicts.QUEUED and work["host_id"] != self._repo.host_id:
            return not self._takeover
        return verdict.state in (*models.OPEN, verdicts.UNKNOWN)
