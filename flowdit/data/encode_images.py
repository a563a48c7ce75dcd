"""From images to records: reading and cropping in threads, encoding with the VAE in batches on all local devices."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import grain
import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from flowdit.data.images import ImageError, ImageSet, center_crop
from flowdit.data.rejected import Rejected
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
) -> Iterator[dict[str, Any] | Rejected]:
    """The records of one shard, whose items are rows of (image index, whether mirrored), or why there is none.

    Latents are raw posterior means, without the VAE's shift and scale.
    """
    parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    dataset = grain.MapDataset.range(len(parts)).map(lambda i: _read(image_set, parts[i], image_size))
    for part, batch in zip(parts, dataset.to_iter_dataset(READ_OPTIONS), strict=True):
        mean, std = (values.astype(dtype) for values in encode_batch(batch.images))
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"dtype: the VAE's latents must be finite in {dtype}: check the VAE")
        for i, index in enumerate(part[:, 0].tolist()):
            if i in batch.reasons:
                yield Rejected(image_set.name_of(index), batch.reasons[i])
                continue
            record = {"latent": mean[i]} | image_set.condition(index)
            yield record | ({"latent_std": std[i]} if posterior_std else {})


class _Batch(NamedTuple):
    """Images, black where one cannot be read, so that the others do not depend on it; and why, by row."""

    images: UInt8[np.ndarray, "n size size 3"]
    reasons: dict[int, str]


def _read(image_set: ImageSet, items: Int[np.ndarray, "n 2"], size: int) -> _Batch:
    images = np.zeros((len(items), size, size, 3), np.uint8)
    reasons = {}
    for i, (index, mirrored) in enumerate(items.tolist()):
        try:
            image = cropped(image_set, index, size)
        except ImageError as error:
            reasons[i] = error.reason
            continue
        images[i] = image[:, ::-1] if mirrored else image
    return _Batch(images, reasons)


def cropped(image_set: ImageSet, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The pixels of an image, cropped to a square. Raises `ImageError` if it cannot be read."""
    return np.asarray(center_crop(image_set.open(index), size))
