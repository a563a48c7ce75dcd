"""Reading a trained model and its metadata from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from omegaconf.errors import OmegaConfBaseException

from flowdit.checkpoint.files import CheckpointError
from flowdit.conditioning import Conditioning, from_checkpoint
from flowdit.config import Config, from_stored
from flowdit.data.manifest import Manifest
from flowdit.json_input import parse


class Trained(NamedTuple):
    """A model read from a checkpoint folder, in float32, with its metadata.

    `prediction` is the output of the network: "velocity", or "noise" for some imported models.
    """

    model: Any
    config: Config
    manifest: Manifest
    conditioning: Conditioning
    mean: list[float]
    scale: list[float]
    step: int
    prediction: str = "velocity"


def describe_trained(meta: Mapping[str, Any]) -> Trained:
    """Parse the metadata of a checkpoint, with the shapes of the model's arrays instead of the model.

    Raises `ValueError` for metadata that are not a flowdit checkpoint's.
    """
    try:
        return _describe(meta)
    except (KeyError, TypeError, AttributeError, OmegaConfBaseException) as problem:
        reason = " ".join(repr(problem).split())[:120]
        raise CheckpointError(f"metadata that are not a flowdit checkpoint's ({reason})") from problem


def _describe(meta: Mapping[str, Any]) -> Trained:
    config, manifest = from_stored(meta["config"]), parse(Manifest, meta["manifest"])
    conditioning = from_checkpoint(config, manifest, meta)
    template = jax.eval_shape(conditioning.model_builder(config, manifest))
    return Trained(
        model=template,
        config=config,
        manifest=manifest,
        conditioning=conditioning,
        mean=meta["latent_mean"],
        scale=meta["latent_scale"],
        step=meta["step"],
        prediction=meta.get("prediction", "velocity"),
    )
