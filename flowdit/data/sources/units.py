"""How a source is cut into units."""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from flowdit.data.manifest import Split
from flowdit.data.sources.base import Unit


def shard_size(rows: int, records_per_shard: int | None) -> int:
    """The rows of a unit: those asked for, or as many as make about 128 units of 512 to 16,384."""
    return records_per_shard or min(max(math.ceil(rows / 128), 512), 16384)


def unit_name(number: int, count: int) -> str:
    return f"{number:05d}-of-{count:05d}"


def shuffled_units(
    held_out: Bool[np.ndarray, " images"], fraction: float, records_per_shard: int | None
) -> Iterator[Unit]:
    """Units of a source that knows all its images: their parts are numbers of images.

    Training images are in a fixed random order over all units, those held out in their original order. Raises
    `ValueError` if all are held out.
    """
    train = np.flatnonzero(~held_out)
    if not len(train):
        raise ValueError(f"held_out_fraction: {fraction} leaves no image to train on")
    yield from _cut("train", np.random.default_rng(0).permutation(train), records_per_shard)
    yield from _cut("validation", np.flatnonzero(held_out), records_per_shard)


def _cut(split: Split, images: Int[np.ndarray, " n"], records_per_shard: int | None) -> Iterator[Unit]:
    count = math.ceil(len(images) / shard_size(len(images), records_per_shard))
    for i in range(count):
        yield Unit(unit_name(i, count), split, np.array_split(images, count)[i])
