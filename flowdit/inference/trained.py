"""Reading a trained model and its metadata from a checkpoint folder."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from flowdit.checkpoint.meta import RunMeta
from flowdit.conditioning import Conditioning, from_checkpoint
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.fields import FieldError
from flowdit.models.attention import AttentionShape


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

    def attention_shapes(self) -> list[AttentionShape]:
        """The attention shapes of the network on the latents of its data."""
        return self.conditioning.attention_shapes(self.config.model, self.manifest.latent_shape)


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


def check_guide(trained: Trained, guide: Trained) -> None:
    """Raise `FieldError` unless `guide` can guide `trained`: the same latents and conditions, of a network of any shape."""
    for what, ours, theirs in (
        ("latents of shape", trained.manifest.latent_shape, guide.manifest.latent_shape),
        ("latents of mean", trained.mean, guide.mean),
        ("latents of scale", trained.scale, guide.scale),
    ):
        if ours != theirs:
            raise FieldError("guide", f"must take {what} {list(ours)}, as the model, it takes {list(theirs)}")
    if problem := trained.conditioning.unlike(guide.conditioning):
        raise FieldError("guide", problem)
