"""What an administrator does after a crash: asks each repository what there is to fix, and has all of it fixed."""

from tests.crash import hosts, scenes

_ROUNDS = 12  # a chain is merged one image at a time


def recover(agent: hosts.Agent) -> list[str]:
    """Fixes until no check lists anything any more; what one lists all the same in the end, in words."""
    for _ in range(_ROUNDS):
        found = [(place, fix) for place in scenes.PLACES for fix in agent.storage.check_storage_repository(place)]
        if not found:
            return []
        for place, fix in found:
            agent.ended(agent.storage.fix_storage_repository(place, fix)["job_id"])
    return [f"listed after {_ROUNDS} rounds of fixes: {fix['description']}" for _, fix in found]
