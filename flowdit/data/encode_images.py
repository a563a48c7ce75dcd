"""Encoding images in batches with the VAE or another network, on all local devices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, UInt8

from flowdit.models.vae import AutoencoderKL, Posterior
from flowdit.sharding import batch_sharding, batch_shards, make_local_mesh, replicated

EncodeBatch = Callable[[np.ndarray], "Encoded"]


class Encoded(NamedTuple):
    """What a network makes of images, which may still be computed: `ready` waits for it."""

    results: Any
    count: int

    def ready(self) -> Any:
        """The results on the host."""
        return jax.tree.map(lambda rows: np.asarray(rows)[: self.count], self.results)


def latent_encoder(vae: AutoencoderKL, batch_size: int) -> EncodeBatch:
    """`on_all_devices` for the posterior's mean and std. Latents are raw means, without the VAE's shift and scale."""
    return on_all_devices(vae, _posterior, batch_size)


def on_all_devices(
    network: Any, function: Callable[[Any, UInt8[Array, "n height width 3"]], Any], batch_size: int
) -> EncodeBatch:
    """Return a function of uint8 images (n <= batch_size, height, width, 3): `function(network, images)`, a pytree with a
    row for each image, on all local devices.

    Each size of images is compiled once, of a function at the top of a module also over all calls.
    """
    mesh = make_local_mesh()
    network = eqx.filter_shard(network, replicated(mesh))
    rows = math.ceil(batch_size / batch_shards(mesh)) * batch_shards(mesh)

    def encode_batch(images: np.ndarray) -> Encoded:
        padded = np.pad(images, ((0, rows - len(images)), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
        return Encoded(_call(function, network, jax.device_put(padded, batch_sharding(mesh))), len(images))

    return encode_batch


@eqx.filter_jit
def _call(function: Callable[..., Any], network: Any, images: jax.Array) -> Any:
    return function(network, images)


def _posterior(vae: AutoencoderKL, images: UInt8[Array, "batch height width 3"]) -> Posterior:
    return jax.vmap(vae.encode)(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
