"""Kinds of conditioning, one per file and listed in `KINDS`; no code outside this folder refers to a kind by name.

To add a kind, write a `Conditioning` in a new file and register it in `KINDS` (docs/extending.md).
"""

from __future__ import annotations

from jax.sharding import Mesh

from flowdit.conditioning.base import Batch, Conditioning, Requests
from flowdit.conditioning.labels import Labels
from flowdit.conditioning.meta import ConditioningMeta
from flowdit.conditioning.none import Unconditional
from flowdit.conditioning.text import Text
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.fields import require, require_choice

__all__ = ["KINDS", "Batch", "Conditioning", "Requests", "check", "for_training", "from_checkpoint", "kind_of"]

KINDS: dict[str, type[Conditioning]] = {"labels": Labels, "text": Text, "none": Unconditional}
"""Kinds by the value of the key `conditioning`. The default is the first kind of the model."""


def kind_of(config: Config) -> str:
    """The value of `config.conditioning`, or by default the first kind of the model.

    Raises `ValueError` for an unknown kind, or a kind of another model.
    """
    if config.conditioning is None:
        found = (kind for kind, conditioning in KINDS.items() if conditioning.model == config.model.name)
        kind = next(found, None)
        if kind is None:
            known = ", ".join(sorted({conditioning.model for conditioning in KINDS.values()}))
            raise ValueError(f"model.name: must be one of {known}, got {config.model.name!r}")
        return kind
    require_choice("conditioning", config.conditioning, KINDS)
    if (needed := KINDS[config.conditioning].model) != config.model.name:
        raise ValueError(
            f"model.name: must be {needed} with conditioning={config.conditioning}, got {config.model.name}"
        )
    return config.conditioning


def check(config: Config) -> None:
    """Raise `ValueError` for the first setting that is invalid for the kind; needs neither data nor devices."""
    kind = kind_of(config)
    for field in {other.preview_field for other in KINDS.values()} - {KINDS[kind].preview_field, None}:
        value = getattr(config.train, str(field))
        require(f"train.{field}", value, value is None, f"must be null with conditioning={kind}")
    KINDS[kind].check(config)


def for_training(config: Config, manifest: Manifest, mesh: Mesh) -> Conditioning:
    """The conditioning of a run on this data. Raises `ValueError` if the data do not have the required fields."""
    return KINDS[kind_of(config)].for_training(config, manifest, mesh)


def from_checkpoint(config: Config, manifest: Manifest, meta: ConditioningMeta) -> Conditioning:
    """The conditioning of a stored model, from a checkpoint's metadata, without loading anything."""
    return KINDS[kind_of(config)].from_checkpoint(config, manifest, meta)
