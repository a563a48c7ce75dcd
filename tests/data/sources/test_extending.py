"""A source of one's own: the example of docs/extending.md, and entry points of other packages."""

import importlib
import importlib.metadata
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from written_sources import rows

import flowdit.data.sources
from flowdit.data.sources import open_images
from flowdit.data.sources.base import Source
from flowdit.data.sources.config import SourceConfig

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """The module of the page, in a folder of its own, and an archive of ten images."""
    code = re.search(r"`arrays.py`:\n\n```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert code is not None
    (tmp_path / "arrays.py").write_text(code[1])
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(10) % 3)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flowdit.data.sources, "SOURCES", dict(flowdit.data.sources.SOURCES))
    yield images
    sys.modules.pop("arrays", None)


def test_the_example_is_a_source(arrays, tmp_path):
    importlib.import_module("arrays")
    source = open_images(SourceConfig(source=f"arrays:{tmp_path}/mine.npz", records_per_shard=4))
    assert isinstance(source, Source) and source.class_names == ("0", "1", "2") and source.name == "mine"
    found = rows(pickle.loads(pickle.dumps(source)))
    assert [row.label for row in found.values()] == [str(i % 3) for i in range(10)]
    np.testing.assert_array_equal([row.image for row in found.values()], arrays)
    unit = source.units()[-1]
    assert [number for number, _ in source.read(unit)] == [0, 1]
    assert [number for number, _ in source.read(unit, {1})] == [1]
    with pytest.raises(ValueError, match=r"^source: must name an .npz file, as in .*, got 'nowhere'$"):
        open_images(SourceConfig(source="arrays:nowhere"))


def test_a_source_of_an_installed_package_is_found_by_its_entry_point(arrays, tmp_path, monkeypatch):
    places = {"arrays": "arrays:open_arrays", "broken": "arrays:nothing"}
    entries = {name: importlib.metadata.EntryPoint(name, value, "flowdit.sources") for name, value in places.items()}
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group, name: [entries[name]] if name in entries else []
    )
    source = open_images(SourceConfig(source=f"arrays:{tmp_path}/mine.npz"))
    assert len(rows(source)) == 10
    with pytest.raises(ValueError, match=r"^source: broken of arrays:nothing cannot be loaded: .*nothing"):
        open_images(SourceConfig(source="broken:x"))
