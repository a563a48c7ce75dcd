"""AdamW with warm-up, a schedule, a decay mask and global-norm clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flowdit.fields import require, require_choice
from flowdit.sharding import parameter_specs

SCHEDULES = ("constant", "cosine")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class OptimConfig:
    """AdamW, with a warm-up and a schedule.

    Attributes:
        name: the optimizer, `adamw`.
        learning_rate: peak learning rate.
        betas: decays of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the matrices of linear layers, times the learning rate; other parameters are not decayed.
        clip_norm: global norm to which gradients are clipped; null: not clipped.
        schedule: `constant`, or `cosine` from the peak to `final_factor` of it at the last step.
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        final_factor: share of the peak at the end of `cosine`.
        first_moment_dtype: `float32`, or `bfloat16`, which saves two bytes a parameter. Updates are computed in float32; only what is kept between steps is rounded. A change on resume casts it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    final_factor: float = 0.0
    first_moment_dtype: str = "float32"

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require("name", self.name, self.name == "adamw", "must be 'adamw'")
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("first_moment_dtype", self.first_moment_dtype, MOMENT_DTYPES)
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "must be positive")
        are_decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require("betas", self.betas, are_decays, "must be two numbers in [0, 1)")
        clip_norm = self.clip_norm
        require("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "must be positive or null")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made."""
    decay_steps = num_steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, decay_steps, alpha=config.final_factor)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return after
    # The first update has a non-zero rate: count + 1 of warmup_steps.
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the matrices of linear layers; biases, norms and embedding tables are not decayed."""
    return jax.tree.map(lambda spec: spec.decay, parameter_specs(params))


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, and the learning rate as a function of the number of updates."""

    init: Callable[[Any], optax.OptState]
    update: Callable[..., tuple[Any, optax.OptState]]
    learning_rate: Callable[[Int[Array, ""]], Float[Array, ""]]


def make_optimizer(config: OptimConfig, num_steps: int) -> Optimizer:
    """The optimizer of a run of `num_steps` (which only matters for the cosine schedule)."""
    schedule = learning_rate_schedule(config, num_steps)
    adamw = optax.adamw(
        schedule,
        b1=config.betas[0],
        b2=config.betas[1],
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.first_moment_dtype,
    )
    # The chain, and so the names of its state, is the same without clipping, so that a resume may change it.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    chain = optax.chain(clip, adamw)

    # Optax mixes its integer step count with floats; the rest of flowdit runs under strict promotion.
    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        # Optax would round the decayed moment once more, before adding the gradient.
        state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return chain.update(updates, state, params)

    def learning_rate(count: Int[Array, ""]) -> Float[Array, ""]:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(schedule(count), jnp.float32)

    return Optimizer(chain.init, update, learning_rate)
