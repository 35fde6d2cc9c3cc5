"""What the documents say must be there is there."""

import re
from pathlib import Path

import pytest

from vdsm.tool import reference

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
TRAPS = (ROOT / "docs" / "traps.md").read_text()


@pytest.mark.parametrize(("file", "test"), re.findall(r"`(\w+\.py)::(\w+)`", TRAPS))
def test_every_trap_names_a_test_that_exists(file: str, test: str) -> None:
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_every_trap_that_code_names_is_explained() -> None:
    explained = set(re.findall(r"^\| (\d+) \|", TRAPS, re.MULTILINE))
    for path in [*ROOT.glob("vdsm/**/*.py"), *ROOT.glob("supervdsm/**/*.py")]:
        for numbers in re.findall(r"traps? ([\d, and]+\d|\d+)", path.read_text()):
            assert set(re.findall(r"\d+", numbers)) <= explained, path


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    """Also that everything is described: a verb, error, event, option or kind of job without words cannot be made."""
    stale = [str(path) for path, text in reference.pages().items() if not _is(ROOT / path, text)]
    assert not stale, f"{stale} are not what the code says: run `make docs` (it takes seconds) and commit the result"


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def test_nothing_else_lies_among_what_is_made() -> None:
    made = {ROOT / path for path in reference.pages()}
    assert {path for path in (ROOT / "docs" / "reference").iterdir() if path not in made} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
