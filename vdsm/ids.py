"""Identifiers: what they look like, how they are made and checked.

Images, VMs and jobs are UUIDs in lower case. A repository id is a transient handle that the caller chooses.
"""

import re
import uuid

from vdsm import errors

UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
REPO_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


def new() -> str:
    """A fresh random UUID."""
    return str(uuid.uuid4())


def check_uuid(value: str, parameter: str) -> str:
    """`value` in lower case, or `InvalidParameters` naming `parameter`."""
    lowered = value.lower()
    if not re.fullmatch(UUID_PATTERN, lowered):
        raise errors.InvalidParameters(parameter=parameter, reason="not a UUID")
    return lowered
