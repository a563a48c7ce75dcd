"""The embedded OpenMoji images: classes, held-out families, names and captions."""

import json

import numpy as np

from flowdit.data import openmoji


def test_openmoji_classes_have_eight_images_and_whole_families_are_held_out():
    data = openmoji.load()
    assert data.tiles.shape == (2216, 64, 64, 3) and len(data.class_names) == 87
    assert np.bincount(data.labels).min() >= 8
    assert 0.03 < data.held_out.mean() < 0.07
    trained = set(data.labels[~data.held_out].tolist())
    assert trained == set(range(87))
    table = json.loads((openmoji.FOLDER / "table.json").read_text())
    families = [(openmoji.image_family(row["hexcode"]), openmoji.is_held_out(row)) for row in table]
    assert len(set(families)) == len({family for family, _ in families})


def test_openmoji_tiles_match_their_names():
    data = openmoji.load()
    table = json.loads((openmoji.FOLDER / "table.json").read_text())
    names = [row["annotation"] for row in table if row["subgroup"] in data.class_names]
    centres = dict(zip(names, data.tiles[:, 32, 32].tolist(), strict=True))
    assert centres["flag: Japan"] == centres["red heart"] == [210, 47, 39]
    assert centres["blue heart"] == [30, 80, 160]
    assert centres["grinning face"] == [252, 234, 43]
    classes = dict(zip(names, (data.class_names[label] for label in data.labels), strict=True))
    assert (classes["flag: Japan"], classes["blue heart"]) == ("country-flag", "heart")


def test_openmoji_captions_name_image_kind_and_looks():
    data = openmoji.load()
    captions = dict(data.captions)
    assert len(data.captions) == 2216 and all(short.strip() for short in captions)
    assert captions["pear"] == "pear, food fruit, green"
    assert captions["flag of Germany"] == "flag of Germany, country flag"
    assert captions["red apple"] == "red apple, food fruit, diet, health, ripe"
    assert captions["tomato"].startswith("tomato, food fruit, red, ")
    assert not any(short.startswith("flag:") for short in captions)
    table = json.loads((openmoji.FOLDER / "table.json").read_text())
    names = [row["annotation"] for row in table if row["subgroup"] in data.class_names]
    assert [short.replace("flag of ", "flag: ") for short, _ in data.captions] == names
