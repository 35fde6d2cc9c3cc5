"""What the documents say must be there is there."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target
