"""What an administrator does after a crash: asks each repository what there is to fix, and has all of it fixed."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tests.crash import hosts, scenes
from vdsm import errors
from vdsm.client import failures

_ROUNDS = 12  # a chain is merged one image at a time


FAILURES = (errors.VdsmError, hosts.Failed, failures.ClientError)


class Mender(Protocol):
    """Whoever has fixes done: an agent, or how one is called."""

    @property
    def storage(self) -> Any: ...

    def ended(self, job_id: str | None) -> None:
        """As `hosts.Agent.ended`."""

    def later(self) -> None:
        """A minute has passed: hosts have let go of what nobody uses there."""


def recover(agent: Mender) -> list[str]:
    """Fixes until no check lists anything any more; what one lists all the same in the end, in words. At first images
    may be in use, where somebody died."""
    for number in range(_ROUNDS):
        lists = everywhere(agent.storage.check_storage_repository)
        found = [(place, fix) for place, fixes in lists for fix in fixes]
        if not found:
            return []
        for place, fix in found:
            try:
                agent.ended(agent.storage.fix_storage_repository(place, fix)["job_id"])
            except FAILURES as error:
                if number or getattr(error, "key", None) != errors.ImageInUse.key:
                    raise
        agent.later()
    return [f"listed after {_ROUNDS} rounds of fixes: {fix['description']}" for _, fix in found]


def everywhere(act: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """(repository, what `act` answers of it), of both, which are asked at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as at_once:
        yield from zip(scenes.PLACES, at_once.map(act, scenes.PLACES), strict=True)
