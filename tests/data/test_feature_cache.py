"""Feature maps of the training images: those of what the latents show, written once, and refused if they do not match."""

import dataclasses
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from latent_records import record_of, write_dataset
from PIL import Image

from flowdit import features
from flowdit.data.feature_cache import image_key, open_features, read_features
from flowdit.data.feature_maps import Images, write_features
from flowdit.data.images import cover_crop, open_image
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.records import RecordError
from flowdit.data.schema import Schema
from flowdit.data.shards import write_shard
from flowdit.data.sources import open_images
from flowdit.features import FeatureNetwork
from flowdit.features.resize import resize

SHAPE = (4, 4, 3)


class Small(eqx.Module):
    """The image itself, resized to 4x4 pixels."""

    scale: jnp.ndarray

    map_layer = "pixels"

    def __call__(self, images):
        raise NotImplementedError

    def maps(self, images):
        return self.scale * resize(images, *SHAPE[:2])


def small_network(scale: float = 1.0) -> FeatureNetwork:
    return FeatureNetwork("efficientnet", Small(jnp.asarray(scale)), 3, f"mean of {scale}", weights=f"small {scale}")


@pytest.fixture(autouse=True)
def network(monkeypatch) -> None:
    """The one called `efficientnet` is small."""
    monkeypatch.setitem(features.LOADERS, "efficientnet", lambda weights: small_network())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> PrepareConfig:
    """A data set of 12 images in two buckets, in shards of four, with mirrored copies; without maps."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "source").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20) if i % 2 else (20, 16), np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / "source" / f"{i:02d}.png")
    config = PrepareConfig(
        source=str(folder / "source"),
        out=str(folder / "out"),
        image_size=16,
        batch_size=4,
        records_per_shard=4,
        held_out_fraction=0.2,
        vae_check=0,
        hflip=True,
        buckets="computed",
        bucket_ratios=[0.5, 2.0],
        bucket_multiple=8,
    )
    assert len(prepare(config).buckets) == 2
    return config


@pytest.fixture
def config(finished, tmp_path) -> PrepareConfig:
    """Settings that add maps to a copy of it."""
    shutil.copytree(finished.out, tmp_path / "out")
    return dataclasses.replace(finished, out=str(tmp_path / "out"), features="efficientnet")


def records_of(out) -> list:
    source = open_source(out, Manifest.read(out), schema=Schema({}))
    return source.read(range(len(source)))


def reopened(out, **options):
    return open_features(Path(out) / "efficientnet_features", Manifest.read(out), data=out, **options)


def expected_map(source, record) -> np.ndarray:
    """The map of what the latent of a record shows."""
    image = open_image((Path(source) / record["key"]).read_bytes())
    pixels = np.asarray(cover_crop(image, *(8 * side for side in record["latent"].shape[1:])))
    pixels = pixels[:, ::-1] if record.get("mirrored") else pixels
    return np.asarray(Small(jnp.ones(())).maps(jnp.asarray(pixels[None])))[0].astype(np.float16)


def check_maps(config) -> int:
    """Check the maps of a data set against its images, and return their number."""
    records = records_of(config.out)
    maps = reopened(config.out).read(range(len(records)), records)
    assert (maps.dtype, maps.shape) == (np.float16, (len(records), *SHAPE))
    assert {bool(record.get("mirrored")) for record in records} == {True, False}
    for one, record in zip(maps, records, strict=True):
        np.testing.assert_array_equal(one, expected_map(config.source, record))
    return len(records)


def test_maps_are_added_to_a_finished_data_set_and_written_once(config, messages, monkeypatch):
    before = {path: path.read_bytes() for path in Path(config.out).iterdir()}
    manifest = prepare(config)
    count = check_maps(config)
    assert count == manifest.num_records("train")
    assert f"maps of {count} images by efficientnet, 4x4x3, " in messages()[-1]
    assert all(path.read_bytes() == data for path, data in before.items())
    cache = Path(config.out) / "efficientnet_features"
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    names = {"prepare.json", "features.json", *(shard.file for shard in manifest.shards_of("train"))}
    assert {path.name for path in times} == names
    prepare(config)
    assert "efficientnet_features already holds the features of this data set" in messages()[-1]
    assert times == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    monkeypatch.setitem(features.LOADERS, "efficientnet", lambda weights: small_network(2.0))
    with pytest.raises(ValueError, match="^feature_cache: .*_features was started with features='small 1"):
        prepare(config)


def test_an_interrupted_run_is_continued_with_the_same_result(config, tmp_path, monkeypatch):
    whole = write_features(tmp_path / "whole", images_of(config), small_network())
    seen = []

    def crop(*arguments):
        seen.append(arguments)
        if len(seen) > 6:
            raise KeyboardInterrupt
        return cover_crop(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("flowdit.data.feature_maps.cover_crop", crop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    cache = Path(config.out) / "efficientnet_features"
    shards = {path: path.stat().st_mtime_ns for path in cache.glob("*.array_record")}
    assert len(shards) == 1 and not (cache / "features.json").exists()
    prepare(config)
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items())
    assert read_features(cache) == whole


def images_of(config, source=None) -> Images:
    out = Path(config.out)
    return Images(out, Manifest.read(out), source or open_images(config), config.max_pixels, config.batch_size)


class Changed:
    """A source that gives other rows than it did."""

    def __init__(self, source, change):
        self._source, self._change = source, change

    def units(self):
        return self._source.units()

    def read(self, unit, rows=None):
        return (
            (number, new) for number, row in self._source.read(unit, rows) if (new := self._change(row)) is not None
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: None, r"^source: 4 of the 4 images of train-00000-of-0000\d.array_record are not there any more$"),
        (lambda row: row._replace(image=row.image + b" "), "^source: .*png is not the image that was prepared$"),
    ],
)
def test_a_source_that_changed_is_refused(config, tmp_path, change, message):
    changed = Changed(open_images(config), change)
    with pytest.raises(ValueError, match=message):
        write_features(tmp_path / "maps", images_of(config, changed), small_network())
    assert not (tmp_path / "maps" / "features.json").exists()


def test_another_source_and_records_without_a_key_are_refused(config, tmp_path):
    other = dataclasses.replace(config, records_per_shard=100)
    with pytest.raises(ValueError, match="^source: has no part for train-00000-of-.*: it is not the source that"):
        write_features(tmp_path / "maps", images_of(config, open_images(other)), small_network())
    old = dataclasses.replace(config, out=str(tmp_path / "old"))
    units = open_images(config).units()
    name = [int(part) for part in units[0].name.split("-of-")]
    write_dataset(tmp_path / "old", {"train": [[record_of(i)] for i in range(name[1])]})
    with pytest.raises(ValueError, match="record 0: key: is missing, so its image is not known: prepare the data set"):
        write_features(tmp_path / "more", images_of(old), small_network())


def test_features_that_float16_cannot_hold_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="^features: must be finite in float16"):
        write_features(tmp_path / "maps", images_of(config), small_network(1e6))


def rewrite(out, change) -> None:
    """Replace the first shard of maps, and its entry in the manifest."""
    cache = Path(out) / "efficientnet_features"
    stored = json.loads((cache / "features.json").read_text())
    name, count = stored["shards"][0]["file"], stored["shards"][0]["records"]
    records = records_of(out)[:count]
    maps = reopened(out).read(range(count), records)
    entries = [{"key": image_key(record), "map": one} for record, one in zip(records, maps, strict=True)]
    sidecar = write_shard(cache / name, change(entries), lambda record: {})
    stored["shards"][0] |= {"bytes": sidecar.bytes, "sha256": sidecar.sha256}
    (cache / "features.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[::-1], "record 0: key: must be .* got .*: another image$"),
        (
            lambda entries: [e | {"map": np.full_like(e["map"], np.nan)} for e in entries],
            "record 0: must be finite, got 48",
        ),
        (
            lambda entries: [e | {"map": e["map"][:3]} for e in entries],
            r"record 0: map: must have shape \(4, 4, 3\), got",
        ),
        (
            lambda entries: [e | {"map": e["map"].astype(np.float32)} for e in entries],
            "record 0: map: must be a float16 array, got an array of float32",
        ),
        (lambda entries: [{"map": e["map"]} for e in entries], r"record 0: key: is missing, the record has \['map'\]"),
    ],
)
def test_maps_that_are_damaged_or_of_other_images_are_refused(config, change, message):
    prepare(config)
    rewrite(config.out, change)
    with pytest.raises(RecordError, match=message):
        reopened(config.out).read([0], records_of(config.out)[:1])


def test_a_cache_of_another_data_set_or_no_cache_is_refused(config, tmp_path):
    prepare(config)
    cache = Path(config.out) / "efficientnet_features"
    other = write_dataset(tmp_path / "other", {"train": [[record_of(1)]]})
    with pytest.raises(ValueError, match="features.json: id of the data set: must be .* as in this run, got "):
        open_features(cache, other, data=tmp_path / "other")
    with pytest.raises(ValueError, match=r"has no features.json; `python -m flowdit.prepare features=...` makes it$"):
        open_features(tmp_path, other, data=tmp_path / "other")
    cache.joinpath(read_features(cache).shards[0].file).unlink()
    with pytest.raises(ValueError, match="array_record: is missing: the data changed since it was prepared"):
        reopened(config.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "resnet"}, "^features: must be one of efficientnet, inception, dinov2, clip, got 'resnet'$"),
        ({"features": "dinov2"}, "^weights.dinov2: must be given for features=dinov2: "),
        ({"feature_cache": "s3://bucket/maps"}, "^feature_cache: "),
    ],
)
def test_invalid_settings_are_reported_before_latents_are_encoded(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(config, out=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
