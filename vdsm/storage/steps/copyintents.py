"""What copyImage and importImage do before their job: the target's record, and what it is going to lie on.

As the functions of `intents.py`: run in a repository's I/O child, take its session with sanlock and an argument, return
JSON; "[C]" marks the commit point. They raise what those raise.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from vdsm import errors, ids, leases, record, sizes, undo
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, models
from vdsm.storage.steps import intents, reading, removal

Argument = dict[str, Any]
Answer = dict[str, Any]

# The tables of an overlay that holds nothing, for the largest disk, take less; one that takes more is not looked at.
_EMPTY_BYTES = sizes.MIB


def plan_copy(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """The image that is to be copied and all it is based on, if nobody is writing them now: as `reading.chained`.

    argument: image_id, generation (expected, or None). Makes nothing but what an open snapshot still lacks.
    """
    image_id = argument["image_id"]
    intents.roll_forward(repo, session, {"image_id": image_id})
    layers = chain.down(image_id, repo.find)
    with repo.owning(session, shared=[layer["id"] for layer in layers]):
        layers = chain.down(image_id, repo.find)
        models.check_usable(layers[0])
        models.check_generation(layers[0], argument["generation"])
        return reading.chained(repo, layers)


def begin_copy(repo: Repository, session: leases.Session, argument: Argument) -> Answer:
    """The record of an image that a job is going to fill. Answers {image_id, job_id}; job_id None: it is there already,
    with "undeleted" true when it came back from deletion.

    argument: image_id, kind, size_bytes, strategy, user_data, digest, verb, job_id, source (for the record's work),
    base (an image of this repository to which the difference is to be stored; None or left out: the whole); auto_fix:
    False leaves the filling to a later fix. A snapshot keeps its id when it is copied, so the one of that id is the
    same image: whole it is taken as it is, back from deletion if need be (trap 38).

    Killed: before [C] at most a slot without a record, and a base that was a disk lies on its hidden snapshot, or is
    about to; after it a broken image whose work is queued.
    """
    image_id = argument["image_id"]
    known = repo.find(image_id)
    if known is not None and argument["kind"] == known["kind"] == models.SNAPSHOT:
        return _present(repo, session, known, argument)
    known = intents.same_request(repo, argument)
    if known is not None:
        return intents.answer(known)
    fast = argument["strategy"] == models.PERFORMANCE
    if fast and repo.space().free_bytes < argument["size_bytes"]:
        raise errors.RepositoryFull(repo_id=repo.repo_id)
    with _frozen(repo, session, argument) as base:
        slot = repo.allocate(session, image_id)
        with repo.owning(session, exclusive=[image_id]), undo.Stack() as steps:
            known = intents.same_request(repo, argument)
            if known is None:
                steps.push("remove the slot", lambda: removal.discard(repo, session, image_id))
                known = record.create(slot, _target(repo, argument, base))  # [C]
            return intents.answer(known)


@contextlib.contextmanager
def _frozen(repo: Repository, session: leases.Session, argument: Argument) -> Iterator[str | None]:
    """The immutable image to which the difference is stored, None for none. Held from before it is checked to the
    block's end (trap 36), when a record names it.

    A base that is a disk will be written again: its data becomes a hidden snapshot, the disk an overlay on it, under
    its exclusive lease (trap 35). For speed nothing is stored as a difference, so the base is only checked.
    """
    base_id = argument.get("base")
    if base_id is None or argument["strategy"] == models.PERFORMANCE:
        if base_id is not None:
            models.check_usable(repo.get(base_id))
        yield None
    elif repo.get(base_id)["kind"] == models.SNAPSHOT:
        with repo.owning(session, shared=[base_id]):
            _check_below(repo.get(base_id), argument)
            yield base_id
    else:
        intents.roll_forward(repo, session, {"image_id": base_id})
        with repo.owning(session, exclusive=[base_id]):
            base = repo.get(base_id)
            _check_below(base, argument)
            with _half(repo, session, base) as hidden_id:
                yield hidden_id


def _check_below(base: record.Record, argument: Argument) -> None:
    models.check_usable(base)
    if base["size_bytes"] > argument["size_bytes"]:
        reason = f"it has {base['size_bytes']} bytes, the image to be copied only {argument['size_bytes']}"
        raise errors.InvalidParameters(parameter="baseImageId", reason=reason)


@contextlib.contextmanager
def _half(repo: Repository, session: leases.Session, disk: record.Record) -> Iterator[str]:
    """The snapshot that holds all that the disk shows, held inside the block: a new, hidden one, unless nothing was
    written since the one was made on which the disk lies."""
    below = repo.find(disk["base"]) if disk["base"] else None
    if below is not None and _is_empty(repo, session, disk):
        with repo.owning(session, shared=[below["id"]]):
            yield below["id"]
        return
    hidden_id = ids.new()
    repo.allocate(session, hidden_id)
    with repo.owning(session, exclusive=[hidden_id]):
        asked: Argument = {"image_id": hidden_id, "user_data": {}, "digest": "", "generation": None, "hidden": True}
        yield str(intents.split(repo, session, disk, asked)["id"])


def _is_empty(repo: Repository, session: leases.Session, disk: record.Record) -> bool:
    """Whether the disk's data, an overlay, holds nothing itself."""
    data, size_bytes = disk["data"], disk["size_bytes"]
    if repo.abilities.thin and repo.allocated_bytes(data["name"]) > _EMPTY_BYTES:
        return False
    with repo.reading([data["name"]]):
        argv = qemuimg.extents(repo.layer(data, size_bytes))
        said = qemuimg.run(argv, (session.fd, *repo.tool_fds), size_bytes)
    return not any(extent["present"] for extent in json.loads(said))


def _target(repo: Repository, argument: Argument, base: str | None) -> record.Record:
    fast = argument["strategy"] == models.PERFORMANCE
    data = {"name": models.data_name(argument["image_id"]), "format": models.RAW if fast else models.QCOW2}
    asked = {name: argument[name] for name in ("kind", "size_bytes", "strategy", "user_data", "digest")}
    names = {"source": argument["source"]}
    wanted = not argument.get("auto_fix", True)
    job_id = None if wanted else argument["job_id"]
    since = repo.host_generation(repo.slot(argument["image_id"]))
    work = models.work(argument["verb"], repo.host_id, names, job_id=job_id, host_generation=since, wanted=wanted)
    return models.new({"id": argument["image_id"], "data": data, "base": base, **asked}, repo.host_id, work)


def _present(repo: Repository, session: leases.Session, known: record.Record, argument: Argument) -> Answer:
    if known["status"] == models.BROKEN:
        if known["digest"] == argument["digest"] and not known["deleted"]:
            return intents.answer(known)
        raise errors.ImageNotUsable(image_id=known["id"], status="being removed" if known["deleted"] else "broken")
    if known["deleted"]:
        with repo.owning(session, shared=[known["id"]]):  # nobody cleans it meanwhile
            known = repo.update(session, known["id"], lambda found: _undeleted(found, argument))
        return {**intents.answer(known), "undeleted": True}
    return intents.answer(known)


def _undeleted(image: record.Record, argument: Argument) -> record.Record:
    if image["status"] == models.BROKEN:
        raise errors.ImageNotUsable(image_id=image["id"], status="being removed")
    return {**image, "deleted": False, "user_data": argument["user_data"], "digest": argument["digest"]}


def withdraw_copy(repo: Repository, session: leases.Session, argument: Argument) -> None:
    """Takes back what `begin_copy` made for a job that was refused. argument: image_id, job_id."""
    image_id = argument["image_id"]
    with repo.owning(session, exclusive=[image_id]):
        work = repo.get(image_id)["work"]
        if (work["job_id"], work["state"]) == (argument["job_id"], "queued"):
            removal.discard(repo, session, image_id)
