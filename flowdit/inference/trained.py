"""Reading a trained model and its metadata from a checkpoint folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from flowdit.checkpoint.meta import RunMeta
from flowdit.conditioning import Conditioning, from_checkpoint
from flowdit.config import Config
from flowdit.data.manifest import Manifest


class Trained(NamedTuple):
    """A model read from a checkpoint folder, in float32, with its metadata.

    `prediction` is the output of the network: "velocity", or "noise" for some imported models.
    """

    model: Any
    config: Config
    manifest: Manifest
    conditioning: Conditioning
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    step: int
    prediction: str = "velocity"


def describe_trained(meta: RunMeta) -> Trained:
    """The model that the metadata of a checkpoint describe, with the shapes of its arrays instead of the arrays.

    Raises `ValueError` for settings that do not fit each other.
    """
    conditioning = from_checkpoint(meta.config, meta.manifest, meta)
    template = jax.eval_shape(conditioning.model_builder(meta.config, meta.manifest))
    return Trained(
        model=template,
        config=meta.config,
        manifest=meta.manifest,
        conditioning=conditioning,
        mean=meta.latent_mean,
        scale=meta.latent_scale,
        step=meta.step,
        prediction=meta.prediction,
    )
