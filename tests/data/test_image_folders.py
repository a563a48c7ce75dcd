"""Folders as users have them: other files among the images, names of all kinds, and an output among the input."""

import dataclasses
import os
from pathlib import Path

import pytest
from PIL import Image

from flowdit.data.images import load_images
from flowdit.data.prepare import prepare


def save(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)


def test_suffixes_in_capitals_and_any_letters_are_read(tmp_path):
    names = ["日本/фото 1.PNG", "日本/é 😀.JpEg", "a b/c.Tif"]
    save(*(tmp_path / "source" / name for name in names))
    images = load_images(str(tmp_path / "source"), 0.0)
    assert images.class_names == ("a b", "日本")
    assert sorted(images.name_of(i) for i in range(3)) == sorted(names)
    assert images.open(0).size == (16, 16)


def test_files_that_are_left_out_are_named(tmp_path, messages):
    source = tmp_path / "source"
    save(source / "a" / "1.png", source / "loose 1.png", source / "loose 2.png", source / ".hidden.png")
    for name in ("a/notes.txt", "a/Thumbs.db", "readme.md", "x.csv", ".DS_Store"):
        (source / name).write_text("no image")
    os.symlink("nowhere", source / "a" / "broken link.png")
    images = load_images(str(source), 0.0)
    assert [images.name_of(i) for i in range(len(images.held_out))] == ["a/1.png"]
    warning, line = messages()
    rule = "source: images that are outside the class folders or not regular files are left out: "
    assert warning == rule + "loose 1.png, loose 2.png, a/broken link.png"
    rule = "source: files without the suffix of an image are left out: "
    assert line == rule + "readme.md, x.csv, a/Thumbs.db ... and 1 more"


def test_a_caption_file_among_the_images_is_no_surprise(tmp_path, messages):
    save(tmp_path / "1.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "1.png", "short_caption": "a"}')
    load_images(str(tmp_path), 0.0, str(tmp_path / "captions.jsonl"))
    assert messages() == []


def test_names_that_are_not_utf8_are_escaped_or_refused(tmp_path):
    save(tmp_path / "source" / "a" / "1.png")
    os.rename(tmp_path / "source" / "a" / "1.png", os.fsencode(tmp_path / "source" / "a") + b"/\xff.png")
    images = load_images(str(tmp_path / "source"), 0.5)
    assert images.name_of(0) == "a/\\udcff.png" and images.open(0).size == (16, 16)
    os.rename(tmp_path / "source" / "a", os.fsencode(tmp_path / "source") + b"/\xff")
    with pytest.raises(ValueError, match=r"source: must have class folders with names in UTF-8, got '.udcff'$"):
        load_images(str(tmp_path / "source"), 0.0)


@pytest.mark.parametrize("inside", ["", "latents"])
def test_a_data_set_among_its_images_is_refused(config, source, inside):
    with pytest.raises(ValueError, match=f"out: must be outside the source {source}, got {source / inside}$"):
        prepare(dataclasses.replace(config, out=str(source / inside)))
    assert sorted(path.name for path in source.iterdir()) == ["blue", "red"]
