"""The base class of auxiliary losses, and their view of an example."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flowdit.data.schema import Field
from flowdit.fields import require
from flowdit.models.config import ModelConfig

RESERVED_NAMES = ("loss", "velocity", "grad_norm", "learning_rate", "skipped_steps", "skipped_in_row", "total_flops")
"""Other figures logged under `train/`."""


class View(NamedTuple):
    """The inputs of an auxiliary loss for one example.

    `example` holds the fields of the record, `x_0` its normalised latent, `x_t` the noised latent at flow time `t`,
    `velocity` the network's prediction there and `target` the right one. `hidden` holds the tokens after the blocks
    `AuxiliaryLoss.depths`, and `weak` the velocity of the network's guidance head, for a loss that reads it.
    """

    example: Mapping[str, Array]
    x_0: Float[Array, "channels height width"]
    x_t: Float[Array, "channels height width"]
    t: Float[Array, ""]
    velocity: Float[Array, "channels height width"]
    target: Float[Array, "channels height width"]
    hidden: Mapping[int, Float[Array, "tokens dim"]] = {}
    weak: Float[Array, "channels height width"] | None = None

    @property
    def denoised(self) -> Float[Array, "channels height width"]:
        """The denoised latent of the predicted velocity, x_t - t v."""
        return self.x_t - self.t * self.velocity


class DataShapes(NamedTuple):
    """Shapes of the training data: latents (channels, height, width), and the maps of their feature cache, if it is read."""

    latent: tuple[int, int, int]
    feature_map: tuple[int, int, int] | None = None
    """Rows, columns and width."""


def default_block(depth: int, published: Mapping[int, int], share: float) -> int:
    """The block of a network of `depth` blocks, where there is no setting.

    `published` has the authors' block by the depth of their networks: that of the largest of them which is not deeper. A
    network less deep than all has a block after this share of its depth.
    """
    known = [block for of, block in sorted(published.items()) if of <= depth]
    return known[-1] if known else max(1, round(share * depth))


@dataclasses.dataclass
class AuxiliaryLoss(abc.ABC):
    """A loss that is added to the objective. Further settings are the dataclass fields of its class.

    Attributes:
        weight: factor of the loss; 0: off.
        last_step: last step at which it is added; null: all of them.
    """

    weight: float = 0.0
    last_step: int | None = None

    name: ClassVar[str]
    """Its key in `AUXILIARY`, used in logs and as the prefix `auxiliary.<name>.` of its parameters in checkpoints."""

    reads_weak: ClassVar[bool] = False
    """Whether it reads `View.weak`, so that the network must have a guidance head (`model.guidance_head`)."""

    def check(self) -> None:
        """Raise `FieldError` naming the first setting that breaks a rule."""
        require("weight", self.weight, 0 <= self.weight < math.inf, "must be 0 (off) or more")
        last = self.last_step
        require("last_step", last, last is None or last >= 0, "must be null or 0 or more")
        rule = "must be null: samplers use the guidance head, which would be left behind by the blocks"
        require("last_step", last, last is None or not self.reads_weak, rule)

    def for_model(self, model: ModelConfig) -> AuxiliaryLoss:
        """These settings, with a value for each null one that depends on the network, such as a block of `depths`."""
        return self

    def fields(self) -> dict[str, Field]:
        """The fields of a record that it reads, in addition to those of the conditioning.

        A `FeatureMapField`, named `feature_map`, is read from the feature cache of the data, which knows its shape.
        """
        return {}

    def depths(self) -> tuple[int, ...]:
        """The blocks whose tokens it sees, in `View.hidden`: 1 is the first block."""
        return ()

    def init(self, model: ModelConfig, shapes: DataShapes, *, key: PRNGKeyArray) -> Any:
        """Its parameters, a pytree of float32 arrays, trained with the network; neither averaged nor exported."""
        return {}

    @abc.abstractmethod
    def __call__(self, parameters: Any, view: View) -> Float[Array, ""]:
        """The loss of one example."""


def batch_losses(
    auxiliary: AuxiliaryLoss, parameters: Any, views: View, step: Int[Array, ""]
) -> Float[Array, " batch"]:
    """The loss of every example of a batch; 0, and not computed, after the last step."""
    # Parameters are in the compute dtype, and so may be the loss.
    losses = jax.vmap(lambda view: jnp.asarray(auxiliary(parameters, view), jnp.float32))
    if auxiliary.last_step is None:
        return losses(views)
    # `step` is the number of steps before this one.
    return jax.lax.cond(step < auxiliary.last_step, losses, lambda views: jnp.zeros(views.t.shape), views)
