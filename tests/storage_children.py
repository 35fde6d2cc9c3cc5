"""What the tests of repository children let a child do besides the storage verbs."""

import os
import time
from pathlib import Path
from typing import Any

from vdsm import channels, errors
from vdsm.storage import ioproc, repository


def sleep(repo: repository.Repository, argument: dict[str, Any]) -> str:
    time.sleep(argument["seconds"])
    return "slept"


def pid(repo: repository.Repository, argument: dict[str, Any]) -> int:
    return os.getpid()


def die(repo: repository.Repository, argument: dict[str, Any]) -> None:
    os._exit(3)


def fail(repo: repository.Repository, argument: dict[str, Any]) -> None:
    if argument["how"] == "named":
        raise errors.NoSuchImage(image_id="x", where=repo.repo_id)
    if argument["how"] == "storage":
        raise OSError(argument["errno"], "as the kernel says it")
    raise RuntimeError("secret of the implementation")


def touch(repo: repository.Repository, argument: dict[str, Any]) -> str:
    """Writes to the repository's file system, which may be frozen."""
    Path(repo.place, "touched").write_bytes(os.urandom(4096))
    return "touched"


def serve(description: dict[str, Any], channel: channels.Channel) -> None:
    for function in (sleep, pid, die, fail, touch):
        ioproc.PLAIN[function.__name__] = function
    ioproc.serve(description, channel)
