"""The table of slots: what is written is found, whatever sector of a write was lost, and stale bytes are no entries."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from vdsm import ids
from vdsm.storage.formats import slottable

NAME = "2c6ab5ea-3c0a-4d14-9d0e-2f3d25c4b1c9"
OTHER = "9f1b9c72-8d4d-4ff3-93c6-50a7d2f3a001"
OFFSET, SIZE = 4096, 2 * (64 << 10)
BLOCK = 4096

owners = st.uuids(version=4).map(str)
kinds = st.sampled_from([slottable.IMAGE, slottable.VM])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "slots"
    made.write_bytes(bytes(OFFSET + SIZE))
    return made


def opened(path: Path, name: str = NAME) -> slottable.Table:
    return slottable.Table(str(path), name, OFFSET, SIZE)


def content(path: Path) -> bytes:
    return path.read_bytes()[OFFSET:]


def test_owners_are_found_by_kind(path: Path) -> None:
    table, image, vm = opened(path), ids.new(), ids.new()
    table.write(0, slottable.OWN, NAME)
    table.write(1, slottable.IMAGE, image)
    table.write(2, slottable.VM, vm)
    assert table.find(slottable.IMAGE, image) == slottable.Entry(1, slottable.IMAGE, image)
    assert table.find(slottable.VM, vm) == slottable.Entry(2, slottable.VM, vm)
    assert table.find(slottable.VM, image) is table.find(slottable.IMAGE, vm) is None
    assert [entry.id for entry in table.entries()] == [NAME, image, vm]


def test_slots_are_given_out_from_the_first_on_and_again(path: Path) -> None:
    table = opened(path)
    for number in range(3):
        assert table.unused() == (number, False)
        table.write(number, slottable.IMAGE, ids.new())
    table.write(1, slottable.FREE, None)
    assert table.unused() == (1, True)


def test_full_table_has_no_slot_left(path: Path) -> None:
    table = opened(path)
    whole = b"".join(slottable.encode(NAME, number, slottable.IMAGE, ids.new()) for number in range(table.places))
    path.write_bytes(bytes(OFFSET) + whole)
    assert table.unused() is None
    assert len(table.entries()) == table.places == SIZE // 64


@hypothesis.given(known=st.lists(st.tuples(kinds, owners), max_size=60), data=st.data())
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_torn_write_leaves_the_old_table_or_the_new_one(
    path: Path, known: list[tuple[int, str]], data: st.DataObject
) -> None:
    """Each sector of the block that a write replaces is the old or the new one, in any choice."""
    path.write_bytes(bytes(OFFSET + SIZE))
    table = opened(path)
    for number, (kind, owner) in enumerate(known):
        table.write(number, kind, owner)
    before = content(path)
    number = data.draw(st.integers(0, len(known)))
    wanted = data.draw(st.one_of(st.none(), st.tuples(kinds, owners)))
    table.write(number, *(wanted or (slottable.FREE, None)))
    after = content(path)
    sector = data.draw(st.sampled_from([512, 4096]))
    new = data.draw(st.sets(st.integers(0, len(before) // sector - 1)))
    torn = b"".join(
        (after if at in new else before)[at * sector : (at + 1) * sector] for at in range(len(before) // sector)
    )
    assert torn in (before, after), "a write reaches into two sectors"
    path.write_bytes(bytes(OFFSET) + torn)
    for at, (kind, owner) in enumerate(known):
        found = table.find(kind, owner)
        assert found == slottable.Entry(at, kind, owner) or (at == number and torn == after)


@hypothesis.given(
    number=st.integers(0, 20), at=st.integers(0, 63), bit=st.integers(0, 7), owner=owners, missing=owners, kind=kinds
)
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_changed_bit_is_never_an_answer(
    path: Path, number: int, at: int, bit: int, owner: str, missing: str, kind: int
) -> None:
    """Neither another's slot, nor "there is none", nor a slot to give out."""
    hypothesis.assume(owner != missing)
    path.write_bytes(bytes(OFFSET + SIZE))
    table = opened(path)
    for before in range(number):
        table.write(before, slottable.FREE, None)
    table.write(number, kind, owner)
    raw = bytearray(path.read_bytes())
    raw[OFFSET + number * 64 + at] ^= 1 << bit
    path.write_bytes(raw)
    for sought in (owner, missing):
        with pytest.raises(slottable.Damaged):
            table.find(kind, sought)
    assert table.unused() == ((0, True) if number else (1, False))


@pytest.mark.parametrize("stale", ["another repository's", "another place's"])
def test_entry_of_another_table_is_none_of_this(path: Path, stale: str) -> None:
    """A volume holds what lay there before."""
    name, number = (OTHER, 0) if stale == "another repository's" else (NAME, 1)
    path.write_bytes(bytes(OFFSET) + slottable.encode(name, number, slottable.IMAGE, NAME) + bytes(SIZE - 64))
    with pytest.raises(slottable.Damaged):
        opened(path).find(slottable.IMAGE, NAME)


def test_one_of_two_thousand_is_found_by_reading_the_table_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, known = opened(path), [ids.new() for _ in range(2000)]
    whole = b"".join(slottable.encode(NAME, number, slottable.IMAGE, owner) for number, owner in enumerate(known))
    path.write_bytes(bytes(OFFSET) + whole + bytes(SIZE - len(whole)))
    decoded: list[int] = []
    real = slottable.decode

    def counted(name: str, number: int, data: bytes) -> slottable.Entry | None:
        decoded.append(number)
        return real(name, number, data)

    monkeypatch.setattr(slottable, "decode", counted)  # how much work it is, not how long it takes
    assert table.find(slottable.IMAGE, known[1500]) == slottable.Entry(1500, slottable.IMAGE, known[1500])
    assert decoded == [1500]
