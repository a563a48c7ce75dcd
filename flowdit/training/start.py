"""A model that starts from a checkpoint of another run: what fits is copied, a text model may come of a class model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdit.config import Config, TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import VALIDATION_TIMES
from flowdit.models.ccdit import CCDiT
from flowdit.models.mmdit import MMDiT
from flowdit.models.reparameterise import check_compatible, drift, reparameterise, without_sizes
from flowdit.sharding import dotted_name
from flowdit.training.checkpoint import named_arrays, read_meta, restore_weights
from flowdit.training.checkpoint_files import CheckpointError
from flowdit.training.trained import Trained, describe_trained


class Start(eqx.Module):
    """The EMA model of another run's checkpoint, and the parts of this run's model that it cannot fill."""

    model: CCDiT | MMDiT
    fresh: tuple[str, ...] = eqx.field(static=True, default=())


def load_start(config: Config, manifest: Manifest, meta: Mapping[str, Any], mesh: Mesh, notes: list[str]) -> Start:
    """The model at `train.init_from` on the mesh, checked to fit this run's before any weight is read.

    `meta` is what this run will say of itself. Appends to `notes` what is not taken over and what makes the start worth
    less. Raises `ValueError` naming what does not fit.
    """
    assert config.train.init_from is not None
    folder = Path(config.train.init_from)
    with _naming_the_field():
        theirs = describe_trained(read_meta(folder))
    check_compatible(theirs.config.model, config.model, theirs.manifest.latent_shape, manifest.latent_shape)
    fresh = fresh_parts(theirs, config, manifest, meta["text"])
    with _naming_the_field():
        model = restore_weights(folder, theirs.model, mesh)
    remarks = [f"{part} stays freshly initialised: {reason}" for part, reason in fresh.items()]
    remarks += differences(theirs, manifest, meta)
    notes += [f"train.init_from: {folder}: {remark}" for remark in remarks]
    return Start(model, tuple(fresh))


@contextlib.contextmanager
def _naming_the_field() -> Iterator[None]:
    try:
        yield
    except ValueError as problem:
        raise CheckpointError(f"train.init_from: {problem}") from problem


def fresh_parts(theirs: Trained, config: Config, manifest: Manifest, text: Mapping[str, Any] | None) -> dict[str, str]:
    """The parts of this run's model that a checkpoint of the same kind of model cannot fill, and why.

    Empty for a text model that starts from a class model: there `reparameterise` knows.
    """
    if text is None:
        return _fresh_class_parts(theirs.manifest.num_classes, manifest.num_classes)
    return {} if theirs.text is None else _fresh_text_parts(theirs, config, text)


def _fresh_class_parts(theirs: int, ours: int) -> dict[str, str]:
    return {} if theirs == ours else {"class_table": f"it has {theirs} classes, the data have {ours}"}


def _fresh_text_parts(theirs: Trained, config: Config, text: Mapping[str, Any]) -> dict[str, str]:
    assert theirs.text is not None
    parts, tokens = {}, theirs.config.model.null_tokens
    # An imported model's encoder was not seen: its name has to do.
    same = "fingerprint" if theirs.text["fingerprint"] else "name"
    if any(theirs.text[field] != text[field] for field in (same, "width")):
        encoders = " and ".join(f"{t['name']} ({t['fingerprint']}, width {t['width']})" for t in (theirs.text, text))
        parts |= dict.fromkeys(("caption_proj", "null_caption"), f"the text encoders differ, {encoders}")
    elif tokens != config.model.null_tokens:
        parts["null_caption"] = f"model.null_tokens was {tokens}, is {config.model.null_tokens}"
    if config.model.micro_conditioning and not theirs.config.model.micro_conditioning:
        parts["size_embed"] = "model.micro_conditioning was false; its output starts at zero"
    return parts


def differences(theirs: Trained, manifest: Manifest, meta: Mapping[str, Any]) -> list[str]:
    """What is no obstacle to a start but should be known: meaning of classes, normalisation, objective."""
    remarks = []
    pairs = list(zip(theirs.manifest.class_names, manifest.class_names, strict=False))
    renamed = [f"{before} is now {now}" for before, now in pairs if before != now]
    if meta["text"] is None and theirs.manifest.num_classes == manifest.num_classes and renamed:
        remarks.append(f"{len(renamed)} of its {len(pairs)} classes have other names: {', '.join(renamed[:3])}")
    if (list(theirs.mean), list(theirs.scale)) != (list(meta["latent_mean"]), list(meta["latent_scale"])):
        remarks.append("was trained on latents of another mean and scale than this run's")
    if theirs.prediction != "velocity":
        remarks.append(f"predicts the {theirs.prediction}, this run trains the velocity: the objective changes")
    return remarks


def initial_model(model: CCDiT | MMDiT, start: Start | None, train: TrainConfig) -> CCDiT | MMDiT:
    """A freshly initialised `model` with all that `start`, where there is one, can give it. Works under jit."""
    if start is None:
        return model
    if isinstance(model, MMDiT) and isinstance(start.model, CCDiT):
        options = {"time": train.init_time, "shared_map": train.init_shared_map, "class_condition": train.init_class}
        return reparameterise(start.model, model, **options)
    return copy_weights(model, start)


def copy_weights(model: CCDiT | MMDiT, start: Start) -> CCDiT | MMDiT:
    """`model` with the arrays of a model of its kind, but for the fresh parts; static fields stay `model`'s.

    A fresh size embedding is silenced, so that it does not shift the time embedding at first.
    """
    if isinstance(model, MMDiT) and "size_embed" in start.fresh:
        model = without_sizes(model)
    arrays = named_arrays(start.model)

    def take(path: tuple, ours: jax.Array) -> jax.Array:
        name = dotted_name(path)
        return ours if name.split(".")[0] in start.fresh else arrays[name]

    return jax.tree_util.tree_map_with_path(take, model)


def drift_figures(start: Start | None, model: CCDiT | MMDiT, train: TrainConfig, notes: list[str]) -> dict[str, float]:
    """By time, how far the velocities of a text model and its class model are apart on noise, relatively.

    On the class model's own grid it is 0, to rounding, at `train.init_time`. Other starts have no such figures.
    """
    if start is None:
        return {}
    if not (isinstance(model, MMDiT) and isinstance(start.model, CCDiT)):
        notes.append(f"started from {train.init_from}")
        return {}
    times = jnp.asarray(sorted({*VALIDATION_TIMES, train.init_time}))
    x_t = jax.random.normal(jax.random.key(0), (len(times), 4, *model.latent_shape))
    apart = jax.jit(drift, static_argnames="class_condition")(start.model, model, times, x_t, train.init_class)
    by_time = ", ".join(f"{t:.3g}: {d:.2g}" for t, d in zip(times, apart, strict=True))
    notes.append(f"started from {train.init_from}; relative drift of the velocity by t: {by_time}")
    return {f"init/drift_t{t:.4f}": float(d) for t, d in zip(times, apart, strict=True)}
