"""docs/configuration.md matches the dataclasses."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "document_config.py"


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
