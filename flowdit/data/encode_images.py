"""From images to records: reading and cropping in threads, encoding with the VAE in batches on all local devices."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import grain
import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from flowdit.data.images import ImageSet, center_crop
from flowdit.models.vae import AutoencoderKL, Posterior
from flowdit.sharding import batch_sharding, batch_shards, make_local_mesh, replicated

READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
"""Number of threads that read images, and of prefetched batches."""

EncodeBatch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def latent_encoder(vae: AutoencoderKL, batch_size: int) -> EncodeBatch:
    """Return a function from uint8 (n <= batch_size, size, size, 3) to posterior mean and std, on all local devices."""
    mesh = make_local_mesh()
    vae = eqx.filter_shard(vae, replicated(mesh))
    rows = math.ceil(batch_size / batch_shards(mesh)) * batch_shards(mesh)

    def encode_batch(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.pad(images, ((0, rows - len(images)), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
        mean, std = _posterior(vae, jax.device_put(padded, batch_sharding(mesh)))
        return np.asarray(mean)[: len(images)], np.asarray(std)[: len(images)]

    return encode_batch


@eqx.filter_jit
def _posterior(vae: AutoencoderKL, images: UInt8[Array, "batch height width 3"]) -> Posterior:
    return jax.vmap(vae.encode)(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def encoded_records(
    items: Int[np.ndarray, "records 2"],
    image_set: ImageSet,
    encode_batch: EncodeBatch,
    image_size: int,
    batch_size: int,
    dtype: str,
    posterior_std: bool,
) -> Iterator[dict[str, Any]]:
    """The records of one shard, whose items are rows of (image index, whether mirrored).

    Latents are raw posterior means, without the VAE's shift and scale.
    """
    images = grain.MapDataset.range(len(items)).map(lambda i: _image(image_set, items[i], image_size))
    batches = images.batch(batch_size, drop_remainder=False).to_iter_dataset(READ_OPTIONS)
    numbers = iter(items[:, 0].tolist())
    for batch in batches:
        mean, std = (part.astype(dtype) for part in encode_batch(batch))
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"dtype: the VAE's latents must be finite in {dtype}: check the VAE")
        for i in range(len(batch)):
            record = {"latent": mean[i]} | image_set.condition(next(numbers))
            yield record | ({"latent_std": std[i]} if posterior_std else {})


def _image(image_set: ImageSet, item: np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    index, mirrored = item
    image = np.asarray(center_crop(image_set.open(index), size))
    return image[:, ::-1] if mirrored else image
