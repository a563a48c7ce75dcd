"""Starting from a checkpoint of another run: copying weights, or re-parameterising a class model."""

from __future__ import annotations

import logging
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdit.checkpoint.meta import RunMeta, read_meta
from flowdit.checkpoint.names import named_arrays
from flowdit.checkpoint.restore import newest_intact, restore_weights
from flowdit.conditioning import Conditioning
from flowdit.config import Config, TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import VALIDATION_TIMES
from flowdit.fields import about, content_of
from flowdit.inference.trained import Trained, describe_trained
from flowdit.models.config import ModelConfig
from flowdit.models.reparameterise import check_compatible, drift, reparameterise, without_sizes
from flowdit.sharding import dotted_name
from flowdit.storage import connect

logger = logging.getLogger(__name__)


class Start(eqx.Module):
    """The EMA model of another run's checkpoint, and the parts of this run's model that are freshly initialised.

    A model of another architecture is re-parameterised.
    """

    model: Any
    fresh: tuple[str, ...] = eqx.field(static=True, default=())
    reparameterised: bool = eqx.field(static=True, default=False)


def load_start(
    config: Config,
    manifest: Manifest,
    conditioning: Conditioning,
    meta: RunMeta,
    mesh: Mesh,
) -> Start:
    """Load the model at `train.init_from` onto the mesh, after checking that it fits this run's model.

    `meta` is the metadata of this run. Logs freshly initialised parts and differences. Raises `ValueError` naming
    incompatible fields.
    """
    assert config.train.init_from is not None
    with about("train.init_from"):
        given = connect(config.train.init_from)
        folder = newest_intact(given)
        stored = read_meta(folder, is_verified=folder != given)
        with content_of(folder):
            theirs = describe_trained(stored)
    their_model, model = theirs.config.model, config.model
    if their_model.name not in conditioning.starts_from:
        allowed = " or ".join(conditioning.starts_from)
        raise ValueError(
            f"train.init_from: must be a {allowed} where a {model.name} is trained, got {their_model.name}"
        )
    check_compatible(their_model, model, theirs.manifest.latent_shape, manifest.latent_shape)
    is_other = their_model.name != model.name
    fresh = {} if is_other else conditioning.fresh_parts(theirs.conditioning, their_model, model)
    fresh |= _fresh_head(their_model, model)
    with about("train.init_from"):
        weights = restore_weights(folder, theirs.model, mesh)
    remarks = [f"{part} is freshly initialised: {reason}" for part, reason in fresh.items()]
    remarks += conditioning.differences(theirs.conditioning) + differences(theirs, meta)
    for remark in remarks:
        logger.info("train.init_from: %s: %s", folder, remark)
    return Start(weights, tuple(fresh), is_other)


def _fresh_head(theirs: ModelConfig, ours: ModelConfig) -> dict[str, str]:
    """The guidance head as a fresh part, with the reason, if there is one that cannot be copied."""
    if ours.guidance_head is None or (theirs.name, theirs.guidance_head) == (ours.name, ours.guidance_head):
        return {}
    found = "none" if theirs.guidance_head is None else f"one of a {theirs.name} after block {theirs.guidance_head}"
    return {"guidance_head": f"the other model has {found}"}


def differences(theirs: Trained, meta: RunMeta) -> list[str]:
    """Differences to report: normalisation and objective."""
    remarks = []
    if (theirs.mean, theirs.scale) != (meta.latent_mean, meta.latent_scale):
        remarks.append("was trained on latents with another mean and scale")
    if theirs.prediction != "velocity":
        remarks.append(f"predicts the {theirs.prediction}, this run trains the velocity: the objective changes")
    return remarks


def initial_model(model: Any, start: Start | None, train: TrainConfig) -> Any:
    """Initialise the fresh `model` from `start`, if given. Usable under jit."""
    if start is None:
        return model
    if start.reparameterised:
        options = {"time": train.init_time, "shared_map": train.init_shared_map, "class_condition": train.init_class}
        return reparameterise(start.model, model, **options)
    return copy_weights(model, start)


def copy_weights(model: Any, start: Start) -> Any:
    """Copy the arrays of a model of the same kind to `model`, except for the fresh parts; static fields are `model`'s.

    The output of a fresh size embedding is set to zero, so that it has no effect at first.
    """
    if "size_embed" in start.fresh:
        model = without_sizes(model)
    arrays = named_arrays(start.model)

    def take(path: tuple, ours: jax.Array) -> jax.Array:
        name = dotted_name(path)
        return ours if name.split(".")[0] in start.fresh else arrays[name]

    return jax.tree_util.tree_map_with_path(take, model)


def drift_figures(
    start: Start | None, model: Any, latent_shape: tuple[int, int, int], train: TrainConfig
) -> dict[str, float]:
    """By time, how far the velocities of a text model and its class model are apart on noise, relatively; it is logged.

    On the class model's grid it is 0 up to rounding at `train.init_time`. Other starts have no such figures.
    """
    if start is None:
        return {}
    if not start.reparameterised:
        logger.info("started from %s", train.init_from)
        return {}
    times = jnp.asarray(sorted({*VALIDATION_TIMES, train.init_time}))
    x_t = jax.random.normal(jax.random.key(0), (len(times), 4, *latent_shape))
    apart = jax.jit(drift, static_argnames="class_condition")(start.model, model, times, x_t, train.init_class)
    by_time = ", ".join(f"{t:.3g}: {d:.2g}" for t, d in zip(times, apart, strict=True))
    logger.info("started from %s; relative drift of the velocity by t: %s", train.init_from, by_time)
    return {f"init/drift_t{t:.4f}": float(d) for t, d in zip(times, apart, strict=True)}
