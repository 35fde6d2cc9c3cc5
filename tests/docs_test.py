"""What the documents say must be there is there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdsm.tool import reference

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
TRAPS = (ROOT / "docs" / "traps.md").read_text()


@pytest.mark.parametrize(("file", "test"), re.findall(r"`([\w/]+\.py)::(\w+)`", TRAPS))
def test_every_trap_names_a_test_that_exists(file: str, test: str) -> None:
    assert f"def {test}(" in (ROOT / "tests" / file).read_text()


def test_every_trap_that_code_names_is_explained() -> None:
    explained = set(re.findall(r"^\| (\d+) \|", TRAPS, re.MULTILINE))
    for path in [*ROOT.glob("vdsm/**/*.py"), *ROOT.glob("supervdsm/**/*.py")]:
        for numbers in re.findall(r"traps? ([\d, and]+\d|\d+)", path.read_text()):
            assert set(re.findall(r"\d+", numbers)) <= explained, path


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What `rpc.discover` of this source tree's agent answers."""
    return reference.document()


@pytest.fixture(scope="module")
def made(document: dict[str, Any]) -> dict[Path, str]:
    return {ROOT / path: text for path, text in reference.pages(document).items()}


def test_what_is_made_from_the_code_is_up_to_date(made: dict[Path, str]) -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in made.items() if not _is(path, text)]
    assert not stale, f"{stale} are not what the code says: run `make docs` (it takes seconds) and commit the result"


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def test_nothing_else_lies_among_what_is_made(made: dict[Path, str]) -> None:
    assert {path for path in (ROOT / "docs" / "reference").iterdir() if path not in made} == set()


def undescribed(document: dict[str, Any], where: str, schema: dict[str, Any], above: frozenset[str]) -> Iterator[str]:
    """The dotted names of members without a word about them."""
    for inner in (*schema.get("anyOf", ()), schema.get("items")):
        if isinstance(inner, dict):
            yield from undescribed(document, where, inner, above)
    target = schema.get("$ref", "").rsplit("/", 1)[-1]
    if target and target not in above:
        yield from undescribed(document, where, document["components"]["schemas"][target], above | {target})
    for name, member in schema.get("properties", {}).items():
        if not member.get("description"):
            yield f"{where}.{name}"
        yield from undescribed(document, f"{where}.{name}", member, above)


def test_every_verb_and_every_parameter_has_its_words(document: dict[str, Any]) -> None:
    silent = [method["name"] for method in document["methods"] if not method.get("summary")]
    for method in document["methods"]:
        for param in method["params"]:
            where = f"{method['name']} {param['name']}"
            silent += [] if param["description"] else [where]
            silent += undescribed(document, where, param["schema"], frozenset())
    assert silent == [], "a docstring, or pydantic.Field(description=...), is missing"


def test_required_parameters_come_first(document: dict[str, Any]) -> None:
    """OpenRPC's rule: by position, one could not leave out an optional one otherwise."""
    for method in document["methods"]:
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True), method["name"]


# -- what the pages refer to -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    known: dict[Path, set[str]] = {}
    for target, anchor in set(re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text())):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        if anchor:
            assert anchor in known.setdefault(place, anchors(place)), f"{target}#{anchor}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_pages_name_are_there(page: Path) -> None:
    """Paths in the source tree, by their first directory; `*` stands for what it does in a shell."""
    for named in re.findall(r"`((?:vdsm|supervdsm|tests|docs|benchmarks|systemd)/[\w./*-]+)`", page.read_text()):
        assert list(ROOT.glob(named.rstrip("/"))), named


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_of_make_that_pages_name_are_there(page: Path) -> None:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text(), re.MULTILINE)) <= known


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_verbs_that_pages_name_are_there(page: Path, document: dict[str, Any]) -> None:
    """`Namespace.verb` in back quotes, of the namespaces that there are."""
    known = {name for method in document["methods"] for name in (method["name"], *method["x-aliases"])}
    namespaces = "|".join({name.partition(".")[0] for name in known})
    assert set(re.findall(rf"`((?:{namespaces})\.[a-z]\w*)`", page.read_text())) <= known
