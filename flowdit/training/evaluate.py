"""What a run shows of itself between steps: the validation loss and a grid of samples, always from the EMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowdit.data.loader import Source, validation_batches
from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import VALIDATION_TIMES
from flowdit.diffusion.pictures import make_decoder, save_grid
from flowdit.diffusion.sampling import SamplerConfig, picture_noise, sample
from flowdit.models.vae import AutoencoderKL, load_vae
from flowdit.sharding import replicated, shard_batch
from flowdit.training.objective import Objective
from flowdit.training.stages import Encode, Requests
from flowdit.training.step import make_validation_step


class Validation:
    """Loss on held-out records at eight fixed times with fixed noise: comparable between steps and runs."""

    def __init__(self, source: Source, mesh: Mesh, encode: Encode, objective: Objective, batch_size: int, limit: int,
                 seed: int):  # fmt: skip
        self._source, self._mesh, self._encode = source, mesh, encode
        self._batch_size, self._limit = batch_size, limit
        self._step = make_validation_step(objective, seed, mesh)

    def losses(self, model: Any) -> dict[str, float]:
        """`validation/loss`, and the loss at each time."""
        rows = dict(process_index=jax.process_index(), process_count=jax.process_count())
        sums, weight = np.zeros(len(VALIDATION_TIMES)), 0.0
        for i, batch in enumerate(validation_batches(self._source, self._batch_size, self._limit, **rows)):
            on_devices = self._encode(shard_batch(self._mesh, batch))
            batch_sums, batch_weight = self._step(model, on_devices, jnp.asarray(i))
            sums, weight = sums + np.asarray(batch_sums), weight + float(batch_weight)
        by_time = {f"validation/loss_t{t:.4f}": float(s / weight) for t, s in zip(VALIDATION_TIMES, sums, strict=True)}
        return {"validation/loss": float(sums.sum() / weight / len(sums)), **by_time}


def load_matching_vae(name: str, manifest: Manifest) -> AutoencoderKL:
    """The VAE called `name`. Raises `ValueError` if it is not the one that made the data's latents.

    Of a model that was trained elsewhere the VAE may be unknown, its fingerprint empty: then the layout of the latents
    has to do.
    """
    known, channels = manifest.vae, manifest.latent_shape[0]
    if not name:
        raise ValueError(
            f"vae: must be given, the checkpoint names none (an AutoencoderKL folder or hub id with {channels} channels)"
        )
    vae = load_vae(name)
    wanted = (channels, known.stride, known.shift, known.scale)
    found = (vae.config.latent_channels, vae.config.stride, vae.config.shift_factor, vae.config.scaling_factor)
    if found != wanted:
        needed, made = ("{} channels, stride {}, shift {} and scale {}".format(*layout) for layout in (wanted, found))
        raise ValueError(f"vae: must make latents of {needed}, {name!r} makes {made}")
    if known.fingerprint and vae.fingerprint != known.fingerprint:
        raise ValueError(
            f"vae: must be the one that made the latents (fingerprint {known.fingerprint}), "
            f"{name!r} has {vae.fingerprint}"
        )
    return vae


class Preview:
    """Draws the same noise and requests every time, so that successive grids show the model alone changing."""

    def __init__(self, folder: Path, mesh: Mesh, manifest: Manifest, objective: Objective, sampler: SamplerConfig,
                 requests: Requests, seed: int):  # fmt: skip
        self._folder, self._requests = folder, requests
        self._decode = make_decoder(load_matching_vae(manifest.vae.name, manifest), objective.mean, objective.scale)
        count = len(requests.captions)

        def draw(model, condition, null):
            noise = picture_noise(jax.random.key(seed), count, manifest.latent_shape)
            return sample(objective.compute.cast(model), noise, condition, null, sampler).latents

        # Replicated results can be read by every process; the pictures are few and small.
        self._draw = jax.jit(objective.compute.on(None, draw), out_shardings=replicated(mesh))

    def draw(self, model: Any, step: int) -> Path | None:
        """Write `samples/<step>.png` in the run folder (on the first process)."""
        latents = np.asarray(self._draw(model, self._requests.condition, self._requests.null))
        if jax.process_index() != 0:
            return None
        path = self._folder / "samples" / f"{step:08d}.png"
        save_grid(path, self._decode(latents), self._requests.captions, columns=8)
        return path
