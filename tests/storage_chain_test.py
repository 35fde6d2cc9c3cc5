"""How images depend on each other, from records alone."""

from typing import Any

import pytest

from vdsm import errors
from vdsm.storage.rules import chain


def image(name: str, base: str | None = None, state: str = "done", **names: Any) -> dict[str, Any]:
    return {"id": name, "base": base, "data": {"name": f"{name}.data"}, "work": {"state": state, "names": names}}


def machine(state: str, **names: Any) -> dict[str, Any]:
    return {"id": "vm", "work": {"state": state, "names": names}}


def test_chain_is_followed_to_its_end() -> None:
    images = {"a": image("a", "b"), "b": image("b", "c"), "c": image("c"), "d": image("d", "c")}
    assert [found["id"] for found in chain.down("a", images.get)] == ["a", "b", "c"]


@pytest.mark.parametrize("base", ["missing", "a"], ids=["missing", "ring"])
def test_chain_without_an_end_is_no_chain(base: str) -> None:
    images = {"a": image("a", "b"), "b": image("b", base)}
    with pytest.raises(errors.ImageNotUsable):
        chain.down("a", images.get)


def test_dependents_are_those_on_top() -> None:
    images = [image("s"), image("a", "s"), image("b", "a"), image("c", "s")]
    assert chain.dependents("s", images) == ["a", "c"]
    assert chain.dependents("b", images) == []


@pytest.mark.parametrize(("state", "needed"), [("running", True), ("done", False)])
def test_open_snapshot_is_needed_by_its_disk(state: str, needed: bool) -> None:
    disk = image("d", None, state, snapshot="s", data="d.new")
    assert (chain.dependents("s", [disk]) == ["d"]) == needed
    assert chain.open_snapshot(disk) == ("s" if needed else None)


@pytest.mark.parametrize("state", ["queued", "running", "committing"])
def test_hidden_overlay_is_needed_by_its_vm(state: str) -> None:
    vm = machine(state, disks={"d": {"hidden": "h", "data": "d.new"}})
    assert chain.dependents("h", [vm]) == ["vm"]


def test_data_that_another_record_names_stays() -> None:
    half_made = {**image("s"), "data": {"name": "d.old"}}
    disk = {**image("d", None, "running", snapshot="s", data="d.new"), "data": {"name": "d.old"}}
    carried = ["d.old", "d.new", "d.orphan", "x.orphan"]
    assert chain.unused_data(disk, carried, [disk, half_made]) == ["d.new", "d.orphan"]
    assert chain.unused_data(disk, carried, [disk]) == ["d.new", "d.old", "d.orphan"]
    vm = machine("interrupted", disks={"d": {"hidden": "h", "data": "d.new"}})
    assert chain.unused_data(disk, carried, [disk, vm]) == ["d.old", "d.orphan"]


@pytest.mark.parametrize("state", ["done", "failed", "aborted"])
def test_what_ended_work_names_keeps_nothing(state: str) -> None:
    """A sysprep that is done has given the overlay to the disk: with that it goes."""
    overlaid = {**image("d"), "data": {"name": "d.new"}}
    vm = machine(state, disks={"d": {"hidden": "h", "data": "d.new"}})
    assert chain.unused_data(overlaid, ["d.new"], [overlaid, vm]) == ["d.new"]
    assert chain.dependents("h", [vm]) == [] and chain.standing_data(vm) == set()
    claimed = image("d", None, state, hidden="h", snapshot="s", size_bytes=1)
    assert (chain.claim(claimed), chain.open_snapshot(claimed), chain.open_resize(claimed)) == (None, None, None)
