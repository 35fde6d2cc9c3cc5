"""The law of floors: a file imports from lower floors, or from files above it in the list of its own room.

Rooms on one floor do not import each other. Late imports and imports under TYPE_CHECKING count: they are edges of the
house all the same. `docs/architecture.md` draws what this file enforces.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Floor by floor, room by room. A room is a list of modules in the order in which they may build on each other; a
# package stands for all its modules, which may import each other freely unless ORDERED lists them.
FLOORS: list[dict[str, list[str]]] = [
    {
        "base": ["vdsm.errors", "vdsm.ids", "vdsm.sizes"],
        "contract": ["supervdsm.contract", "supervdsm.calls"],
    },
    {
        "tools": [
            "vdsm.config",
            "vdsm.logs",
            "vdsm.programs",
            "vdsm.undo",
            "vdsm.periodic",
            "vdsm.events",
            "vdsm.channels",
            "vdsm.forkserver",
            "vdsm.lines",
            "vdsm.hypervisor",
            "vdsm.leader",
            "vdsm.leases",
            "vdsm.record",
            "vdsm.leased_exec",
        ],
        "client": ["vdsm.client"],
        "helper client": ["supervdsm.client", "vdsm.roothelper"],
    },
    {"jobs": ["vdsm.jobs"], "hooks": ["vdsm.hooks"]},
    {
        "storage": [
            "vdsm.storage.rules",
            "vdsm.storage.files",
            "vdsm.storage.repository",
            "vdsm.storage.formats",
            "vdsm.storage.lockspaces",
            "vdsm.storage.steps",
            "vdsm.storage.bodies",
            "vdsm.storage",
        ],
        "host": ["vdsm.host"],
    },
    {"virt": ["vdsm.virt"]},
    {"api": ["vdsm.api"]},
    {"main": ["vdsm.daemon", "vdsm.standalone", "vdsm.tool", "vdsm.__main__"]},
]
# The root helper's own rooms: they see their contract and each other, nothing of vdsm.
HELPER = "supervdsm"
# What the agent may import of it.
REACHED = ("supervdsm.client", "supervdsm.contract", "supervdsm.calls")
# These run without the agent's dependencies: standard library, plus what is named.
LEAN = {
    "vdsm.errors": set(),
    "vdsm.ids": set(),
    "vdsm.sizes": set(),
    "vdsm.leader": set(),
    "vdsm.leases": {"sanlock"},
    "vdsm.record": set(),
    "vdsm.leased_exec": {"sanlock"},
    "vdsm.client": set(),
    "vdsm.hooks.scripts": set(),
    "supervdsm": set(),
}
# One importer for each of these.
SOLE_IMPORTERS = {"sanlock": {"vdsm.leases"}, "libvirt": {"vdsm.hypervisor"}, "pyudev": {"vdsm.storage.devices"}}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("vdsm", "supervdsm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Every module that `name` imports, at any depth of its code."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def place(name: str) -> tuple[int, str, int]:
    """(floor, room, position in the room) of a module."""
    for number, floor in enumerate(FLOORS):
        for room, members in floor.items():
            for position, member in enumerate(members):
                if name == member or name.startswith(member + "."):
                    return number, room, position
    raise AssertionError(f"{name} has no place in the house: give it one in tests/floors_test.py and the architecture")


def in_house(name: str) -> bool:
    return name not in ("vdsm", "supervdsm") and name.split(".")[0] in ("vdsm", "supervdsm")


HOUSE = [name for name in MODULES if in_house(name) and (not name.startswith(HELPER) or name.count(".") == 1)]


@pytest.mark.parametrize("name", [name for name in HOUSE if name.split(".")[0] == "vdsm"])
def test_imports_only_downward(name: str) -> None:
    floor, room, position = place(name)
    for wanted in imports(name):
        if not in_house(wanted):
            continue
        assert not wanted.startswith("supervdsm") or wanted in REACHED or wanted.startswith("supervdsm.calls."), (
            f"{name} imports {wanted}: the root helper is reached through its client"
        )
        its_floor, its_room, its_position = place(wanted)
        below = its_floor < floor
        beside = (its_floor, its_room) == (floor, room) and its_position <= position
        assert below or beside, f"{name} (floor {floor}, {room}) imports {wanted} (floor {its_floor}, {its_room})"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(HELPER)])
def test_root_helper_sees_nothing_of_the_agent(name: str) -> None:
    assert [wanted for wanted in imports(name) if wanted.split(".")[0] == "vdsm"] == []


@pytest.mark.parametrize("name", [name for name in HOUSE if name.startswith("vdsm.virt")])
def test_virt_uses_storage_through_its_door(name: str) -> None:
    inner = [wanted for wanted in imports(name) if wanted.startswith("vdsm.storage.")]
    assert inner == [], f"{name} reaches past the door vdsm.storage: {inner}"


@pytest.mark.parametrize("name", MODULES)
def test_lean_modules_need_only_the_standard_library(name: str) -> None:
    for prefix, allowed in LEAN.items():
        if name == prefix or name.startswith(prefix + "."):
            foreign = {wanted.split(".")[0] for wanted in imports(name)} - set(sys.stdlib_module_names)
            assert foreign - {"vdsm", "supervdsm"} <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_sole_importers(name: str) -> None:
    for library, importers in SOLE_IMPORTERS.items():
        if any(wanted.split(".")[0] == library for wanted in imports(name)):
            assert name in importers, f"only {importers} may import {library}"


def test_the_fork_server_carries_nothing_of_the_agents_side() -> None:
    """What the job bodies import is copied, page table by page table, into every worker and repository child."""
    script = (
        "import importlib, sys; from vdsm import storage, virt; from vdsm.jobs import worker;"
        "[importlib.import_module(name) for name in (worker.__name__, *storage.preload(), *virt.preload())];"
        "print(*{'libvirt', 'aiohttp', 'uvloop', 'jsonrpcserver', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
