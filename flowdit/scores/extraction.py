"""Features of images by several networks, on the devices of a mesh: one compiled call from latents to features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.inference.images import DECODED_AT_ONCE, decode_pixels
from flowdit.models.vae import AutoencoderKL
from flowdit.sharding import batch_sharding, batch_shards, replicated

Features = dict[str, Extracted]
"""The features of some images, by the name of the network."""


class Seen(NamedTuple):
    """The features of a batch of images, and the images themselves, uint8 (n, height, width, 3), if they are wanted."""

    features: Features
    images: UInt8[Array, "n height width 3"] | None


class Extraction:
    """Feature networks on a mesh, whose devices share each batch. All processes get all results.

    Calls return before the results are computed, so that the host can start the next draw meanwhile. A batch is worked on
    in chunks, as decoder and feature networks need far more memory for an image than the diffusion network.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], mesh: Mesh):
        self._mesh = mesh
        self._models = jax.device_put({network.name: network.model for network in networks}, replicated(mesh))
        self._extract = jax.jit(self._features, out_shardings=replicated(mesh))

    def of_images(self, images: UInt8[np.ndarray, "n height width 3"], batch_size: int) -> Features:
        """The features of images, on the host; calls are compiled for `batch_size`, at least their number."""
        size = self._chunk(batch_size)
        padded = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), np.uint8)])
        chunks = [self._extract(self._models, padded[i : i + size]) for i in range(0, len(padded), size)]
        return on_host(chunks, len(images))

    def from_latents(
        self, vae: AutoencoderKL, mean: Sequence[float], scale: Sequence[float], *, keep_images: bool = False
    ) -> Callable[[Float[Array, "n c h w"]], list[Seen]]:
        """Return a function from normalised latents on the devices to what is seen of them, chunk by chunk.

        The last chunk may have rows of padding.
        """
        vae = jax.device_put(vae, replicated(self._mesh))

        def decode_and_extract(models: Any, vae: AutoencoderKL, latents: Float[Array, "n c h w"]) -> Seen:
            rows = jax.lax.with_sharding_constraint(latents, batch_sharding(self._mesh))
            images = decode_pixels(vae, rows, mean, scale).transpose(0, 2, 3, 1)
            return Seen(self._features(models, images), images if keep_images else None)

        # Compiled for one chunk, as XLA runs convolutions within a loop on one core of a CPU.
        compiled = jax.jit(decode_and_extract, out_shardings=replicated(self._mesh))

        def see(latents: Float[Array, "n c h w"]) -> list[Seen]:
            size = self._chunk(len(latents))
            padded = jnp.pad(latents, [(0, -len(latents) % size)] + [(0, 0)] * 3)
            return [compiled(self._models, vae, padded[i : i + size]) for i in range(0, len(padded), size)]

        return see

    def _features(self, models: dict[str, Any], images: UInt8[Array, "n height width 3"]) -> Features:
        images = jax.lax.with_sharding_constraint(images, batch_sharding(self._mesh))
        return {name: model(images) for name, model in models.items()}

    def _chunk(self, batch_size: int) -> int:
        shards = batch_shards(self._mesh)
        return min(-(-batch_size // shards), DECODED_AT_ONCE) * shards


def on_host(chunks: Sequence[Any], count: int) -> Any:
    """The first `count` rows of chunks of a batch as one, on the host."""
    return jax.tree.map(lambda *arrays: np.concatenate([np.asarray(array) for array in arrays])[:count], *chunks)
