"""Preparing a data set: output, interruptions, and errors for bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from latent_records import open_captioned, open_labelled
from models.text_folders import write_t5gemma
from PIL import Image

import flowdit.data.prepare as prepare_module
from flowdit.data import openmoji
from flowdit.data.images import center_crop
from flowdit.data.manifest import Manifest, ManifestError, verify
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.text_cache import open_cache
from flowdit.models.text_encoder import TextConfig, load_text_encoder
from flowdit.models.vae import load_vae


@pytest.fixture
def source(tmp_path) -> Path:
    """12 red and 12 blue noisy images of 20x16 pixels."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 60, (16, 20, 3), np.uint8)
            pixels[..., 0 if label else 2] += 190
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path / "source"


@pytest.fixture
def config(source, tmp_path) -> PrepareConfig:
    """5 shards for training, 2 for validation."""
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        image_size=16,
        batch_size=2,
        records_per_shard=4,
        held_out_fraction=0.2,
    )


def replaced(config, **changes):
    return PrepareConfig(**(vars(config) | changes))


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
    full = prepare(replaced(config, out=config.out + "-full", hflip=True, posterior_std=True, dtype="float32"))
    assert full.num_records("train") == 2 * plain.num_records("train")
    assert full.num_records("validation") == plain.num_records("validation")
    assert full.has_latent_std and full.latent_dtype == "float32"
    record = open_labelled(config.out + "-full").read([0])[0]
    assert record["latent"].dtype == record["latent_std"].dtype == np.float32
    assert (record["latent_std"] > 0).all()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("finished", [0, 3])
def test_an_interrupted_run_continues_to_the_same_data_set(config, monkeypatch, finished):
    whole = prepare(replaced(config, out=config.out + "-whole"))
    write_shard, written = prepare_module.write_shard, []

    def write_until_interrupted(path, records):
        write_shard(path, interrupted(records) if len(written) == finished else records)
        written.append(path.name)

    def interrupted(records):
        yield next(records)
        raise Interrupted

    def write_and_count(path, records):
        write_shard(path, records)
        written.append(path.name)

    monkeypatch.setattr(prepare_module, "write_shard", write_until_interrupted)
    with pytest.raises(Interrupted):
        prepare(config)
    assert len(written) == finished and not (Path(config.out) / "dataset.json").exists()
    monkeypatch.setattr(prepare_module, "write_shard", write_and_count)
    assert prepare(config).id == whole.id
    assert written == [shard.file for shard in whole.shards]  # each once: no finished shard was written again
    assert sorted(os.listdir(config.out)) == sorted(os.listdir(config.out + "-whole"))


def test_a_killed_run_continues_to_the_same_data_set(config):
    whole = prepare(replaced(config, out=config.out + "-whole"))
    script = """
        import sys, time
        from flowdit.data import prepare as module
        write_shard = module.write_shard
        module.write_shard = lambda path, records: (write_shard(path, records), time.sleep(0.5))
        module.prepare(module.PrepareConfig(**eval(sys.argv[1])))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), repr(vars(config))]
    package = Path(prepare_module.__file__).parents[2]
    process = subprocess.Popen(arguments, cwd=package, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(Path(config.out).glob("*.array_record.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (Path(config.out) / "dataset.json").exists()
    assert prepare(config).id == whole.id


def test_a_finished_data_set_is_not_changed(config, messages):
    manifest = prepare(config)
    assert "training and" in messages()[-1]
    times = {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    assert prepare(config) == manifest
    assert "already prepared" in messages()[-1]
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()} == times


def test_a_finished_data_set_with_a_damaged_shard_is_not_called_finished(config):
    shard = Path(config.out) / prepare(config).shards[2].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=f"{shard.name}: must have .* bytes"):
        prepare(config)


@pytest.mark.parametrize(("field", "value"), [("hflip", True), ("batch_size", 3), ("dtype", "float32")])
def test_other_settings_in_the_same_folder_are_refused_and_lose_nothing(config, field, value):
    manifest = prepare(config)
    with pytest.raises(
        ValueError, match=f"out: .* was started with {field}={getattr(config, field)!r}, this run has {value!r}"
    ):
        prepare(replaced(config, **{field: value}))
    verify(config.out, manifest)


def test_other_images_in_the_same_folder_are_refused(config, source):
    prepare(config)
    Image.new("RGB", (16, 16)).save(source / "red" / "new.png")
    with pytest.raises(ValueError, match="out: .* was started with pictures="):
        prepare(config)


def test_a_folder_of_foreign_shards_is_refused(config):
    prepare(config)
    (Path(config.out) / "prepare.json").unlink()
    with pytest.raises(ValueError, match=r"out: .* holds shards without prepare.json"):
        prepare(config)
    (Path(config.out) / "prepare.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"out: .*prepare.json is damaged"):
        prepare(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere"}, "source: must be 'openmoji' or a folder of images, there is no folder 'nowhere'"),
        ({"image_size": 12}, "image_size: must be a multiple of the VAE's stride 8, got 12"),
        ({"image_size": 0}, "image_size: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"records_per_shard": 0}, "records_per_shard: must be at least 1, got 0"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction: must be in \[0, 1\), got 1.0"),
        ({"held_out_fraction": 0.9999}, "held_out_fraction: 0.9999 leaves no image to train on"),
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
        prepare(replaced(config, **changes))
    assert not Path(config.out).exists()


def test_a_folder_without_classes_or_images_is_named(config, source):
    (source / "green").mkdir()
    (source / "green" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="source: class folder .*green has no images"):
        prepare(config)
    for image in (source / "red").glob("*.png"):
        image.unlink()
    with pytest.raises(ValueError, match="source: .*red must have images or one sub-folder of them for each class"):
        prepare(replaced(config, source=str(source / "red")))


@pytest.mark.parametrize("damage", [lambda data: b"not an image", lambda data: data[: len(data) // 2]])
def test_an_unreadable_image_is_named(config, source, damage):
    path = source / "red" / "03.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: cannot be read as an image: ") as error:
        prepare(config)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to .*file/data: Not a directory"):
        prepare(replaced(config, out=str(tmp_path / "file" / "data")))


def test_a_full_disk_is_named_and_leaves_no_half_shard(config):
    script = """
        import resource, sys
        from flowdit.data.prepare import PrepareConfig, prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        prepare(PrepareConfig(**eval(sys.argv[1])))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), repr(vars(config))],
        cwd=Path(prepare_module.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr.strip().split("\n")[-1].startswith(f"ValueError: out: cannot write to {config.out}: ")
    assert os.listdir(config.out) == ["prepare.json"]


def test_transparent_and_rotated_images_are_read_as_displayed(config, source):
    folder = source / "red"
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "a.png")
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(half).save(folder / "b.png", exif=exif)
    images = prepare_module.load_images(str(source), 0.0)
    clear, turned = (np.asarray(images.open(i)) for i in (24, 25))
    assert (clear == 255).all()
    np.testing.assert_array_equal(turned, half[::-1])


