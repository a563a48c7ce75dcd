"""The emoji in eight styles as a source: captions, classes, split, kept columns, missing files."""

import collections
from pathlib import Path

import numpy as np
import pytest
from runs import call

from flowdit.data import emoji_styles
from flowdit.data.emoji_styles import FLUENT, FOLDER, STYLES, load_pictures
from flowdit.data.loader import open_source as open_records
from flowdit.data.manifest import Manifest
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.schema import Schema
from flowdit.data.sources import open_images
from flowdit.data.sources.base import Row
from flowdit.data.sources.config import SourceConfig
from flowdit.fields import FieldError
from flowdit.inspect import main as inspect_main
from flowdit.models.text_encoder import TextConfig, load_text_encoder
from flowdit.verify import main as verify_main


def open_source(source="emoji_styles", **settings):
    return open_images(SourceConfig(source=source, **settings))


def find(style, annotation):
    return next(p for p in load_pictures() if p.style == style and p.subject["annotation"] == annotation)


def test_captions_name_subject_style_kind_and_looks():
    assert emoji_styles.captions(find("noto", "red apple")) == (
        "red apple, noto style",
        "red apple, noto style, food fruit, diet, health, ripe",
    )
    short, long = emoji_styles.captions(find("fluent-emoji-flat", "grinning face"))
    assert short == "grinning face, fluent flat style" and long.startswith(f"{short}, face smiling, ")
    assert emoji_styles.captions(find("emojione", "flag: Germany"))[0] == "flag of Germany, emojione style"


def test_names_have_no_comma_as_what_is_behind_it_counts_as_tags():
    family = emoji_styles.captions(find("openmoji", "family: man, woman, girl, boy"))
    assert family[0] == "family: man woman girl boy, openmoji style" and family[1].startswith(f"{family[0]}, ")
    every = [emoji_styles.captions(picture)[0] for picture in load_pictures()]
    assert {caption.count(",") for caption in every} == {1}
    assert len(set(every)) == len(every) == 12_026


def test_the_text_encoder_of_the_demo_tells_the_styles_apart():
    heart = [emoji_styles.captions(find(style, "red heart"))[0] for style in STYLES]
    tokens = load_text_encoder(TextConfig(encoder="wordllama", max_length=32, dtype="float32")).tokenize(heart)
    known = {frozenset(ids[mask].tolist()) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)}
    assert len(known) == len(STYLES) == 8 and not tokens.truncated.any()


def test_rows_have_tile_label_captions_and_kept_columns():
    source = open_source()
    assert source.has_captions
    units = source.units()
    rows = [row for unit in units if unit.split == "validation" for _, row in source.read(unit)]
    parts = collections.Counter(row.columns["held_out"] for row in rows if isinstance(row, Row))
    assert parts == {"pair": 510, "subject": 469}
    trained = [unit for unit in units if unit.split == "train"]
    assert sum(len(unit.part) for unit in trained) == 11_047
    ((number, row),) = source.read(trained[3], [7])
    assert number == 7 and isinstance(row, Row)
    style, hexcode = row.key.split("/")
    assert row.columns == {"style": style, "subject": hexcode, "held_out": ""}
    picture = next(p for p in load_pictures() if p.key == row.key)
    assert (row.label, row.captions) == (picture.subject["subgroup"], emoji_styles.captions(picture))
    assert isinstance(row.image, np.ndarray)
    np.testing.assert_array_equal(row.image, emoji_styles.load_sheet(style)[picture.tile])


@pytest.mark.parametrize(
    ("classes", "count", "images", "example"),
    [("style", 8, 12_026, "noto"), ("subgroup", 98, 12_026, "food-fruit"), ("both", 500, 10_738, "food-fruit, noto")],
)
def test_classes_are_subgroups_styles_or_both(classes, count, images, example):
    source = open_source(label_column=classes)
    names = source.class_names or ()
    assert len(names) == count and example in names
    units = source.units()
    assert sum(len(unit.part) for unit in units) == images
    ((_, row),) = source.read(units[0], [0])
    assert isinstance(row, Row) and row.label in names


