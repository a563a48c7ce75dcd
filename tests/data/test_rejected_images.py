"""Images that cannot be read are left out and named; the records of the others do not depend on them."""

import dataclasses
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from latent_records import open_captioned, open_labelled, word_encoder
from test_identity import interrupt
from test_prepare_texts import write_captions

from flowdit.data.manifest import Manifest
from flowdit.data.prepare import prepare
from flowdit.data.sources import folder as folders
from flowdit.data.text_cache import open_cache
from flowdit.data.text_features import write_cache

BROKEN = {"blue/04.png": "image file is truncated", "red/03.png": "cannot identify image file"}


def damage(source):
    """Cut one image of each class, and empty another."""
    path = source / "blue" / "04.png"
    path.write_bytes(path.read_bytes()[:500])
    (source / "red" / "03.png").write_bytes(b"")


@pytest.fixture
def lenient(config):
    return dataclasses.replace(config, max_rejected=0.1)


def rejected(folder):
    lines = [json.loads(line) for line in Path(folder, "rejected.jsonl").read_text().splitlines()]
    return {line["file"]: line["reason"] for line in lines}


def records(folder, split="train"):
    source = open_labelled(folder, split)
    return [(record["latent"].tobytes(), record["label"]) for record in source.read(range(len(source)))]


def test_broken_images_are_left_out_and_named(lenient, source, messages):
    whole = dataclasses.replace(lenient, out=lenient.out + "-whole")
    prepare(whole)
    assert not Path(whole.out, "rejected.jsonl").exists()
    damage(source)
    manifest = prepare(lenient)
    assert manifest.num_records("train") + manifest.num_records("validation") == 22
    assert rejected(lenient.out) == BROKEN and list(rejected(lenient.out)) == sorted(BROKEN)
    line = f"2 of 24 images cannot be read and are left out: see {lenient.out}/rejected.jsonl"
    assert line in messages()
    for split in ("train", "validation"):
        remaining = iter(records(whole.out, split))
        assert all(record in remaining for record in records(lenient.out, split))  # equal, in the same order
    prepare(lenient)
    assert messages()[-1].endswith("nothing to encode; 2 unreadable images were left out: see rejected.jsonl")


def test_an_interrupted_run_ends_with_the_same_files(lenient, source, monkeypatch):
    damage(source)
    whole = dataclasses.replace(lenient, out=lenient.out + "-whole")
    prepare(whole)
    interrupt(lenient, monkeypatch)
    prepare(lenient)
    files, others = ({p.name: p.read_bytes() for p in Path(out).iterdir()} for out in (lenient.out, whole.out))
    assert files == others


def test_captions_stay_with_their_images(lenient, source, tmp_path):
    lenient = dataclasses.replace(lenient, captions=write_captions(source, tmp_path / "captions.jsonl"))
    whole = dataclasses.replace(lenient, out=lenient.out + "-whole")
    prepare(whole)
    damage(source)
    manifest = prepare(lenient)
    for split in ("train", "validation"):
        latents = {}
        for folder in (whole.out, lenient.out):
            data = open_captioned(folder, None, split)
            latents[folder] = {r["short_caption"]: r["latent"].tobytes() for r in data.read(range(len(data)))}
        kept = {name: latent for name, latent in latents[whole.out].items() if name not in BROKEN}
        assert latents[lenient.out] == kept
    encoder = word_encoder()
    write_cache(tmp_path / "cache", lenient.out, manifest, encoder)
    text = open_cache(tmp_path / "cache", manifest, "train", encoder, 0.5)
    data = open_captioned(lenient.out, text)
    data.read_batch(range(len(data)), np.zeros(len(data)))  # the keys of the captions are compared


def test_mirrored_copies_are_left_out_and_counted_once(lenient, source):
    damage(source)
    plain, mirrored = prepare(lenient), prepare(dataclasses.replace(lenient, out=lenient.out + "-2", hflip=True))
    assert mirrored.num_records("train") == 2 * plain.num_records("train")
    assert rejected(lenient.out + "-2") == BROKEN


def test_a_shard_whose_images_are_all_broken_is_left_out(lenient, source):
    damage(source)
    lenient = dataclasses.replace(lenient, records_per_shard=1)
    manifest = prepare(lenient)
    assert len(manifest.shards) == 22 and {shard.records for shard in manifest.shards} == {1}
    assert {path.name for path in Path(lenient.out).glob("*.array_record*")} == {s.file for s in manifest.shards}
    assert prepare(lenient) == manifest
    assert len(records(lenient.out)) == manifest.num_records("train")


def test_too_many_broken_images_end_the_run_and_a_higher_limit_continues_it(config, source):
    damage(source)
    strict = dataclasses.replace(config, max_rejected=0.0)
    with pytest.raises(
        ValueError, match=r"^max_rejected: at most 0 of 24 images may be unreadable \(0\), found 1 "
    ) as error:
        prepare(strict)
    assert str(error.value).endswith(
        f"see {config.out}/rejected.jsonl; repair or remove them, or set a higher max_rejected"
    )
    assert rejected(config.out).items() <= BROKEN.items()
    with pytest.raises(ValueError, match=r"max_rejected: at most 1 of 24 images may be unreadable \(0.01\), found 2 "):
        prepare(config)
    assert rejected(config.out) == BROKEN and not Path(config.out, "dataset.json").exists()
    prepare(dataclasses.replace(config, max_rejected=0.1))
    assert rejected(config.out) == BROKEN


def test_a_folder_without_any_readable_image_is_named(config, source):
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="source: no image of the training split can be read: see .*rejected.jsonl"):
        prepare(dataclasses.replace(config, max_rejected=1.0))


def test_repaired_images_are_encoded_if_no_shard_was_begun(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "backup")
    config = dataclasses.replace(config, records_per_shard=None, max_rejected=0.0)
    damage(source)
    with pytest.raises(ValueError, match="max_rejected"):
        prepare(config)
    shutil.copytree(tmp_path / "backup", source, dirs_exist_ok=True)
    assert sum(shard.records for shard in prepare(config).shards) == 24
    assert not Path(config.out, "rejected.jsonl").exists()


def test_a_fault_of_the_disk_is_not_a_broken_image(config, monkeypatch):
    def failing(path):
        if str(path).endswith("03.png"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return Path(path).read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_whole", failing)
        with pytest.raises(ValueError, match="03.png: cannot be read: Input/output error"):
            prepare(dataclasses.replace(config, max_rejected=1.0))
    assert sum(shard.records for shard in prepare(config).shards) == 24
    assert Manifest.read(config.out).num_records("train") == len(records(config.out))
