"""What hook scripts import: the contract with the agent, as functions.

    #!/usr/bin/python3
    import hooking

    domain = hooking.read_domxml()
    ...
    hooking.write_domxml(domain)

A script finds the domain's XML in the file that `_hook_domxml` names, or a JSON object in that of `_hook_json`, may
change it there, and says by its exit code how it went: 0 well, 1 failed but go on with the other scripts, 2 failed and
run no others. Custom properties of the VM are variables of its environment, `vmId` is the VM's id. Names and signatures
are those that scripts for VDSM know. Stands alone: standard library only.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from xml.dom import minidom

STOP = 2

# Variables that name the files.
_DOMXML, _JSON, _LAUNCH_FLAGS, _VM = "_hook_domxml", "_hook_json", "_hook_launchflags", "vmId"


def read_domxml() -> minidom.Document:
    """The domain."""
    return minidom.parseString(_file(_DOMXML).read_bytes())


def write_domxml(domxml: minidom.Document) -> None:
    """Leaves the changed domain for the next script and the agent."""
    _replace(_file(_DOMXML), domxml.toxml(encoding="utf-8"))


def read_json() -> Any:
    """The object."""
    return json.loads(_file(_JSON).read_bytes())


def write_json(data: Any) -> None:
    """Leaves the changed object for the next script and the agent."""
    _replace(_file(_JSON), json.dumps(data).encode())


def log(message: object) -> None:
    """A line for the agent's log; the last lines are shown with the script's result."""
    print(message, file=sys.stderr)


def exit_hook(message: object, return_code: int = STOP) -> NoReturn:
    """Ends the script with a word to whoever asked; by default nothing after it is run."""
    log(message)
    sys.exit(return_code)


def tobool(value: object) -> bool:
    """Yes or no of a property: "true" in any case and whole numbers but 0 are yes, everything else is no."""
    text = str(value).strip().lower()
    return text == "true" or (text.lstrip("+-").isdigit() and int(text) != 0)


def load_vm_launch_flags_from_file(vm_id: str) -> int:
    """libvirt's flags for the start of the VM, as scripts before this one left them. At before_vm_start only."""
    return int(_launch_flags(vm_id).read_text())


def dump_vm_launch_flags_to_file(vm_id: str, flags: int) -> None:
    """Leaves flags for the start of the VM. At before_vm_start only."""
    _replace(_launch_flags(vm_id), str(int(flags)).encode())


def execCmd(
    command: Sequence[str],
    sudo: bool = False,
    cwd: str | None = None,
    data: bytes | str | None = None,
    raw: bool = False,
    printable: object = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, Any, Any]:
    """Runs a command to its end: (exit code, output, error output), each a list of lines in bytes, or bytes if `raw`.

    `sudo` asks for root without a password. `data` is its input. `printable` has no use here.
    """
    argv = [*(["sudo", "-n"] if sudo else []), *command]
    given = data.encode() if isinstance(data, str) else data
    stdin = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    done = subprocess.run(argv, capture_output=True, cwd=cwd, env=env, **stdin)
    if raw:
        return done.returncode, done.stdout, done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def _file(variable: str) -> Path:
    if variable not in os.environ:
        raise KeyError(f"{variable}: the agent gives no such file at this hook point")
    return Path(os.environ[variable])


def _launch_flags(vm_id: str) -> Path:
    if vm_id.lower() != os.environ[_VM].lower():
        raise ValueError(f"this script is about VM {os.environ[_VM]}, not {vm_id}")
    return _file(_LAUNCH_FLAGS)


def _replace(path: Path, content: bytes) -> None:
    """As a whole or not at all: a script that dies while it writes leaves what was there."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
