"""Caches of feature maps of noise, for tests of training."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flowdit.data.feature_cache import FILE_NAME, FeatureManifest, image_key
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest, as_json, write_json
from flowdit.data.schema import Schema
from flowdit.data.shards import described, remove_sidecar, write_shard

SHAPE = (3, 3, 6)


def named(index: int) -> dict[str, Any]:
    """The fields of a record that name its image."""
    key = f"{index}.png"
    return {"key": key, "content_hash": hashlib.blake2b(key.encode(), digest_size=16).digest()}


def write_maps(folder: Path, data: Path, *, identity: str = "noise", seed: int = 0) -> Path:
    """Maps of noise for the training images of a data set whose records have the fields of `named`."""
    folder.mkdir(parents=True)
    manifest, noise = Manifest.read(data), np.random.default_rng(seed)
    source = open_source(data, manifest, schema=Schema({}))
    shards, start = [], 0
    for shard in manifest.shards_of("train"):
        records = source.read(range(start, start + shard.records))
        maps = noise.standard_normal((len(records), *SHAPE)).astype(np.float16)
        entries = ({"key": image_key(record), "map": one} for record, one in zip(records, maps, strict=True))
        shards.append(described(shard, write_shard(folder / shard.file, entries, lambda record: {})))
        remove_sidecar(folder / shard.file)
        start += shard.records
    cache = FeatureManifest(network="noise", identity=identity, shape=SHAPE, data=manifest.id, shards=tuple(shards))
    write_json(epath.Path(folder) / FILE_NAME, as_json(cache))
    return folder
