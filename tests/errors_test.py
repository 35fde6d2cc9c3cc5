"""Errors: templates over facts, and what the wire gets of them."""

import pytest

from vdsm import errors


@pytest.mark.parametrize("key", errors.VdsmError.by_key)
def test_every_error_can_be_said_without_its_facts(key: str) -> None:
    """A fact that was left out must not fail inside the error; braces in a text must be placeholders."""
    kind = errors.VdsmError.by_key[key]
    wire = kind().to_wire()
    assert (wire["code"], wire["data"]["key"]) == (kind.code, key)
    assert wire["message"] and wire["data"]["hint"]
    assert errors.VdsmError.from_wire(wire).to_wire() == wire


def test_the_hint_is_a_template_too() -> None:
    error = errors.UnknownFormat(repo_format="xfs", known="localfs-1.0")
    assert str(error) == "Unknown repository format xfs"
    assert error.to_wire()["data"]["hint"] == "Known formats: localfs-1.0."


def test_what_an_error_speaks_of_in_the_wires_words() -> None:
    assert errors.UnknownFormat.fact_names() == ("repoFormat", "known")
    assert errors.UnknownFormat.templates() == ("Unknown repository format {repoFormat}", "Known formats: {known}.")
    assert errors.Stopping.fact_names() == ()


@pytest.mark.parametrize(
    ("kind", "branch"), [(errors.NoSuchVm, errors.Missing), (errors.Unexpected, errors.Failed)], ids=str
)
def test_the_branch_says_what_the_caller_can_do(kind: type[errors.VdsmError], branch: type[errors.VdsmError]) -> None:
    assert kind.branch() is branch
    assert branch.__doc__
