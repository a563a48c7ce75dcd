"""From latents to images: the VAE that made the data's latents, and decoding with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import denormalise_latents
from flowdit.fields import FieldError, about
from flowdit.models.vae import AutoencoderKL, load_vae, to_pixels
from flowdit.sharding import batch_sharding, batch_shards, replicated

Decode = Callable[..., UInt8[np.ndarray, "n height width 3"]]
DECODED_AT_ONCE = 16
"""Images per device and decoding call: the VAE needs far more memory than the diffusion network."""


def make_decoder(vae: AutoencoderKL, mean: Sequence[float], scale: Sequence[float], mesh: Mesh) -> Decode:
    """Return (normalised latents, batch size to compile for, by default their number) -> uint8 images, split over the mesh."""
    vae = jax.device_put(vae, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decode_batch(vae, latents):
        return decode_pixels(vae, latents, mean, scale)

    def decode(latents: Float[Any, "n c h w"], batch_size: int | None = None) -> UInt8[np.ndarray, "n height width 3"]:
        shards, latents = batch_shards(mesh), np.asarray(latents)
        size = min(-(-(batch_size or len(latents)) // shards), DECODED_AT_ONCE) * shards
        padded = np.concatenate([latents, np.zeros((-len(latents) % size, *latents.shape[1:]), latents.dtype)])
        rows = [jax.device_put(padded[i : i + size], batch_sharding(mesh)) for i in range(0, len(padded), size)]
        images = np.concatenate([np.asarray(decode_batch(vae, part)) for part in rows])
        return images[: len(latents)].transpose(0, 2, 3, 1)

    return decode


def decode_pixels(
    vae: AutoencoderKL, latents: Float[Array, "n c h w"], mean: Sequence[float], scale: Sequence[float]
) -> UInt8[Array, "n channels height width"]:
    """Pixels of normalised latents; traceable."""
    return to_pixels(jax.vmap(vae.decode)(denormalise_latents(latents, jnp.asarray(mean), jnp.asarray(scale))))


def load_matching_vae(name: str, manifest: Manifest) -> AutoencoderKL:
    """Load the VAE `name`. Raises `ValueError` if it is not the one that made the data's latents.

    The VAE of an imported model may be unknown, with an empty fingerprint: then only the layout of the latents is
    checked.
    """
    known, channels = manifest.vae, manifest.latent_shape[0]
    if not name:
        rule = f"must be given, the checkpoint has none (an AutoencoderKL folder or hub id with {channels} channels)"
        raise FieldError("vae", rule)
    with about("vae"):
        vae = load_vae(name)
    wanted = (channels, known.stride, known.shift, known.scale)
    found = (vae.config.latent_channels, vae.config.stride, vae.config.shift_factor, vae.config.scaling_factor)
    if found != wanted:
        needed, made = ("{} channels, stride {}, shift {} and scale {}".format(*layout) for layout in (wanted, found))
        raise FieldError("vae", f"must make latents of {needed}, {name!r} makes {made}")
    if known.fingerprint and vae.fingerprint != known.fingerprint:
        rule = f"must be the one that made the latents (fingerprint {known.fingerprint})"
        raise FieldError("vae", f"{rule}, {name!r} has {vae.fingerprint}")
    return vae
