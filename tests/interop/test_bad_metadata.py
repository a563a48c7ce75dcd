"""Metadata of flowdit's files with sizes that contradict the files: one short line at once."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from interop.foreign_folders import copied, short, unreadable
from interop.small_models import DEFAULT_CLASS, DEFAULT_TEXT, converted, random_model, saved

from flowdit.interop import read_source

pytestmark = pytest.mark.usefixtures("quick")

BILLION = 10**9


@pytest.fixture(scope="module")
def own(meta, tmp_path_factory) -> Path:
    """A class and a text model as safetensors files, and the former as a diffusers folder."""
    root = tmp_path_factory.mktemp("own")
    for name, model in (("class", DEFAULT_CLASS), ("text", DEFAULT_TEXT)):
        saved(random_model(meta, model), root / f"{name}.safetensors")
    converted(root / "class.safetensors", root / "exported", to="diffusers", own_class=True)
    return root


def changed(meta: dict, path: tuple[str, ...], value) -> dict:
    meta = inner = copy.deepcopy(meta)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return meta


SIZES = [
    (("config", "model", "depth"), BILLION),
    (("config", "model", "hidden_dim"), 10**12),
    (("config", "seed"), 10**40),
    (("manifest", "latent_shape"), [16, BILLION, BILLION]),
    (("text", "width"), 10**12),
    (("text", "max_length"), BILLION),
    (("text",), None),
    (("text",), {"width": 24, "max_length": 6}),
    (("config", "text", "max_length"), BILLION),
    (("latent_mean",), [0.0]),
    (("prediction",), "x" * 100_000),
]


@pytest.mark.parametrize(("path", "value"), SIZES, ids=lambda value: ".".join(value) if type(value) is tuple else "")
def test_metadata_of_a_safetensors_file(own, tmp_path, path, value):
    file = own / "text.safetensors"
    with safetensors.safe_open(file, "np") as stored:
        meta = json.loads(stored.metadata()["flowdit"])
    target = tmp_path / "changed.safetensors"
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays, target, {"flowdit": json.dumps(changed(meta, path, value))})
    assert str(target) in short(unreadable(target))


def test_metadata_nested_without_end(own, tmp_path):
    target = tmp_path / "changed.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1)}, target, {"flowdit": "[" * 100_000})
    assert "changed.safetensors is not a readable safetensors file (" in short(unreadable(target))


def test_metadata_of_an_exported_folder(own, tmp_path):
    folder = copied(own, "exported", tmp_path)
    meta = json.loads((folder / "flowdit.json").read_text())
    (folder / "flowdit.json").write_text(json.dumps(changed(meta, ("config", "model", "depth"), BILLION)))
    assert "model.depth must be 2 in flowdit's metadata, as in config.json, got 1000000000" in short(unreadable(folder))


def test_good_files_are_read(own):
    """Without the changes of the other tests the files are valid."""
    for name in ("exported", "text.safetensors"):
        read_source(str(own / name))
