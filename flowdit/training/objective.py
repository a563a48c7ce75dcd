"""What is minimised: how latents are normalised, how noise, time and dropped conditions are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from flowdit.config import TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.diffusion import flow
from flowdit.diffusion.conditioning import Conditioning, Example
from flowdit.models.compute import Compute


@dataclasses.dataclass(frozen=True)
class Objective:
    """Flow matching under a condition. `mean` and `scale` normalise raw latents, a value or one a channel."""

    conditioning: Conditioning
    drop_rate: float
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    time_distribution: str = "logit_normal"
    time_shift: float = 1.0
    compute: Compute = dataclasses.field(default_factory=Compute)

    def latent(self, example: Example, key: PRNGKeyArray | None) -> Float[Array, "c h w"]:
        """The normalised latent; with `latent_std` in the example and a key, a fresh draw from the VAE's posterior."""
        latent = example["latent"]
        if key is not None and "latent_std" in example:
            latent = latent + example["latent_std"] * jax.random.normal(key, latent.shape)
        return flow.normalise_latents(latent, jnp.asarray(self.mean), jnp.asarray(self.scale))

    def draw(self, example: Example, key: PRNGKeyArray) -> dict[str, Any]:
        """What `flow.example_losses` takes of one example: latent, noise, time, and the condition unless dropped."""
        posterior_key, noise_key, time_key, drop_key = jax.random.split(key, 4)
        x_0 = self.latent(example, posterior_key)
        condition = self.conditioning.of_example(example)
        return {
            "x_0": x_0,
            "noise": jax.random.normal(noise_key, x_0.shape),
            "t": flow.sample_time(time_key, self.time_distribution, self.time_shift),
            "condition": flow.drop_condition(drop_key, condition, self.conditioning.null(condition), self.drop_rate),
        }


def make_objective(train: TrainConfig, manifest: Manifest, conditioning: Conditioning, compute: Compute) -> Objective:
    """The objective of a configuration on this data. Raises `ValueError` for a normalisation that cannot be right."""
    mean, scale = latent_affine(train.latent_mean, train.latent_scale, manifest)
    shift = flow.resolution_shift(manifest.latent_shape) if train.time_shift is None else train.time_shift
    return Objective(
        conditioning,
        drop_rate=train.drop_rate,
        mean=mean,
        scale=scale,
        time_distribution=train.time_distribution,
        time_shift=shift,
        compute=compute,
    )


def latent_affine(mean: Any, scale: Any, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and scale of `(latent - mean) * scale`, from the configuration or the data's VAE.

    Raises `ValueError` if what comes out is far from unit variance: a wrong scale trains without a word and samples mud.
    """
    channels = manifest.latent_shape[0]
    if mean == "data":
        mean = list(manifest.channel_mean)
    if scale == "data":
        scale = [1 / max(deviation, 1e-6) for deviation in manifest.channel_std]
    mean = _per_channel("train.latent_mean", mean, manifest.vae.shift, channels)
    scale = _per_channel("train.latent_scale", scale, manifest.vae.scale, channels)
    deviation = float(np.sqrt(np.mean(np.square(np.asarray(manifest.channel_std) * np.asarray(scale)))))
    if not 0.5 <= deviation <= 2:
        raise ValueError(
            f"train.latent_scale: normalised latents must have a deviation in [0.5, 2], got {deviation:.3g} "
            f"(raw deviation {deviation / abs(scale[0]):.3g}, scale {scale[0]:.5g})"
        )
    return mean, scale


def _per_channel(field: str, value: Any, default: float, channels: int) -> tuple[float, ...]:
    values = default if value is None else value
    values = values if isinstance(values, Sequence) and not isinstance(values, str) else [values] * channels
    if len(values) != channels:
        raise ValueError(f"{field}: must be a number or one for each of the {channels} channels, got {len(values)}")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values):
        raise ValueError(f"{field}: must be finite numbers, got {value}")
    if field.endswith("scale") and not all(values):
        raise ValueError(f"{field}: must not be 0, got {value}")
    return tuple(float(v) for v in values)