def test_near_duplicates_and_fluent_pictures_are_on_one_side_of_the_split():
    pictures = load_pictures()
    part = {picture.key: picture.held_out for picture in pictures}
    near_duplicates = emoji_styles.read_json(FOLDER / "near_duplicates.json")
    assert len(near_duplicates) > 100
    assert all(part[first] == part[second] for first, second in near_duplicates)
    subjects = {picture.subject["hexcode"] for picture in pictures}
    fluent = [[f"{style}/{subject}" for style in FLUENT] for subject in subjects]
    together = [(part[flat], part[shaded]) for flat, shaded in fluent if flat in part and shaded in part]
    assert len(together) > 1500 and all(flat == shaded for flat, shaded in together)


def test_a_pair_has_a_trained_subject_and_a_held_out_subject_has_none():
    parts = collections.defaultdict(collections.Counter)
    for picture in load_pictures():
        parts[picture.subject["hexcode"]][picture.held_out] += 1
    unseen = [counts for counts in parts.values() if counts["subject"]]
    assert len(unseen) == 60 and all(counts.keys() == {"subject"} for counts in unseen)
    assert min(counts[""] for counts in parts.values() if counts["pair"]) >= 3


def test_files_elsewhere_are_read_and_missing_ones_are_named(tmp_path: Path):
    for file in FOLDER.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert open_source(source=f"emoji_styles:{tmp_path}").key == open_source().key
    (tmp_path / "noto.webp").unlink()
    with pytest.raises(FieldError, match="clone it and give their folder, source=emoji_styles:FOLDER; .*no noto.webp"):
        open_source(source=f"emoji_styles:{tmp_path}")
    (tmp_path / "noto.webp").symlink_to(FOLDER / "noto.webp")
    (tmp_path / "table.json").unlink()
    (tmp_path / "table.json").write_text('[{"hexcode": 1}]')
    with pytest.raises(FieldError, match="^source: .* has damaged files: 'tiles'"):
        open_source(source=f"emoji_styles:{tmp_path}")


def test_the_manifest_counts_what_is_held_out_and_records_keep_their_columns(tmp_path):
    settings = {"image_size": 16, "limit": 24, "held_out_fraction": 0.5, "vae_check": 0, "out": str(tmp_path / "data")}
    manifest = prepare(PrepareConfig(source="emoji_styles", **settings))
    assert Manifest.read(tmp_path / "data") == manifest and manifest.vae.name == "emoji"
    for shard in manifest.shards:
        assert manifest.of_shard(shard).num_records(shard.split) == shard.records
    source = open_records(tmp_path / "data", manifest, "validation", schema=Schema({}))
    records = source.read(range(len(source)))
    counted = collections.Counter(record["columns.held_out"] for record in records)
    assert {part.name: part.records for part in manifest.validation_parts} == counted
    assert counted.keys() == {"pair", "subject"} and counted.total() == manifest.num_records("validation") == 12
    assert all(record["key"] == f"{record['columns.style']}/{record['columns.subject']}" for record in records)
    assert all(style in manifest.license for style in STYLES)
    terms = ("names and tags: MIT", "Unicode License V3", "licenses/by-sa/4.0/", "licenses/by/4.0/")
    assert all(term in manifest.license for term in terms)
    unicode = (FOLDER / "LICENSES/Unicode-3.0.txt").read_text()
    assert "UNICODE LICENSE V3" in unicode and "Unicode CLDR" in unicode
    authors = ("OpenMoji", "Twitter", "Google", "Microsoft", "Emoji One", "Mozilla", "Miles Johnson")
    assert all(author in manifest.attribution for author in authors)
    assert call(verify_main, f"data={tmp_path / 'data'}").status == 0
    done = call(inspect_main, f"data={tmp_path / 'data'}", f"out={tmp_path / 'page.html'}")
    assert done.status == 0, done.err
    shown = ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))
    assert f"12 validation, {shown}" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"label_column": "group"}, "label_column: must be one of subgroup, style, both, got 'group'"),
        ({"captions": "a.csv"}, "captions: must be empty for source=emoji_styles, which has its own, got 'a.csv'"),
        (
            {"keep_columns": ["url"]},
            r"keep_columns: must be columns of emoji_styles \(style, subject, held_out\), which are",
        ),
    ],
)
def test_settings_of_other_sources_are_refused(setting, rule):
    with pytest.raises(FieldError, match=f"^{rule}"):
        open_source(**setting)
