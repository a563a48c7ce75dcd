"""Preparing a data set: its records, and errors for bad input."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from latent_records import open_labelled
from PIL import Image

import flowdit
from flowdit.data.images import center_crop
from flowdit.data.manifest import Manifest, verify
from flowdit.data.prepare import prepare
from flowdit.models.vae import load_vae


def test_records_are_the_posterior_means_of_the_images(config, source):
    manifest = prepare(config)
    verify(config.out, manifest)
    assert Manifest.read(config.out) == manifest
    assert (manifest.class_names, manifest.latent_shape, manifest.image_size) == (("blue", "red"), (16, 2, 2), 16)
    vae = load_vae("openmoji")
    encode = eqx.filter_jit(vae.encode)
    assert (manifest.vae.fingerprint, manifest.vae.scale) == (vae.fingerprint, vae.config.scaling_factor)
    records = {split: open_labelled(config.out, split) for split in ("train", "validation")}
    assert len(records["train"]) + len(records["validation"]) == 24 and len(records["validation"]) > 0
    found = [record for part in records.values() for record in part.read(list(range(len(part))))]
    for label, name in enumerate(manifest.class_names):
        for path in (source / name).iterdir():
            pixels = np.asarray(center_crop(Image.open(path), 16), np.float32).transpose(2, 0, 1) / 127.5 - 1
            mean = np.asarray(encode(jnp.asarray(pixels)).mean)
            assert any(r["label"] == label and np.allclose(r["latent"], mean, atol=0.02) for r in found), path


def test_statistics_are_those_of_the_training_latents(config):
    manifest = prepare(config)
    train = open_labelled(config.out)
    latents = train.read_batch(list(range(len(train))))["latent"].astype(np.float64)
    np.testing.assert_allclose(manifest.channel_mean, latents.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.channel_std, latents.std((0, 2, 3)), rtol=1e-9)


def test_training_records_are_shuffled_over_the_shards(config):
    manifest = prepare(config)
    labels = [r["label"] for r in open_labelled(config.out).read(list(range(manifest.num_records("train"))))]
    assert labels != sorted(labels)


def test_options_add_mirrored_copies_standard_deviations_and_single_precision(config):
    plain = prepare(config)
    full = prepare(
        dataclasses.replace(config, out=config.out + "-full", hflip=True, posterior_std=True, dtype="float32")
    )
    assert full.num_records("train") == 2 * plain.num_records("train")
    assert full.num_records("validation") == plain.num_records("validation")
    assert full.has_latent_std and full.latent_dtype == "float32"
    record = open_labelled(config.out + "-full").read([0])[0]
    assert record["latent"].dtype == record["latent_std"].dtype == np.float32
    assert (record["latent_std"] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": "nowhere"},
            "source: must be openmoji, emoji_styles, folder, .* or images by path; there is no file or folder 'nowhere'",
        ),
        ({"image_size": 12}, "image_size: must be a multiple of the VAE's stride 8, got 12"),
        ({"image_size": 0}, "image_size: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"records_per_shard": 0}, "records_per_shard: must be at least 1, got 0"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction: must be in \[0, 1\), got 1.0"),
        ({"held_out_fraction": 0.9999}, "held_out_fraction: 0.9999 leaves no image to train on"),
        ({"vae_check": -1}, r"vae_check: must be 0 \(no check\) or more, got -1"),
        ({"max_rejected": 1.5}, r"max_rejected: must be in \[0, 1\], got 1.5"),
        ({"dtype": "int8"}, "dtype: must be one of float16, float32, got 'int8'"),
        ({"text_dtype": "float16"}, "text_dtype: must be one of bfloat16, float32, got 'float16'"),
        ({"text_max_length": 0}, "text_max_length: must be at least 1, got 0"),
        ({"text_encoder": "wordllama"}, "text_encoder: .*source has no captions to encode, got 'wordllama'"),
        ({"captions": "nowhere.jsonl"}, "captions: cannot read nowhere.jsonl: No such file"),
        (
            {"source": "openmoji", "captions": "a.jsonl"},
            "captions: must be empty for source=openmoji, .* got 'a.jsonl'",
        ),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(config, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(config, **changes))
    assert not Path(config.out).exists()


def test_a_folder_without_classes_or_images_is_named(config, source):
    (source / "green").mkdir()
    (source / "green" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="source: class folder .*green has no images"):
        prepare(config)
    for image in (source / "red").glob("*.png"):
        image.unlink()
    with pytest.raises(ValueError, match="source: .*red must have images or one sub-folder of them for each class"):
        prepare(dataclasses.replace(config, source=str(source / "red")))


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to .*file/data: Not a directory"):
        prepare(dataclasses.replace(config, out=str(tmp_path / "file" / "data")))


def test_a_full_disk_is_named_and_leaves_no_half_shard(config):
    script = """
        import resource, sys
        from flowdit.data.preparation.engines import RayConfig
        from flowdit.features import FeatureWeights
        from flowdit.data.prepare import FilterConfig, PrepareConfig, prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        prepare(eval(sys.argv[1]))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), repr(config)],
        cwd=Path(flowdit.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr.strip().split("\n")[-1].startswith(f"ValueError: out: cannot write to {config.out}: ")
    assert sorted(os.listdir(config.out)) == ["prepare.json", "scan", "source_files.jsonl.gz"]


def test_center_crop_takes_the_middle_without_distortion():
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:, 64:192, 1] = 255
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16))
    assert cropped.shape == (16, 16, 3)
    assert (cropped[:, 1:-1, 1] > 240).all() and (cropped[..., 0] == 0).all()
