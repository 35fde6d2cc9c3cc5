"""The repository formats by name."""

from typing import Any

from supervdsm import client as helper_client
from vdsm import config, errors
from vdsm.storage import repository
from vdsm.storage.formats import clvm, localfs, nfs

_FORMATS: dict[str, type[repository.Repository]] = {kind.format: kind for kind in (localfs.LocalFs, nfs.Nfs, clvm.Clvm)}
NAMES = tuple(sorted(_FORMATS))


def describe(
    repo_format: str, parameters: dict[str, Any], repo_id: str, host_id: int, storage: config.Storage
) -> repository.Description:
    """The description of a repository whose header was not read yet; checks `parameters`, touches nothing.

    Raises `UnknownFormat`, `InvalidParameters`, `PathNotAllowed`.
    """
    common = {"format": repo_format, "name": "", "sector_bytes": 512, "host_id": host_id, "repo_id": repo_id}
    return {**common, **_kind(repo_format).describe(parameters, storage)}


def is_shared(repo_format: str) -> bool:
    """Whether several hosts may be connected to a repository of that format. Raises `UnknownFormat`."""
    return _kind(repo_format).abilities.shared


def bring_up(helper: helper_client.Helper, description: repository.Description, *, new: bool) -> repository.Description:
    """See `Repository.bring_up`."""
    return _kind(description["format"]).bring_up(helper, description, new=new)


def take_down(helper: helper_client.Helper, description: repository.Description) -> None:
    """See `Repository.take_down`."""
    _kind(description["format"]).take_down(helper, description)


def bring_back(helper: helper_client.Helper, description: repository.Description) -> None:
    """See `Repository.bring_back`."""
    _kind(description["format"]).bring_back(helper, description)


def extend(
    helper: helper_client.Helper, description: repository.Description, devices: list[str], overwrite: list[str]
) -> None:
    """See `Repository.extend`."""
    _kind(description["format"]).extend(helper, description, devices, overwrite)


def open(description: repository.Description) -> repository.Repository:
    """The repository that `description` means; touches nothing. Raises `UnknownFormat`."""
    return _kind(description["format"])(description)


def _kind(repo_format: str) -> type[repository.Repository]:
    if repo_format not in _FORMATS:
        raise errors.UnknownFormat(repo_format=repo_format, known=", ".join(NAMES))
    return _FORMATS[repo_format]
