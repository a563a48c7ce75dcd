"""Aspect buckets: their sizes, which image goes where, and the data set that results."""

import dataclasses
import math

import equinox as eqx
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from list_source import ListSource, as_source, picture

from flowdit.data.images import cover_crop, open_image
from flowdit.data.manifest import Bucket, verify
from flowdit.data.preparation.buckets import PIXART, RATIOS, make_buckets, merged, nearest
from flowdit.data.prepare import prepare
from flowdit.data.records import decode
from flowdit.data.sources.base import Row, is_held_out
from flowdit.models.vae import load_vae


def test_pixarts_tables_are_multiples_of_one():
    """Some of its published entries for 256, 512 and 1024 pixels."""
    assert len(PIXART) == 40
    sizes = {
        size: {(b.height, b.width) for b in make_buckets("pixart", size, 8, None, [])} for size in (256, 512, 1024)
    }
    assert {(128, 512), (176, 368), (256, 256), (304, 208), (512, 128)} <= sizes[256]
    assert {(256, 1024), (352, 736), (512, 512), (608, 416), (1024, 256)} <= sizes[512]
    assert {(512, 2048), (704, 1472), (1024, 1024), (1216, 832), (2048, 512)} <= sizes[1024]
    assert all(len(found) == 40 for found in sizes.values())
    with pytest.raises(ValueError, match="^image_size: must be a multiple of 128 for buckets=pixart, got 64$"):
        make_buckets("pixart", 64, 8, None, [])


@pytest.mark.parametrize(("size", "stride"), [(64, 8), (256, 8), (512, 32), (1000, 8)])
def test_computed_buckets_have_about_the_area_and_ratio_that_are_asked_for(size, stride):
    found = make_buckets("computed", size, stride, None, RATIOS)
    assert all(bucket.height % (2 * stride) == bucket.width % (2 * stride) == 0 for bucket in found)
    ratios = [bucket.height / bucket.width for bucket in found]
    assert ratios == sorted(ratios)
    if size >= 32 * stride:
        assert all(abs(math.log2(b.height * b.width / size**2)) < 0.4 for b in found)
        assert all(min(abs(math.log2(ratio / r)) for r in RATIOS) < 0.3 for ratio in ratios)
    with pytest.raises(ValueError, match=f"^bucket_multiple: must be a multiple of the VAE's stride {stride}, got 12$"):
        make_buckets("computed", size, stride, 12, RATIOS)


def test_an_image_goes_to_the_nearest_ratio_whichever_way_it_is_turned():
    buckets = [Bucket(16, 64), Bucket(32, 32), Bucket(64, 16)]
    sizes = np.array([(1, 5), (10, 21), (10, 19), (7, 7), (19, 10), (21, 10), (500, 1)])
    assert nearest(sizes, buckets).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert nearest(sizes[:, ::-1], buckets).tolist() == [2, 2, 1, 1, 1, 0, 0]
    assert nearest(sizes, []).tolist() == [0] * 7


def test_small_buckets_give_their_images_to_the_nearest_large_one():
    buckets = [Bucket(16, 64), Bucket(16, 32), Bucket(32, 32), Bucket(64, 16)]
    assert merged(buckets, [3, 9, 2, 9], 4).tolist() == [1, 1, 1, 3]
    assert merged(buckets, [3, 0, 2, 0], 1).tolist() == [0, 0, 2, 2]
    assert merged(buckets, [3, 5, 2, 1], 10).tolist() == [1, 1, 1, 1]
    assert merged([], [7], 10).tolist() == [0]


SHAPES = [(40, 20), (20, 40), (30, 30), (80, 20)]


@pytest.fixture
def rows() -> list[Row]:
    """33 images of four shapes, (width, height)."""
    return [Row(f"image {i}", picture(*SHAPES[i % 4], seed=i)) for i in range(33)]


@pytest.fixture
def bucketed(config, rows, monkeypatch):
    """Three units; the widest images are too few for a bucket of their own."""
    return dataclasses.replace(
        config,
        source=as_source(monkeypatch, ListSource(rows, size=12)),
        image_size=32,
        buckets="computed",
        bucket_ratios=[0.25, 0.5, 1.0, 2.0],
        bucket_multiple=8,
        batch_size=4,
        hflip=True,
    )


def read(folder, manifest):
    """All records by shard."""
    return {s.file: [decode(r) for r in ArrayRecordReader(f"{folder}/{s.file}").read_all()] for s in manifest.shards}


def test_records_are_those_of_their_bucket_and_sorted_by_it(bucketed, rows):
    manifest = prepare(bucketed)
    verify(bucketed.out, manifest, hashes=True)
    assert [(b.height, b.width) for b in manifest.buckets] == [(16, 64), (24, 48), (32, 32), (48, 24)]
    assert manifest.latent_shape == (16, 4, 4)
    by_key = {row.key: row for row in rows}
    encode = eqx.filter_jit(load_vae("openmoji").encode)
    seen: list[tuple[str, bool]] = []
    for shard in manifest.shards:
        records = read(bucketed.out, manifest)[shard.file]
        numbers = [manifest.bucket_shapes.index(record["latent"].shape) for record in records]
        assert numbers == sorted(numbers) and tuple(np.bincount(numbers, minlength=4)) == shard.buckets
        for number, record in zip(numbers, records, strict=True):
            row = by_key[record["key"]]
            image = open_image(row.image)
            bucket = manifest.buckets[number]
            assert tuple(record["image_size"]) == (image.height, image.width)
            assert nearest(record["image_size"][None], manifest.buckets)[0] == number
            pixels = np.asarray(cover_crop(image, bucket.height, bucket.width), np.float32)
            pixels = pixels[:, ::-1] if record.get("mirrored") else pixels
            expected = encode(pixels.transpose(2, 0, 1) / 127.5 - 1).mean
            np.testing.assert_allclose(record["latent"], expected, atol=0.02)
            assert (shard.split == "validation") == is_held_out(row.key, bucketed.held_out_fraction)
            seen.append((row.key, bool(record.get("mirrored"))))
    train = [row.key for row in rows if not is_held_out(row.key, bucketed.held_out_fraction)]
    assert sorted(seen) == sorted([*((row.key, False) for row in rows), *((key, True) for key in train)])
    assert sum(manifest.bucket_counts("train")) == 2 * len(train)


def test_statistics_weigh_every_position_of_every_latent(bucketed):
    manifest = prepare(bucketed)
    train = [r for s in manifest.shards_of("train") for r in read(bucketed.out, manifest)[s.file]]
    values = np.concatenate([record["latent"].reshape(16, -1).astype(np.float64) for record in train], 1)
    np.testing.assert_allclose(manifest.channel_mean, values.mean(1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(manifest.channel_std, values.std(1), rtol=1e-9)


def test_buckets_with_few_images_are_merged(bucketed):
    bucketed = dataclasses.replace(bucketed, hflip=False)
    alone = prepare(bucketed)
    counts = dict(zip(alone.buckets, alone.bucket_counts("train"), strict=True))
    least = sorted(set(counts.values()))[1]
    manifest = prepare(dataclasses.replace(bucketed, out=bucketed.out + "-merged", min_bucket_records=least))
    assert set(manifest.buckets) == {bucket for bucket, count in counts.items() if count >= least} != set(alone.buckets)
    for split in ("train", "validation"):
        assert manifest.num_records(split) == alone.num_records(split)
