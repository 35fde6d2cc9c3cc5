"""What a VM is asked to be is written twice, for the wire and for the room of VMs: the two agree, field by field."""

import dataclasses
import types
import typing
from typing import Any

import pydantic
import pytest
from pydantic_core import PydanticUndefined

from vdsm import ids
from vdsm.api import vm
from vdsm.virt import spec


def pairs(wire: Any, inner: Any) -> typing.Iterator[tuple[Any, Any]]:
    """The model and the dataclass, and those inside them that stand at the same place."""
    yield wire, inner
    hints = typing.get_type_hints(inner)
    for name, info in wire.model_fields.items():
        for its_wire, its_inner in zip(parts(info.annotation), parts(hints.get(name)), strict=False):
            if isinstance(its_wire, type) and issubclass(its_wire, pydantic.BaseModel):
                yield from pairs(its_wire, its_inner)


def parts(hint: Any) -> typing.Iterator[Any]:
    """The types that a type is made of, from the outside in."""
    yield typing.get_origin(hint) or hint
    for argument in typing.get_args(hint):
        yield from parts(argument)


def spelt(hint: Any) -> list[Any]:
    """`hint` so that it can be compared: models and dataclasses by their names, all maps as one."""
    names: dict[Any, Any] = {types.UnionType: typing.Union}
    found = [names.get(part, part) for part in parts(hint)]
    return [
        "map" if part in (dict, typing.get_origin(typing.Mapping[str, str])) else getattr(part, "__name__", part)
        for part in found
    ]


PAIRS = list(pairs(vm.VmSpec, spec.VmSpec))


def test_all_parts_are_compared() -> None:
    assert [wire.__name__ for wire, _ in PAIRS] == ["VmSpec", "DirectKernel", "Disk", "Nic", "Vnc"]


@pytest.mark.parametrize(("wire", "inner"), PAIRS, ids=[wire.__name__ for wire, _ in PAIRS])
def test_the_fields_agree(wire: type[pydantic.BaseModel], inner: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(inner)}
    hints = typing.get_type_hints(inner)
    assert set(wire.model_fields) == set(fields)
    for name, info in wire.model_fields.items():
        field = fields[name]
        given = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        required = given is dataclasses.MISSING
        assert info.is_required() == required, name
        assert info.default is PydanticUndefined or info.default == given, name
        assert spelt(info.annotation) == spelt(hints[name]), name


def test_nothing_is_lost_on_the_way_in_and_out() -> None:
    asked = {
        "vmId": ids.new(),
        "name": "web-1",
        "memory": 64,
        "vcpus": 2,
        "machine": "pc",
        "firmware": "uefi",
        "bootOrder": ["network", "disk"],
        "directKernel": {"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": "quiet"},
        "disks": [
            {"imageId": ids.new(), "repoId": "main", "bus": "scsi", "readOnly": True, "serial": "s", "bootOrder": 2}
        ],
        "nics": [{"type": "user", "model": "e1000", "mac": "52:54:00:00:00:01"}],
        "consoleLog": False,
        "vnc": {"listen": "127.0.0.1", "password": "secret"},
        "agentChannel": False,
        "customProperties": {"colour": "red"},
        "leaseRepoId": "main",
        "onLeaseLost": "kill",
    }
    wire = vm.VmSpec.model_validate(asked)
    assert wire.model_fields_set == set(vm.VmSpec.model_fields), "this test must name every field"
    known = spec.VmSpec.parse(wire.model_dump())
    told = vm._wire_spec(known.to_dict())
    assert "password" not in told["vnc"]
    told["vnc"]["password"] = "secret"
    assert told == asked
