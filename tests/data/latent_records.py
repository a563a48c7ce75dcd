"""A small data set of random latents, written without any VAE."""

from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from flowdit.data.manifest import Manifest, Shard, Split, VaeInfo, file_sha256
from flowdit.data.records import encode

LATENT_SHAPE = (4, 2, 2)
NUM_CLASSES = 5


def record_of(index: int) -> dict:
    """A record that can be told by its values: all are `index`."""
    return {"latent": np.full(LATENT_SHAPE, index, np.float16), "label": index % NUM_CLASSES}


def write_dataset(folder: Path, shards: dict[Split, list[list[dict]]], has_latent_std: bool = False) -> Manifest:
    """Write the records of each shard of each split, and the manifest."""
    entries = []
    for split, parts in shards.items():
        for i, records in enumerate(parts):
            file = f"{split}-{i:05d}-of-{len(parts):05d}.array_record"
            writer = ArrayRecordWriter(str(folder / file), "group_size:1")
            for record in records:
                writer.write(encode(record))
            writer.close()
            size, digest = (folder / file).stat().st_size, file_sha256(folder / file)
            entries.append(Shard(file, split, len(records), size, digest))
    manifest = Manifest(
        latent_shape=LATENT_SHAPE,
        latent_dtype="float16",
        has_latent_std=has_latent_std,
        vae=VaeInfo(name="none", fingerprint="0", shift=0.0, scale=1.0, stride=8),
        image_size=16,
        channel_mean=(0.0,) * 4,
        channel_std=(1.0,) * 4,
        class_names=tuple("abcde"),
        shards=tuple(entries),
        license="",
        attribution="",
    )
    manifest.write(folder)
    return manifest
