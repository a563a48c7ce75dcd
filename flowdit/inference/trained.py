"""Reading a trained model and its metadata from a checkpoint folder."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from flowdit.checkpoint.meta import RunMeta
from flowdit.conditioning import Conditioning, from_checkpoint
from flowdit.config import Config
from flowdit.data.manifest import MAX_SIDE, Manifest
from flowdit.fields import FieldError, require
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

    def at_size(self, height: int, width: int) -> Trained:
        """The same model on images of another size in pixels.

        Raises `FieldError` unless both sides are multiples of the side of a patch in pixels.
        """
        channels, stride = self.manifest.latent_shape[0], self.manifest.vae.stride
        patch = stride * self.config.model.patch_size
        is_whole = all(side >= patch and side % patch == 0 and side // stride <= MAX_SIDE for side in (height, width))
        rule = f"must be multiples of {patch} pixels, the side of a patch, of at most {MAX_SIDE * stride}"
        require("image_size", [height, width], is_whole, rule)
        shape = (channels, height // stride, width // stride)
        manifest = dataclasses.replace(self.manifest, latent_shape=shape, image_size=height)
        return self._replace(manifest=manifest, conditioning=self.conditioning.at_size(height, width))


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
