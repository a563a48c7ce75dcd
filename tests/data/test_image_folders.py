"""Folders as users have them: other files among the images, names of all kinds, and an output among the input."""

import dataclasses
import os
from pathlib import Path

import pytest
from PIL import Image

from flowdit.data.images import open_image
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.sources import open_images
from flowdit.data.sources.base import Row
from flowdit.data.sources.config import SourceConfig


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)


def rows(source: Path, **settings) -> dict[str, Row]:
    """The images of a folder by their keys."""
    images = open_images(SourceConfig(source=str(source), **settings))
    return {row.key: row for unit in images.units() for _, row in images.read(unit)}


def test_suffixes_in_capitals_and_any_letters_are_read(tmp_path):
    names = ["日本/фото 1.PNG", "日本/é 😀.JpEg", "a b/c.Tif"]
    save(*(tmp_path / "source" / name for name in names))
    assert open_images(SourceConfig(source=str(tmp_path / "source"))).class_names == ("a b", "日本")
    images = rows(tmp_path / "source")
    assert sorted(images) == sorted(names)
    assert {open_image(row.image).size for row in images.values()} == {(16, 16)}


def test_files_that_are_left_out_are_named(tmp_path, messages):
    source = tmp_path / "source"
    save(source / "a" / "1.png", source / "loose 1.png", source / "loose 2.png", source / ".hidden.png")
    for name in ("a/notes.txt", "a/Thumbs.db", "readme.md", "x.csv", ".DS_Store"):
        (source / name).write_text("no image")
    os.symlink("nowhere", source / "a" / "broken link.png")
    assert list(rows(source, held_out_fraction=0.0)) == ["a/1.png"]
    warning, line = messages()
    rule = "source: images that are outside the class folders or not regular files are left out: "
    assert warning == rule + "loose 1.png, loose 2.png, a/broken link.png"
    rule = "source: files without the suffix of an image are left out: "
    assert line == rule + "readme.md, x.csv, a/Thumbs.db ... and 1 more"


def test_a_caption_file_among_the_images_is_no_surprise(tmp_path, messages):
    save(tmp_path / "1.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "1.png", "short_caption": "a"}')
    assert list(rows(tmp_path, captions=str(tmp_path / "captions.jsonl"), held_out_fraction=0.0)) == ["1.png"]
    assert messages() == []


def test_names_that_are_not_utf8_are_escaped_or_refused(tmp_path):
    save(tmp_path / "source" / "a" / "1.png")
    os.rename(tmp_path / "source" / "a" / "1.png", os.fsencode(tmp_path / "source" / "a") + b"/\xff.png")
    ((key, row),) = rows(tmp_path / "source", held_out_fraction=0.0).items()
    assert key == "a/\\udcff.png" and open_image(row.image).size == (16, 16)
    os.rename(tmp_path / "source" / "a", os.fsencode(tmp_path / "source") + b"/\xff")
    with pytest.raises(ValueError, match=r"source: must have class folders with names in UTF-8, got '.udcff'$"):
        rows(tmp_path / "source")


@pytest.mark.parametrize("inside", ["", "latents"])
def test_a_data_set_among_its_images_is_refused(config, source, inside):
    with pytest.raises(ValueError, match=f"out: must be outside the source {source}, got {source / inside}$"):
        prepare(dataclasses.replace(config, out=str(source / inside)))
    assert sorted(path.name for path in source.iterdir()) == ["blue", "red"]


def test_the_embedded_images_are_prepared_into_their_default_folder():
    """It is below the working directory, which is not their source."""
    manifest = prepare(PrepareConfig(limit=20, vae_check=0))
    assert manifest.num_records("train") == 20 and Path("data/openmoji/dataset.json").is_file()


def test_a_kind_before_the_path_does_not_hide_the_source(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"out: must be outside the source folder:{tmp_path}, got {tmp_path}/out$"):
        prepare(PrepareConfig(source=f"folder:{tmp_path}", out=f"{tmp_path}/out", image_size=16))
