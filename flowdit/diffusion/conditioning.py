"""What a model is conditioned on, as a value: how an example becomes a condition, and what its null counterpart is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from flowdit.models.mmdit import TextCondition

Example = Mapping[str, Array]
"""The fields of one record of a batch, without the batch axis."""


class Conditioning(NamedTuple):
    """Both functions see one example. `null` keeps the shapes, so that either can stand in the other's place."""

    of_example: Callable[[Example], Any]
    null: Callable[[Any], Any]


def class_conditioning(num_classes: int) -> Conditioning:
    """On `label`; the null class comes after the last one (DiT)."""
    return Conditioning(
        of_example=lambda example: example["label"],
        null=lambda label: jnp.full_like(label, num_classes),
    )


def text_conditioning(size: tuple[int, int] | None) -> Conditioning:
    """On `text_features` and `text_mask`; the null caption is the model's own (PixArt-alpha).

    An example without a valid token has no caption. `size` is (height, width) in pixels for models that are
    micro-conditioned on it.
    """

    def of_example(example: Example) -> TextCondition:
        mask = example["text_mask"]
        pixels = None if size is None else jnp.asarray(size, jnp.float32)
        return TextCondition(example["text_features"], mask, ~mask.any(), pixels)

    return Conditioning(of_example, null=lambda condition: condition._replace(dropped=jnp.ones_like(condition.dropped)))
