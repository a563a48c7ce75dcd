"""What every auxiliary loss answers, and what it sees of an example."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flowdit.data.records import Field
from flowdit.fields import require
from flowdit.models.transformer import ModelConfig

RESERVED_NAMES = ("loss", "velocity", "grad_norm", "learning_rate", "skipped_steps", "skipped_in_row", "total_flops")
"""What is logged besides, under `train/`."""


class View(NamedTuple):
    """What an auxiliary loss sees of one example.

    `example` holds the fields of the record, `x_0` its normalised latent, `x_t` the same noised to the flow time `t`, and
    `velocity` what the network predicts there.
    """

    example: Mapping[str, Array]
    x_0: Float[Array, "channels height width"]
    x_t: Float[Array, "channels height width"]
    t: Float[Array, ""]
    velocity: Float[Array, "channels height width"]

    @property
    def denoised(self) -> Float[Array, "channels height width"]:
        """The latent that the predicted velocity leads to, x_t - t v."""
        return self.x_t - self.t * self.velocity


@dataclasses.dataclass
class AuxiliaryLoss(abc.ABC):
    """A loss that is added to the objective's with `weight` (0: off), up to and with step `last_step` (null: always).

    The dataclass fields of a subclass are its settings, `auxiliary.<name>.<field>` in the configuration.
    """

    weight: float = 0.0
    last_step: int | None = None

    name: ClassVar[str]
    """Its key in `AUXILIARY`: its parameters lie under `auxiliary.<name>.` in checkpoints, its values are logged by it."""

    def check(self) -> None:
        """Raise `FieldError` naming the first setting that breaks a rule."""
        require("weight", self.weight, 0 <= self.weight < math.inf, "must be 0 (off) or more")
        last = self.last_step
        require("last_step", last, last is None or last >= 0, "must be null or 0 or more")

    def fields(self) -> dict[str, Field]:
        """The fields that it reads of a record, beside those of the conditioning."""
        return {}

    def init(self, model: ModelConfig, latent_shape: tuple[int, int, int], *, key: PRNGKeyArray) -> Any:
        """Its own parameters, a pytree of float32 arrays, trained with the network's; not averaged, never exported."""
        return {}

    @abc.abstractmethod
    def __call__(self, parameters: Any, view: View) -> Float[Array, ""]:
        """The loss of one example."""


def batch_losses(
    auxiliary: AuxiliaryLoss, parameters: Any, views: View, step: Int[Array, ""]
) -> Float[Array, " batch"]:
    """The loss of every example of a batch; 0, and not computed, after the last step."""
    # Parameters come in the compute dtype, and with them perhaps the loss.
    losses = jax.vmap(lambda view: jnp.asarray(auxiliary(parameters, view), jnp.float32))
    if auxiliary.last_step is None:
        return losses(views)
    # `step` counts the steps made before this one.
    return jax.lax.cond(step < auxiliary.last_step, losses, lambda views: jnp.zeros(views.t.shape), views)
