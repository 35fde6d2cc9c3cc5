"""Filling an image from other storage: the job body of copyImage, and the parts that other bodies share.

The request has written the target's record (`copyintents.begin_copy`): broken, the work queued, the data named. The
worker holds the target's data lease exclusively and those of the whole source chain shared, and, when the target's
record names a base, those of all that the target is going to lie on. Then

    measure     the records are as planned; there is room for what a whole copy needs
    copy        the data is made anew, whole or as the difference to the base (`differences.py`), past the page cache;
                flushed to stable storage when the tool has ended
    (final)     record: optimized or degraded, generation + 1

A crash leaves a broken target whose record says how far it was; its data is never opened, only replaced or removed.
Failure: the data goes, the record stays, broken, with the reason. Abort: data, record and slot go.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from vdsm import errors, leases, record
from vdsm.jobs import worker
from vdsm.storage import formats
from vdsm.storage.bodies import differences
from vdsm.storage.files import qemuimg
from vdsm.storage.repository import Repository
from vdsm.storage.rules import chain, models
from vdsm.storage.steps import removal

MEASURE, COPY = STAGES = ("measure", "copy")


class Filling(worker.Body):
    """What fills an image that `begin_copy` has begun. argument: target (a description), image_id, and the source."""

    stages: ClassVar[Sequence[str]] = STAGES
    resumable = True

    def target(self, argument: worker.Argument) -> Repository:
        return formats.open(argument["target"])

    def entity(self, argument: worker.Argument) -> record.Slot:
        return self.target(argument).slot(argument["image_id"])

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        return [self.entity(argument).data_lease()]

    def commit(self, ctx: worker.Context, known: record.Record) -> dict[str, Any]:
        return {"status": models.settled(known)}

    def undo(self, ctx: worker.Context) -> None:
        repo = self.target(ctx.argument)
        image = repo.find(ctx.argument["image_id"])
        if image is not None:
            repo.remove_data(image["data"]["name"])

    def aborted(self, ctx: worker.Context, known: record.Record) -> None:
        """Nothing is left: the slot goes too, and its lease with it."""
        repo = self.target(ctx.argument)
        repo.free(ctx.session, self.entity(ctx.argument))


@worker.body("copyImage")
class CopyImage(Filling):
    """argument: target, image_id; source (a description), layers (records of the source's chain as planned).

    The base, if any, is the one that the target's own record names.
    """

    def leases(self, argument: worker.Argument) -> list[leases.Lease]:
        source, target = formats.open(argument["source"]), self.target(argument)
        below: list[leases.Lease] = []
        with contextlib.suppress(errors.ImageNotUsable):  # `run` tells
            below = [target.slot(image["id"]).data_lease(shared=True) for image in _below(target, argument["image_id"])]
        layers = [source.slot(layer["id"]).data_lease(shared=True) for layer in argument["layers"]]
        return [*super().leases(argument), *layers, *below]

    def run(self, ctx: worker.Context) -> None:
        source, target = formats.open(ctx.argument["source"]), self.target(ctx.argument)
        layers = ctx.argument["layers"]
        check_unchanged(source, layers)
        _check_size(layers[0], ctx.record)
        with source.reading(names_of(layers)):
            if ctx.record["base"] is None:
                fill(ctx, target, ctx.record, layers_of(source, layers))
            else:
                fill_difference(ctx, target, ctx.record, layers_of(source, layers))


def _check_size(source: record.Record, target: record.Record) -> None:
    """The source may have grown since the copy was begun, when that is mended later."""
    if source["size_bytes"] != target["size_bytes"]:
        now = f"it has {source['size_bytes']} bytes, the copy was begun with {target['size_bytes']}"
        raise errors.RecordChanged(entity=source["id"], state=now)


def _below(repo: Repository, image_id: str) -> list[record.Record]:
    """All that the image lies on, the nearest first; empty without a base. Raises `ImageNotUsable`."""
    image = repo.find(image_id)
    return chain.down(image["base"], repo.find) if image is not None and image["base"] else []


def check_unchanged(source: Repository, layers: Sequence[record.Record]) -> None:
    """Raises `RecordChanged` unless the chain is what the request was planned with. Its leases are held."""
    for planned in layers:
        found = source.get(planned["id"])
        for field in ("data", "base", "status", "generation"):
            if found[field] != planned[field]:
                raise errors.RecordChanged(entity=planned["id"], state=f"{field} is {found[field]}")


def layers_of(repo: Repository, images: Sequence[record.Record]) -> list[qemuimg.Layer]:
    """The files of a chain of images."""
    return [repo.layer(image["data"], image["size_bytes"]) for image in images]


def names_of(images: Sequence[record.Record]) -> list[str]:
    """The names of a chain's data, for `Repository.reading`."""
    return [image["data"]["name"] for image in images]


def fill(
    ctx: worker.Context,
    target: Repository,
    image: record.Record,
    layers: Sequence[qemuimg.Layer],
    *,
    grow: bool = False,
) -> None:
    """Makes the data of `image` a whole copy of the chain `layers`, on stable storage at return.

    `grow`: the chain is smaller than the image. The worker holds the leases of all of it, and its data is readable.
    Raises `RepositoryFull`, before anything is written if that can be known.
    """
    made = target.layer(image["data"], image["size_bytes"])
    limits = qemuimg.limits(image["size_bytes"])
    ctx.stage(MEASURE)
    required = image["size_bytes"]  # of a raw image, which is preallocated
    if made.format != models.RAW:
        required = json.loads(ctx.tool(qemuimg.measure(layers, made.format), limits=limits).stdout)["required"]
    if target.abilities.thin and required > target.space().free_bytes:  # a volume says so when it is made
        raise errors.RepositoryFull(repo_id=target.repo_id)
    ctx.stage(COPY)
    if grow and made.format != models.RAW:
        required += qemuimg.SPARE_BYTES
    try:
        with target.making(image["data"]["name"], required):
            ctx.tool(qemuimg.convert(layers, made), on_line=qemuimg.teller(ctx.progress), limits=limits)
            if grow and not made.is_raw_volume:
                ctx.tool(qemuimg.resize(made, image["size_bytes"]), limits=limits)
    except errors.ToolFailed as error:
        raise qemuimg.explain(error, target.repo_id) from error


def fill_difference(
    ctx: worker.Context, target: Repository, image: record.Record, layers: Sequence[qemuimg.Layer]
) -> None:
    """`fill` with the difference between `layers` and what the record of `image` says it lies on.

    How much room it needs is known when the comparing is done. Raises `RepositoryFull`, `ImageNotUsable`, and
    `RecordChanged` when what lies below the base was merged since the leases were named.
    """
    ctx.stage(MEASURE)
    base, held = _below(target, image["id"]), ctx.session.held()
    for found in base:
        lease = target.slot(found["id"]).data_lease(shared=True)
        if not {(lease.lockspace, lease.name, shared) for shared in (True, False)} & held:
            raise errors.RecordChanged(entity=found["id"], state="it has come to lie below the base")
        if found["status"] == models.BROKEN:
            raise errors.ImageNotUsable(image_id=found["id"], status=models.BROKEN)
    sizes = [found["size_bytes"] for found in base]
    below = [differences.Below(*one) for one in zip(layers_of(target, base), sizes, strict=True)]
    ctx.stage(COPY)
    try:
        with target.reading(names_of(base)):
            differences.make(ctx, target, image, layers, below)
    except errors.ToolFailed as error:
        raise qemuimg.explain(error, target.repo_id) from error


def changing(repo: Repository, image: record.Record) -> contextlib.AbstractContextManager[str]:
    """The path of an image's data, for a tool that may write all of it. On stable storage at the block's end."""
    most_bytes = qemuimg.most_bytes(image["data"]["format"], image["size_bytes"])
    return repo.changing(image["data"]["name"], most_bytes)


# -- for jobs that make images of their own: begin, fill, complete; or discard -----------------------------------------


def snapshot_fields(source: record.Record, asked: dict[str, Any], strategy: str) -> dict[str, Any]:
    """Fields for the record of a snapshot that is going to be a whole copy of `source`. `asked`: id, user_data."""
    data_format = models.RAW if strategy == models.PERFORMANCE else models.QCOW2
    data = {"name": models.data_name(asked["id"]), "format": data_format}
    kept = {"size_bytes": source["size_bytes"], "kind": models.SNAPSHOT, "strategy": strategy}
    return {**asked, **kept, "data": data, "digest": models.digest("copy", {"source": source["id"], **asked})}


def begin(
    repo: Repository, session: leases.Session, fields: dict[str, Any], work: dict[str, Any], vm: dict[str, str]
) -> record.Record:
    """The record of a new image, broken, for the worker's `work`. Its lease is held until `complete` or `discard`.

    `vm` tells where the record of the VM is that the work is on: {"repo": persistent name, "id"}.

    Raises `ImageExists`, `IdTaken`, `RepositoryFull`. Killed: a slot without a record, or a broken image.
    """
    slot = repo.allocate(session, fields["id"])
    repo.keep(session, fields["id"])
    known = repo.find(fields["id"])
    if known is not None and (known["work"] or {}).get("job_id") != work["job_id"]:
        session.release([slot.data_lease()])
        raise errors.ImageExists(image_id=fields["id"], repo_id=repo.repo_id)
    return record.create(slot, models.new(fields, repo.host_id, {**work, "names": {"vm": vm}}))


def complete(repo: Repository, session: leases.Session, image_id: str) -> None:
    """The image is what its data holds, which is on stable storage. May be called twice, and by another worker. One
    that was removed meanwhile stays so."""
    if repo.find(image_id) is None:
        return
    repo.keep(session, image_id)
    image = repo.get(image_id)
    if image["status"] == models.BROKEN and not image["deleted"]:
        repo.update(session, image_id, lambda found: models.done(found))
    session.release([repo.slot(image_id).data_lease()])


def discard(repo: Repository, session: leases.Session, image_id: str, job_id: str) -> None:
    """Nothing is left of an image that the job began; an image of that id that it did not begin stays."""
    known = repo.find(image_id)
    if known is not None:
        if (known["work"] or {}).get("job_id") != job_id:
            return
        repo.remove_data(known["data"]["name"])  # the VM's record still names it, so nobody would take it for unused
    removal.discard_held(repo, session, image_id)
