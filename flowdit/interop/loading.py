"""`flowdit.load`: from a name to a sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from flowdit.fields import FieldError, about
from flowdit.inference.sampler import Sampler
from flowdit.interop.conversion import read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import to_trained
from flowdit.sharding import make_local_mesh, replicated


def load(
    name: str,
    weights: str = "ema",
    *,
    mesh: Mesh | None = None,
    guide: str | None = None,
    **hints: Any,
) -> Sampler:
    """Load the model `name` for sampling: `load("checkpoints").draw(labels=["heart"] * 8)`.

    Assumptions, and parts of the files that are not read, are logged.

    Args:
        name: a checkpoint folder, a run folder (its newest intact step, which is logged), an exported diffusers folder, a
            safetensors file, a file of another project, or a hub id.
        weights: "ema" or "model", of a checkpoint that has both.
        mesh: devices that share each batch; by default all of this process.
        guide: a weaker model, named like `name`, whose velocity takes the place of that of the null condition in guidance
            (autoguidance, Karras et al. 2024); its EMA weights. It may be of another size, and must take the same latents
            and conditions.
        hints: fields of `ForeignConfig`, for information that is not in the files. `vae` and `text_encoder` can also be
            new locations of the ones used in training.

    Raises:
        ValueError: with one line, for a source that is missing, damaged or of another architecture.
    """
    known = [field.name for field in dataclasses.fields(ForeignConfig)]
    if unknown := [hint for hint in hints if hint not in known]:
        raise FieldError(unknown[0], f"no such setting, must be one of {', '.join(known)}")
    mesh = mesh or make_local_mesh()
    trained = to_trained(read_source(name, weights, ForeignConfig(**hints)), replicated(mesh))
    if encoder := hints.get("text_encoder"):
        trained = trained._replace(conditioning=trained.conditioning.with_encoder(encoder))
    weak = None
    if guide is not None:
        with about("guide"):
            weak = to_trained(read_source(guide), replicated(mesh))
    return Sampler(trained, mesh, hints.get("vae"), weak)


def from_pretrained(name: str, weights: str = "ema", **hints: Any) -> Sampler:
    """Alias of `load`, as the function is called in other libraries."""
    return load(name, weights, **hints)
