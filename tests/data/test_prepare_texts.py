"""Preparing captions and text features."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from latent_records import open_captioned, open_labelled
from models.text_folders import write_t5gemma

from flowdit.data.prepare import prepare
from flowdit.data.text_cache import open_cache
from flowdit.models.text_encoder import TextConfig, load_text_encoder


def write_captions(source, path, **changes):
    """A line for each image, in another order than the images'; `changes` are short captions by image."""
    names = sorted((file.relative_to(source).as_posix() for file in source.rglob("*.png")), reverse=True)
    lines = [{"file": name, "short_caption": changes.get(name, name), "long_caption": f"long {name}"} for name in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_captions_belong_to_their_images_and_classes_stay(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    plain, captioned = (
        prepare(config),
        prepare(dataclasses.replace(config, captions=captions, out=config.out + "-text")),
    )
    assert (plain.has_captions, captioned.has_captions) == (False, True)
    assert captioned.class_names == plain.class_names
    indices = list(range(plain.num_records("train")))
    labelled = open_labelled(config.out).read(indices)
    for labels, texts in zip(labelled, open_captioned(config.out + "-text", None).read(indices), strict=True):
        np.testing.assert_array_equal(labels["latent"], texts["latent"])
        assert texts["label"] == labels["label"]
        assert texts["short_caption"].split("/")[0] == captioned.class_names[texts["label"]]
        assert texts["long_caption"] == f"long {texts['short_caption']}"
    assert len({texts["short_caption"] for texts in open_captioned(config.out + "-text", None).read(indices)}) > 12


def test_captioned_images_need_no_class_folders(config, source, tmp_path):
    captions = write_captions(source / "red", source / "red" / "captions.jsonl")
    manifest = prepare(dataclasses.replace(config, source=str(source / "red"), captions=captions))
    assert (manifest.class_names, manifest.has_captions) == ((), True)
    record = open_captioned(config.out, None).read([0])[0]
    assert {"latent", "short_caption", "long_caption"} < set(record) and "label" not in record


def test_other_captions_in_the_same_folder_are_refused(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    prepare(dataclasses.replace(config, captions=captions))
    moved = str(Path(captions).rename(tmp_path / "moved.jsonl"))
    prepare(dataclasses.replace(config, captions=moved))
    write_captions(source, tmp_path / "moved.jsonl", **{"red/00.png": "another"})
    with pytest.raises(ValueError, match="out: .* was prepared with other captions: give another folder$"):
        prepare(dataclasses.replace(config, captions=moved))
    with pytest.raises(ValueError, match="out: .* was prepared with captions: give another folder$"):
        prepare(config)


def test_captions_of_other_images_leave_no_files(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    (source / "red" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"captions.jsonl has 1 captions without an image in .*: 'red/00.png'"):
        prepare(dataclasses.replace(config, captions=captions))
    assert not Path(config.out).exists()


def test_text_features_are_added_to_a_finished_data_set(config, source, tmp_path, messages):
    captioned = dataclasses.replace(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    manifest = prepare(captioned)
    with_text = dataclasses.replace(captioned, text_encoder="wordllama", text_dtype="float32", text_max_length=6)
    assert prepare(with_text) == manifest
    assert "text_features: features of 48 captions by wordllama in float32" in messages()[-1]
    encoder = load_text_encoder(TextConfig(encoder="wordllama", dtype="float32", max_length=6))
    text = open_cache(Path(config.out) / "text_features", manifest, "train", encoder, 0.5)
    source = open_captioned(config.out, text)
    batch, record = source.read_batch([3], np.array([0.9])), source.read([3])[0]
    expected = encoder.encode([record["short_caption"]])
    valid = batch["text_mask"][0]
    np.testing.assert_array_equal(batch["text_features"][0][valid], expected.features[0][expected.mask[0]])
    with pytest.raises(ValueError, match="text_cache: .*text_features was started with max_length=6, this run has 7"):
        prepare(dataclasses.replace(with_text, text_max_length=7))
    other = tmp_path / "other"
    prepare(dataclasses.replace(with_text, text_max_length=7, text_cache=str(other)))
    assert (other / "text_features.json").exists()


def test_a_run_without_an_encoder_does_not_change_the_text_features(config, source, tmp_path, messages):
    captioned = dataclasses.replace(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    prepare(dataclasses.replace(captioned, text_encoder="wordllama"))
    times = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    assert Path(config.out, "text_features", "text_features.json") in times
    prepare(captioned)
    assert "already prepared" in messages()[-1]
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == times


def test_an_invalid_text_encoder_is_reported_before_latents_are_encoded(config, source, tmp_path):
    captioned = dataclasses.replace(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    for changes, message in (
        ({"text_encoder": " "}, "^text_encoder: must be 'wordllama', a folder or a hub id, got ' '"),
        ({"text_encoder": str(source)}, "^text_encoder: .*source: must hold tokenizer.json"),
        (
            {"text_encoder": str(write_t5gemma(tmp_path / "t5gemma")), "text_max_length": 1},
            "^text_max_length: must be above the 1 special tokens, got 1$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(captioned, **changes))
        assert not Path(config.out).exists()


def test_a_text_cache_that_cannot_be_written_is_named(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="text_cache: cannot write to .*file/text: Not a directory"):
        prepare(
            dataclasses.replace(
                config, captions=captions, text_encoder="wordllama", text_cache=str(tmp_path / "file" / "text")
            )
        )
