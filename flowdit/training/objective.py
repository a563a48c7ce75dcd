"""Building the objective of a run, with the normalisation of the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.diffusion import flow
from flowdit.diffusion.objective import Conditions, FlowMatching


def make_objective(config: Config, manifest: Manifest, conditioning: Conditions) -> FlowMatching:
    """The objective of a run on this data. Raises `ValueError` for an implausible normalisation."""
    train = config.train
    mean, scale = latent_affine(train.latent_mean, train.latent_scale, manifest)
    shift = flow.resolution_shift(manifest.latent_shape) if train.time_shift is None else train.time_shift
    return FlowMatching(
        conditioning,
        drop_rate=train.drop_rate,
        mean=mean,
        scale=scale,
        time_distribution=train.time_distribution,
        time_shift=shift,
        time_std=train.time_std,
        uniform_after=train.time_uniform_after,
        auxiliary=config.auxiliary_losses(),
    )


def latent_affine(mean: Any, scale: Any, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and scale of `(latent - mean) * scale`, from the configuration or the data's VAE.

    Raises `ValueError` if the result is far from unit variance: a wrong scale gives no error in training but blurred
    samples.
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
            f"train.latent_scale: normalised latents must have a standard deviation in [0.5, 2], got {deviation:.3g} "
            f"(raw standard deviation {deviation / abs(scale[0]):.3g}, scale {scale[0]:.5g}): "
            "use train.latent_mean=data train.latent_scale=data"
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
