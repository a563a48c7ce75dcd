"""Folders of images and the embedded set as sources: their order, labels, captions and columns."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowdit.data.rejected import Rejected
from flowdit.data.sources import open_images, register_source
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Source, in_class_order, is_held_out
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.openmoji import open_openmoji

NAMES = [f"{kind}/{i}.png" for kind in ("blue", "red") for i in range(4)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four blue and four red images, and two names of classes."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (30 * i, 0, 0)).save(path)
    return tmp_path / "mine"


def rows(source: Source) -> dict[str, Row]:
    """All rows by key, each of which comes once."""
    found = [row for unit in source.units() for _, row in source.read(unit)]
    assert all(isinstance(row, Row) for row in found), found
    by_key = {row.key: row for row in found if isinstance(row, Row)}
    assert len(by_key) == len(found)
    return by_key


def write_lines(path: Path, *lines: dict) -> None:
    path.write_text("\n".join(map(json.dumps, lines)))


def test_units_of_a_folder_are_a_fixed_permutation_that_stays(folder):
    """Data sets that were begun by earlier versions depend on it."""
    config = SourceConfig(source=str(folder), held_out_fraction=0.7, records_per_shard=3)
    source = pickle.loads(pickle.dumps(open_images(config)))
    names = [(unit.file(unit.split), [NAMES[i] for i in unit.part]) for unit in source.units()]
    held_out = [name for name in NAMES if is_held_out(name, 0.7)]
    train = np.random.default_rng(0).permutation([i for i, name in enumerate(NAMES) if name not in held_out])
    assert (len(train), len(held_out)) == (5, 3)
    parts = np.array_split(train, 2)
    assert names == [
        *((f"train-{i:05d}-of-00002.array_record", [NAMES[j] for j in part]) for i, part in enumerate(parts)),
        ("validation-00000-of-00001.array_record", held_out),
    ]
    unit = source.units()[0]
    everything = list(source.read(unit))
    assert [number for number, _ in everything] == list(range(len(unit.part)))
    assert list(source.read(unit, {0, 2})) == [everything[0], everything[2]]


def test_classes_are_the_sub_folders_and_bytes_those_of_the_files(folder):
    source = open_images(SourceConfig(source=f"folder:{folder}/"))
    assert (source.name, source.class_names, source.has_captions) == ("mine", ("blue", "red"), False)
    for name, row in rows(source).items():
        assert (row.label, row.captions) == (name.partition("/")[0], None)
        assert row.image == (folder / name).read_bytes()


def test_the_embedded_images_have_names_classes_and_captions():
    source = open_images(SourceConfig(source="openmoji", records_per_shard=1000))
    assert [unit.file(unit.split) for unit in source.units()] == [
        *(f"train-{i:05d}-of-00003.array_record" for i in range(3)),
        "validation-00000-of-00001.array_record",
    ]
    found = rows(source)
    assert len(found) == 2216 and source.class_names is not None
    assert {row.label for row in found.values()} == set(source.class_names)
    assert found["1F350"].captions == ("pear", "pear, food fruit, green")


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_the_ecosystems_file_of_captions_is_found_by_itself(folder, kind, messages):
    entries = [
        {"file_name": name, "text": f"text of {name}", "license": "CC0", "score": i} for i, name in enumerate(NAMES)
    ]
    if kind.endswith("csv"):
        lines = [",".join(entries[0]), *(",".join(map(str, entry.values())) for entry in entries)]
        (folder / kind).write_text("\n".join(lines))
    else:
        write_lines(folder / kind, *entries)
    source = open_images(SourceConfig(source=str(folder), keep_columns=["license"]), ["score"])
    assert source.has_captions and source.class_names == ("blue", "red")
    for i, row in enumerate(rows(source)[name] for name in NAMES):
        assert row.captions == (f"text of {NAMES[i]}", "")
        assert dict(row.columns) == {"license": "CC0", "score": i}  # a number, also in CSV
    assert messages() == []


def test_columns_of_a_caption_file_are_chosen_by_option(folder):
    entries = [{"file": name, "a": "one", "b": "two", "kind": 10 - i, "id": f"n{i}"} for i, name in enumerate(NAMES)]
    write_lines(folder / "captions.jsonl", *entries)
    config = SourceConfig(source=str(folder), captions=str(folder / "captions.jsonl"), held_out_fraction=0.5)
    config.caption_column, config.long_caption_column = "a", "b"
    config.label_column, config.key_column = "kind", "id"
    source = open_images(config)
    assert source.class_names == tuple(map(str, range(3, 11)))  # in the order of numbers
    assert rows(source)["n2"]._replace(image=b"") == Row("n2", b"", "8", ("one", "two"), {})
    held_out = {row.key for unit in source.units() if unit.split == "validation" for _, row in source.read(unit)}
    assert held_out == {f"n{i}" for i in range(8) if is_held_out(f"n{i}", 0.5)}
    config.caption_column = "c"
    rule = r"^caption_column: must be a column of .*captions.jsonl, which has file, a, b, kind, id, got 'c'$"
    with pytest.raises(ValueError, match=rule):
        open_images(config)


def test_files_beside_the_images_hold_captions_and_columns(folder):
    for name in NAMES[1:]:
        (folder / name).with_suffix(".txt").write_text(f"text of {name}\n")
    (folder / NAMES[1]).with_suffix(".json").write_text('{"license": "CC BY 4.0", "long_caption": "long"}')
    (folder / NAMES[2]).with_suffix(".json").write_text("[" * 100_000)
    source = open_images(SourceConfig(source=str(folder), captions="side_files", keep_columns=["license"]))
    found = {row.key if isinstance(row, Row) else row.file: row for u in source.units() for _, row in source.read(u)}
    assert found[NAMES[0]].captions == ("", "")  # it has no file, as one of a tar may have none
    assert found[NAMES[1]].captions == (f"text of {NAMES[1]}", "long")
    assert dict(found[NAMES[1]].columns) == {"license": "CC BY 4.0"} and found[NAMES[1]].label == "blue"
    assert isinstance(found[NAMES[2]], Rejected) and found[NAMES[2]].reason.startswith(".json: is not JSON: ")
    assert len(found) == 8
    before = source.key
    (folder / NAMES[1]).with_suffix(".txt").write_text("another")
    assert open_images(source.config).key != before


def test_files_that_cannot_be_read_or_are_too_large_are_left_out(folder):
    with (folder / NAMES[0]).open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    source = open_images(SourceConfig(source=str(folder), held_out_fraction=0.0))
    (row,) = (row for unit in source.units() for _, row in source.read(unit) if isinstance(row, Rejected))
    assert row == Rejected(NAMES[0], f"has {MAX_FILE_BYTES + 1} bytes, more than {MAX_FILE_BYTES}")
    os.remove(folder / NAMES[1])  # between the list and the reading
    with pytest.raises(ValueError, match=f"{NAMES[1]}: there is no such file or folder$"):
        rows(source)


def test_classes_are_in_the_order_of_numbers_or_of_letters():
    assert in_class_order(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert in_class_order(["10", "9", "a"]) == ("10", "9", "a")


def test_a_registered_source_gets_its_path_and_the_settings(monkeypatch):
    monkeypatch.setattr("flowdit.data.sources.SOURCES", {})
    asked = []
    images = open_openmoji("", SourceConfig(), ())
    register_source("mine", lambda *arguments: asked.append(arguments) or images)
    config = SourceConfig(source="mine:/data/file:1")
    assert open_images(config, ["score"]) is images
    assert asked == [("/data/file:1", config, ["score"])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "openmoji:x"}, "source: must be openmoji, which is embedded, without a path, got 'openmoji:x'"),
        ({"key_column": "k"}, "key_column: must be empty for source=openmoji, which has no columns, got 'k'"),
        ({"limit": 0}, "limit: must be at least 1, got 0"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: must be in [0, 1), got 1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_images(SourceConfig(**settings))
