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

    `example` holds the fields of the record, `x_0` its normalised latent, `x_t` the noised latent at flow time `t`, and
    `velocity` the network's prediction there. `hidden` holds the tokens after the blocks `AuxiliaryLoss.depths`.
    """

    example: Mapping[str, Array]
    x_0: Float[Array, "channels height width"]
    x_t: Float[Array, "channels height width"]
    t: Float[Array, ""]
    velocity: Float[Array, "channels height width"]
    hidden: Mapping[int, Float[Array, "tokens dim"]] = {}

    @property
    def denoised(self) -> Float[Array, "channels height width"]:
        """The denoised latent of the predicted velocity, x_t - t v."""
        return self.x_t - self.t * self.velocity


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

    def check(self) -> None:
        """Raise `FieldError` naming the first setting that breaks a rule."""
        require("weight", self.weight, 0 <= self.weight < math.inf, "must be 0 (off) or more")
        last = self.last_step
        require("last_step", last, last is None or last >= 0, "must be null or 0 or more")

    def fields(self) -> dict[str, Field]:
        """The fields of a record that it reads, in addition to those of the conditioning."""
        return {}

    def depths(self) -> tuple[int, ...]:
        """The blocks whose tokens it sees, in `View.hidden`: 1 is the first block."""
        return ()

    def init(self, model: ModelConfig, latent_shape: tuple[int, int, int], *, key: PRNGKeyArray) -> Any:
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
