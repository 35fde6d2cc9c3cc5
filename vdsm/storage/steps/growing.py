"""Room for what a VM writes, where data is a volume that begins small (`rules/rooms.py`).

Before a VM is started its disk gets a step of room, under the disk's data lease. While it runs, this host grows the
volume: its QEMU has the lease, so nobody else does. How large a volume is stands in no record, so nothing is committed;
LVM's metadata is old or new, and another host that activates the volume later sees its present size. Runs in a
repository's I/O child.
"""

import contextlib
from typing import Any

from vdsm import errors, leases
from vdsm.storage.repository import Repository


def make_room(repo: Repository, session: leases.Session, argument: dict[str, Any]) -> None:
    """A step of room for a VM that is going to be started on the disk `image_id`, as far as there is any: a VM may
    start in a full repository, and read, or free something. The disk was shown, and is kept so."""
    image_id = argument["image_id"]
    with repo.owning(session, exclusive=[image_id]):
        disk = repo.get(image_id)
        with contextlib.suppress(errors.RepositoryFull):
            repo.grow(disk["data"], disk["size_bytes"], repo.written_bytes(disk["data"]))


def grow_disk(repo: Repository, argument: dict[str, Any]) -> int | None:
    """See `Repository.grow`, for the disk `image_id` of a VM of this host. argument: image_id, written_bytes."""
    disk = repo.get(argument["image_id"])
    return repo.grow(disk["data"], disk["size_bytes"], argument["written_bytes"])
