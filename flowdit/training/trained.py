"""Reading a finished model back: from a checkpoint folder alone to a network and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flowdit.config import Config, from_stored
from flowdit.data.manifest import Manifest
from flowdit.diffusion.conditioning import Conditioning, class_conditioning, text_conditioning
from flowdit.training.checkpoint import read_meta, restore_ema
from flowdit.training.stages import micro_condition, model_builder


class Trained(NamedTuple):
    """A model read from a checkpoint folder. `text` describes its text encoder; None for a class model."""

    model: Any
    config: Config
    manifest: Manifest
    conditioning: Conditioning
    text: Mapping[str, Any] | None
    mean: list[float]
    scale: list[float]
    step: int


def load_trained(folder: Path, mesh: Mesh | None = None) -> Trained:
    """The EMA model in `folder` in float32, on the first device or laid out on `mesh`.

    Raises `CheckpointError` if it is missing, damaged or foreign.
    """
    meta = read_meta(folder)
    config, manifest, text = from_stored(meta["config"]), Manifest.parse(meta["manifest"]), meta.get("text")
    if text is None:
        conditioning = class_conditioning(manifest.num_classes)
    else:
        conditioning = text_conditioning(micro_condition(config.model, manifest))
    template = jax.eval_shape(model_builder(config.model, manifest, text, "float32", config.seed))
    model = restore_ema(folder, template, mesh)
    mean, scale = meta["latent_mean"], meta["latent_scale"]
    return Trained(model, config, manifest, conditioning, text, mean, scale, meta["step"])
