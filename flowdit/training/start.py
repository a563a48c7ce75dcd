"""A text model that starts from a class model: PixArt-alpha's re-parameterisation, from checkpoint to state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdit.config import Config, TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import VALIDATION_TIMES
from flowdit.models.ccdit import CCDiT
from flowdit.models.mmdit import MMDiT
from flowdit.models.reparameterise import check_compatible, drift, reparameterise
from flowdit.training.checkpoint import CheckpointError, read_meta
from flowdit.training.objective import Objective
from flowdit.training.trained import load_trained


def load_class_model(config: Config, manifest: Manifest, objective: Objective, mesh: Mesh, notes: list[str]) -> CCDiT:
    """The EMA weights at `train.init_from` on the mesh, checked to fit the text model. Raises `ValueError` naming what does not.

    Latents normalised in another way than the class model's are reported: the start is then worth less.
    """
    assert config.train.init_from is not None
    folder = Path(config.train.init_from)
    try:
        name = read_meta(folder)["config"]["model"]["name"]
        if name != "ccdit":
            raise ValueError(f"{folder} must hold a class-conditional model (ccdit), got {name}")
        trained = load_trained(folder, mesh)
    except CheckpointError as problem:
        raise CheckpointError(f"train.init_from: {problem}") from problem
    except ValueError as problem:
        raise ValueError(f"train.init_from: {problem}") from problem
    check_compatible(trained.config.model, config.model, trained.manifest.latent_shape, manifest.latent_shape)
    if (trained.mean, trained.scale) != (list(objective.mean), list(objective.scale)):
        notes.append(f"train.init_from: {folder} was trained on latents of another mean and scale than this run's")
    return trained.model


def initial_model(model: Any, class_model: CCDiT | None, train: TrainConfig) -> Any:
    """A freshly initialised `model` with all that `class_model`, where there is one, can give it."""
    if class_model is None:
        return model
    return reparameterise(
        class_model,
        model,
        time=train.init_time,
        shared_map=train.init_shared_map,
        class_condition=train.init_class,
    )


def drift_figures(class_model: CCDiT, text_model: MMDiT, train: TrainConfig, notes: list[str]) -> dict[str, float]:
    """By time, how far the velocities of the two models on noise are apart, relatively.

    On the class model's own grid it is 0, to rounding, at `train.init_time`.
    """
    times = jnp.asarray(sorted({*VALIDATION_TIMES, train.init_time}))
    x_t = jax.random.normal(jax.random.key(0), (len(times), 4, *text_model.latent_shape))
    apart = jax.jit(drift, static_argnames="class_condition")(class_model, text_model, times, x_t, train.init_class)
    by_time = ", ".join(f"{t:.3g}: {d:.2g}" for t, d in zip(times, apart, strict=True))
    notes.append(f"started from {train.init_from}; relative drift of the velocity by t: {by_time}")
    return {f"init/drift_t{t:.4f}": float(d) for t, d in zip(times, apart, strict=True)}
