"""Reading a finished model back: from a checkpoint folder alone to a network and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from omegaconf.errors import OmegaConfBaseException

from flowdit.config import Config, from_stored
from flowdit.data.manifest import Manifest
from flowdit.diffusion.conditioning import Conditioning, class_conditioning, text_conditioning
from flowdit.training.checkpoint import read_meta, restore_weights
from flowdit.training.checkpoint_files import CheckpointError
from flowdit.training.stages import micro_condition, model_builder


class Trained(NamedTuple):
    """A model read from a checkpoint folder. `text` describes its text encoder; None for a class model.

    `prediction` says what the network returns: "velocity", or "noise" in a model that came from elsewhere.
    """

    model: Any
    config: Config
    manifest: Manifest
    conditioning: Conditioning
    text: Mapping[str, Any] | None
    mean: list[float]
    scale: list[float]
    step: int
    prediction: str = "velocity"


def load_trained(folder: Path, mesh: Mesh | None = None, weights: str = "ema") -> Trained:
    """The model in `folder` in float32, on the first device or laid out on `mesh`; its "ema" or "model" weights.

    Raises `CheckpointError` if it is missing, damaged or foreign.
    """
    meta = read_meta(folder)
    try:
        trained = describe_trained(meta)
    except (ValueError, OverflowError) as problem:
        raise CheckpointError(f"{folder}: {problem}") from problem
    return trained._replace(model=restore_weights(folder, trained.model, mesh, weights))


def describe_trained(meta: Mapping[str, Any]) -> Trained:
    """What the metadata of a checkpoint tell, with the shapes of the model's arrays in place of the model.

    Raises `ValueError` for what no run and no conversion has written.
    """
    try:
        return _describe(meta)
    except (KeyError, TypeError, AttributeError, OmegaConfBaseException) as problem:
        reason = " ".join(repr(problem).split())[:120]
        raise CheckpointError(f"metadata that are not a flowdit checkpoint's ({reason})") from problem


def _describe(meta: Mapping[str, Any]) -> Trained:
    config, manifest, text = from_stored(meta["config"]), Manifest.parse(meta["manifest"]), meta.get("text")
    if text is None:
        conditioning = class_conditioning(manifest.num_classes)
    else:
        conditioning = text_conditioning(micro_condition(config.model, manifest))
    template = jax.eval_shape(model_builder(config.model, manifest, text, config.seed))
    mean, scale, prediction = meta["latent_mean"], meta["latent_scale"], meta.get("prediction", "velocity")
    return Trained(template, config, manifest, conditioning, text, mean, scale, meta["step"], prediction)
