"""A data set of random latents for the embedded VAE, with classes and captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowdit.data.manifest import Manifest, Shard, Split, VaeInfo
from flowdit.data.shards import channel_statistics, write_shard
from flowdit.models.vae import load_vae

LATENT_SHAPE = (16, 8, 8)
CLASS_NAMES = ("cat", "dog", "heart", "sun")


def write_noise_data(folder: Path, num_shards: int, records_per_shard: int, validation_records: int = 64) -> None:
    """Write `num_shards` shards for training and one for validation, and their `dataset.json`.

    Every shard holds the same 1,000 latents over and over, as drawing millions of them takes longer than writing.
    """
    folder.mkdir(parents=True)
    vae = load_vae("openmoji")
    info = VaeInfo("openmoji", vae.fingerprint, vae.config.shift_factor, vae.config.scaling_factor, stride=8)
    latents = np.random.default_rng(0).standard_normal((1000, *LATENT_SHAPE)).astype(np.float16)

    def records(count: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            captions = {"short_caption": CLASS_NAMES[i % 4], "long_caption": f"{CLASS_NAMES[i % 4]}, drawn in noise"}
            yield {"latent": latents[i % 1000], "label": i % 4, **captions}

    shards, sidecars = [], []
    counts = [records_per_shard] * num_shards + [validation_records]
    for i, count in enumerate(counts):
        split: Split = "train" if i < num_shards else "validation"
        file = f"{split}-{i:05d}.array_record"
        sidecars.append(sidecar := write_shard(folder / file, records(count)))
        shards.append(Shard(file, split, sidecar.records, sidecar.bytes, sidecar.sha256))
    mean, std = channel_statistics(sidecars[:-1])
    manifest = Manifest(
        latent_shape=LATENT_SHAPE,
        latent_dtype="float16",
        has_latent_std=False,
        vae=info,
        image_size=64,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        class_names=CLASS_NAMES,
        has_captions=True,
        shards=tuple(shards),
        license="CC0",
        attribution="",
    )
    manifest.write(folder)