def test_center_crop_takes_the_middle_without_distortion():
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:, 64:192, 1] = 255
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16))
    assert cropped.shape == (16, 16, 3)
    assert (cropped[:, 1:-1, 1] > 240).all() and (cropped[..., 0] == 0).all()


def write_captions(source, path, **changes):
    """A line for each image, in another order than the images'; `changes` are short captions by image."""
    names = sorted((file.relative_to(source).as_posix() for file in source.rglob("*.png")), reverse=True)
    lines = [{"file": name, "short_caption": changes.get(name, name), "long_caption": f"long {name}"} for name in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_captions_belong_to_their_images_and_classes_stay(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    plain, captioned = prepare(config), prepare(replaced(config, captions=captions, out=config.out + "-text"))
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
    manifest = prepare(replaced(config, source=str(source / "red"), captions=captions))
    assert (manifest.class_names, manifest.has_captions) == ((), True)
    record = open_captioned(config.out, None).read([0])[0]
    assert set(record) == {"latent", "short_caption", "long_caption"}


def test_other_captions_in_the_same_folder_are_refused(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    prepare(replaced(config, captions=captions))
    moved = str(Path(captions).rename(tmp_path / "moved.jsonl"))
    prepare(replaced(config, captions=moved))
    write_captions(source, tmp_path / "moved.jsonl", **{"red/00.png": "another"})
    with pytest.raises(
        ValueError, match="out: .* was started with captions='[0-9a-f]{64}', this run has '[0-9a-f]{64}'"
    ):
        prepare(replaced(config, captions=moved))


def test_captions_of_other_images_leave_no_files(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    (source / "red" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"captions.jsonl has 1 captions without an image in .*: 'red/00.png'"):
        prepare(replaced(config, captions=captions))
    assert not Path(config.out).exists()


def test_text_features_are_added_to_a_finished_data_set(config, source, tmp_path, messages):
    captioned = replaced(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    manifest = prepare(captioned)
    with_text = replaced(captioned, text_encoder="wordllama", text_dtype="float32", text_max_length=6)
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
        prepare(replaced(with_text, text_max_length=7))
    other = tmp_path / "other"
    prepare(replaced(with_text, text_max_length=7, text_cache=str(other)))
    assert (other / "text_features.json").exists()


def test_a_run_without_an_encoder_does_not_change_the_text_features(config, source, tmp_path, messages):
    captioned = replaced(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    prepare(replaced(captioned, text_encoder="wordllama"))
    times = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    assert Path(config.out, "text_features", "text_features.json") in times
    prepare(captioned)
    assert "already prepared" in messages()[-1]
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == times


def test_an_invalid_text_encoder_is_reported_before_latents_are_encoded(config, source, tmp_path):
    captioned = replaced(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    for changes, message in (
        ({"text_encoder": " "}, "^text_encoder: must be 'wordllama', a folder or a hub id, got ' '"),
        ({"text_encoder": str(source)}, "^text_encoder: .*source: must hold tokenizer.json"),
        (
            {"text_encoder": str(write_t5gemma(tmp_path / "t5gemma")), "text_max_length": 1},
            "^text_max_length: must be above the 1 special tokens, got 1$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(replaced(captioned, **changes))
        assert not Path(config.out).exists()


def test_a_text_cache_that_cannot_be_written_is_named(config, source, tmp_path):
    captions = write_captions(source, tmp_path / "captions.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="text_cache: cannot write to .*file/text: Not a directory"):
        prepare(
            replaced(config, captions=captions, text_encoder="wordllama", text_cache=str(tmp_path / "file" / "text"))
        )


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
