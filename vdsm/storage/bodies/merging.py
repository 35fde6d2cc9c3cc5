"""Fixes that store an image in another way without changing what it shows: merge and optimize.

    merge       D deleted, C the only one on it; exclusive leases of both, so that nobody runs on top
      pull      C's data gets what it shows of D, then needs only D's base. D's data is not touched
      push      D's data gets what C's holds, then shows what C shows. D is broken from before that on: its id must
                not come back from deletion with it (trap 38)
      (final)   record C: data and base, generation + 1: the commit. Until here C on D is right, then C as it is now
      (after)   D goes; so does the data that C had, after a push

    optimize    exclusive lease of the image, its chain shared
      measure   there is room
      copy      fresh raw data is made a whole copy
      (final)   record: data, no base, generation + 1: the commit
      (after)   the old data goes, and what it was based on, if that was deleted

Killed before the commit, the image is as it was: what a merge has done to data may be done again, what an optimize has
made is replaced by the next one. After an image's data was switched, headers of those above it name data that is gone:
they are relinked, at once or by a fix of its own. Nothing relies on that, since records rule (trap 42).
"""

import contextlib
import json
from typing import Any

from vdsm import errors, leases, record
from vdsm.jobs import worker
from vdsm.storage.bodies import copying, differences, fixes
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, findings, models
from vdsm.storage.steps import removal, resizing

MERGE = "merge"
PULL, PUSH = "pull", "push"


