"""The environment of hook scripts: a clean one, with the VM's custom properties in it.

Properties come from whoever may create VMs, scripts run with the agent's rights. A property called LD_PRELOAD or PATH
would let the one command the other, so names need a rule, and a list of bad names is never complete. POSIX has one
(Base Definitions, 8.1): names without a lower-case letter belong to the system and its tools, the others to
applications. So a property has a lower-case letter in its name, as those of all known hooks do.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from vdsm import errors

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where `import hooking` finds it, alone, so that nothing else of ours is in a script's way.
MODULES = Path(__file__).resolve().parent / "scripts"
# Of the agent's own environment; none of these comes from a caller.
INHERITED = ("HOME", "USER", "LOGNAME", "TMPDIR")

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# http_proxy and the like are what tools read in lower case; vmId is the agent's.
RESERVED = re.compile(r"vmId|.*_proxy", re.IGNORECASE)
# Names and values together. The kernel takes 128 KiB for one; they also travel in the domain's metadata.
MAX_BYTES = 64 << 10


def refusal(name: str) -> str | None:
    """Why a custom property cannot have this name; None when it can."""
    if not NAME.fullmatch(name):
        return "letters, digits and '_' only, 64 at most, a letter first"
    if not any(letter.islower() for letter in name):
        return "needs a lower-case letter: all others are the system's"
    if RESERVED.fullmatch(name):
        return "is taken"
    return None


def check(properties: Mapping[str, str]) -> None:
    """Raises `InvalidParameters` unless scripts can get all of these."""
    for name, value in properties.items():
        reason = refusal(name)
        if reason is None and "\0" in value:
            reason = "its value holds a zero byte"
        if reason is not None:
            raise errors.InvalidParameters(parameter=f"custom_properties.{name}", reason=reason)
    if sum(len(name.encode()) + len(value.encode()) for name, value in properties.items()) > MAX_BYTES:
        raise errors.InvalidParameters(parameter="custom_properties", reason=f"more than {MAX_BYTES} bytes in all")


def build(properties: Mapping[str, str], vm_id: str, files: Mapping[str, Path]) -> dict[str, str]:
    """The whole environment of a script. `files` are those with its data, by variable. A property that `check` would
    refuse is left out: a VM may be older than a rule."""
    allowed = {name: value for name, value in properties.items() if refusal(name) is None and "\0" not in value}
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    own = {"PATH": PATH, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(MODULES), "PYTHONDONTWRITEBYTECODE": "1"}
    given = {"vmId": vm_id} if vm_id else {}
    return allowed | inherited | own | given | {name: str(path) for name, path in files.items()}
