"""Directories of localfs repositories."""

import dataclasses

from supervdsm.contract import AbsolutePath, Call


@dataclasses.dataclass(frozen=True)
class PreparedDirectory:
    """`created`: it was not there before."""

    path: str
    created: bool


@dataclasses.dataclass(frozen=True)
class PrepareDirectory(Call[PreparedDirectory], deadline_s=10):
    """Make a directory under a configured one ready for a localfs repository: owner, group, mode; made if absent."""

    path: AbsolutePath