@worker.body(findings.MERGE_IMAGE)
class MergeImage(fixes.Fix):
    """argument: as `fixes.Fix` for the upper image; the first of `below` is the deleted one."""

    stages = (MERGE,)

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        merged = self.target(argument).slot(argument["names"]["merged"])
        return [*super().leases(argument), merged.data_lease()]

    def run(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        upper, lower = ctx.record, repo.get(ctx.argument["names"]["merged"])
        _check_alone(repo, upper, lower)
        images = fixes.claimed_chain(repo, ctx.argument)
        direction = _direction(repo, upper, lower)
        ctx.update(lambda known: _with_names(known, direction=direction))
        if direction == PUSH:
            repo.update(ctx.session, lower["id"], lambda found: _pushed_into(repo, found))
            self._push(ctx, repo, images)
        else:
            self._pull(ctx, repo, images)
        self._merged = {"data": lower["data"] if direction == PUSH else upper["data"], "base": lower["base"]}

    def _push(self, ctx: worker.Context, repo: Repository, images: list[record.Record]) -> None:
        upper, lower, *below = images
        size_bytes = upper["size_bytes"]
        files = copying.layers_of(repo, [upper, {**lower, "size_bytes": size_bytes}, *below])
        readable = repo.reading(copying.names_of([upper, *below]))
        brought_bytes = repo.allocated_bytes(upper["data"]["name"])
        with readable, repo.changing(lower["data"]["name"], _room_bytes(repo, lower, upper, brought_bytes)):
            for argv in resizing.widening(files[1], lower["size_bytes"], size_bytes):
                fixes.run_tool(ctx, repo, argv, size_bytes)
            fixes.run_tool(ctx, repo, qemuimg.commit(files), size_bytes)

    def _pull(self, ctx: worker.Context, repo: Repository, images: list[record.Record]) -> None:
        upper, lower, *rest = images
        top, deleted, *below = copying.layers_of(repo, images)
        with contextlib.ExitStack() as kept:
            kept.enter_context(repo.reading(copying.names_of([lower, *rest])))
            brought_bytes = 0 if repo.abilities.thin else _pulled_bytes(ctx, deleted, lower["size_bytes"])
            room_bytes = _room_bytes(repo, upper, lower, brought_bytes)
            kept.enter_context(repo.changing(upper["data"]["name"], room_bytes))
            shown = None
            if below:
                sizes = [image["size_bytes"] for image in rest]
                stand_ins = [differences.Below(*one) for one in zip(below, sizes, strict=True)]
                shown = kept.enter_context(differences.stand_in(ctx, stand_ins))
            argv = qemuimg.rebase(top, [deleted, *below], shown)
            fixes.run_tool(ctx, repo, argv, upper["size_bytes"])
            ctx.tool(qemuimg.name_backing(top, below[0] if below else None))

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        return {**self._merged, "status": models.settled({**known, **self._merged})}

    def after(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        removal.clean_held(repo, ctx.session, ctx.argument["names"]["merged"])
        tidy(ctx, repo, ctx.record)


def _check_alone(repo: Repository, upper: record.Record, lower: record.Record) -> None:
    """Under both leases nobody gets to need the lower one, nor is it brought back. Raises `RecordChanged`."""
    users = chain.dependents(lower["id"], removal.entities(repo))
    if not lower["deleted"] or upper["base"] != lower["id"] or users != [upper["id"]]:
        raise errors.RecordChanged(entity=lower["id"], state="it is needed by others, or not deleted, by now")


def _direction(repo: Repository, upper: record.Record, lower: record.Record) -> str:
    """What writes less: pushing writes at most what the upper data takes, pulling what the lower takes.

    A push into a larger image would leave a larger one. Raises `RepositoryFull` when there is no room for it.
    """
    cost = {
        PUSH: repo.allocated_bytes(upper["data"]["name"]),
        PULL: repo.allocated_bytes(lower["data"]["name"]),
    }
    if lower["size_bytes"] > upper["size_bytes"]:
        del cost[PUSH]
    direction = min(cost, key=lambda way: cost[way])
    if cost[direction] > repo.space().free_bytes:
        raise errors.RepositoryFull(repo_id=repo.repo_id)
    return direction


def _pulled_bytes(ctx: worker.Context, lower: qemuimg.Layer, size_bytes: int) -> int:
    """What pulling writes at most of `lower` and of tables: what it says to be zeros takes no space there, and is
    written where something lies below."""
    said = json.loads(ctx.tool(qemuimg.extents(lower), limits=qemuimg.limits(size_bytes)).stdout)
    present_bytes = sum(int(extent["length"]) for extent in said if extent["present"])
    return present_bytes + qemuimg.most_bytes(models.QCOW2, size_bytes) - size_bytes


def _room_bytes(repo: Repository, into: record.Record, other: record.Record, brought_bytes: int) -> int:
    """What the data of `into` takes at most with `brought_bytes` of `other`, for the larger of the two."""
    most = qemuimg.most_bytes(into["data"]["format"], max(into["size_bytes"], other["size_bytes"]))
    if into["data"]["format"] == models.RAW or other["data"]["format"] == models.RAW:
        return most
    return min(most, repo.allocated_bytes(into["data"]["name"]) + brought_bytes)


def _with_names(known: record.Record, **names: Any) -> record.Record:
    return {**known, "work": {**known["work"], "names": {**known["work"]["names"], **names}}}


def _pushed_into(repo: Repository, lower: record.Record) -> record.Record:
    work = {**models.work(findings.MERGE_IMAGE, repo.host_id, {}), "state": "interrupted"}  # of the upper one's record
    return {**lower, "status": models.BROKEN, "work": work}


@worker.body(findings.OPTIMIZE_IMAGE)
class OptimizeImage(fixes.Fix):
    stages = copying.STAGES

    def run(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        images = fixes.claimed_chain(repo, ctx.argument)
        with repo.reading(copying.names_of(images)):
            made = {**ctx.record, "data": _fast(ctx.argument)}
            copying.fill(ctx, repo, made, copying.layers_of(repo, images))

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        stored = {"data": _fast(ctx.argument), "base": None}
        return {**stored, "status": models.settled({**known, **stored})}

    def undo(self, ctx: worker.Context) -> None:
        self.target(ctx.argument).remove_data(ctx.argument["names"]["data"])

    def after(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        tidy(ctx, repo, ctx.record)
        ctx.session.release(lease for lease in self.leases(ctx.argument) if lease.shared)  # to be cleaned, exclusively
        removal.clean(repo, ctx.session, *sorted(chain.needs(ctx.record)))


def _fast(argument: worker.Argument) -> dict[str, str]:
    return {"name": argument["names"]["data"], "format": models.RAW}


@worker.body(findings.RELINK_IMAGE)
class RelinkImage(fixes.Fix):
    def run(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        top, *below = copying.layers_of(repo, fixes.claimed_chain(repo, ctx.argument))
        with repo.changing(ctx.record["data"]["name"]):
            ctx.tool(qemuimg.name_backing(top, below[0] if below else None))


# -- both ------------------------------------------------------------------------------------------------------------


def tidy(ctx: worker.Context, repo: Repository, before: record.Record) -> None:
    """After the record of an image was switched from what it was `before`: its old data goes, if nobody needs it, and
    the headers of those above it name the new one. The image's lease is held, so nobody runs on any of them."""
    image = repo.get(before["id"])
    if image["data"] == before["data"]:
        return
    removal.remove_unnamed(repo, [before["data"]["name"]])
    file = copying.layers_of(repo, [image])[0]
    for above in repo.images().values():
        if above["base"] == image["id"] and above["data"]["format"] == models.QCOW2:
            passing = contextlib.suppress(errors.ImageBusy, errors.ImageInUse, errors.NoSuchImage)
            with passing, repo.owning(ctx.session, exclusive=[above["id"]]), repo.changing(above["data"]["name"]):
                ctx.tool(qemuimg.name_backing(copying.layers_of(repo, [above])[0], file))
