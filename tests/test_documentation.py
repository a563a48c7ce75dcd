"""The pages agree with the code: settings, links, tests that are named, commands and Python that are shown."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "document_config.py"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("document_config", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_configuration_is_current(generator):
    assert generator.PAGE.read_text() == generator.page(), "run: python scripts/document_config.py"


@dataclasses.dataclass
class Described:
    """Some settings.

    Attributes:
        width: pixels of a side,
            a multiple of 8.
    """

    width: int | None = None


@dataclasses.dataclass
class Undescribed(Described):
    height: int = 8


@dataclasses.dataclass
class Outdated(Described):
    """More settings.

    Attributes:
        depth: a field that was removed.
    """


def test_a_field_has_a_row_of_key_type_default_and_description(generator):
    (table,) = generator.sections(Described)
    assert "| `width` | int or null | `null` | Pixels of a side, a multiple of 8. |" in table


@pytest.mark.parametrize(("schema", "field"), [(Undescribed, "height"), (Outdated, "depth")])
def test_fields_and_descriptions_must_be_the_same(generator, schema, field):
    with pytest.raises(ValueError, match=f"^{schema.__name__}: .* {field}$"):
        list(generator.sections(schema))


BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@page
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@page
def test_files_and_tests_that_are_named_exist(page):
    for name, test in re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", prose(page)):
        found = [path for path in (ROOT / "tests").rglob("test_*.py") if path.as_posix().endswith(f"/{name}")]
        assert len(found) == 1, name
        assert not test or f"def {test}(" in found[0].read_text(), f"{name}::{test}"
