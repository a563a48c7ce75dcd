"""AdamW and Muon with warm-up, a schedule, a decay mask and global-norm clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flowdit.fields import require, require_choice, require_effect
from flowdit.muon import hidden_matrices, scale_by_muon
from flowdit.sharding import parameter_specs

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class OptimConfig:
    """AdamW or Muon, with a warm-up and a schedule.

    Attributes:
        name: the optimizer: `adamw`, or `muon` for the matrices of the blocks and AdamW for all other parameters.
        learning_rate: peak learning rate, of both. Muon's updates are about as large as those of AdamW.
        betas: AdamW's decays of the first and the second moment, each in [0, 1).
        eps: added to AdamW's root of the second moment, above 0.
        muon_momentum: with `name=muon`, its decay of the first moment, in [0, 1).
        muon_modulation: with `name=muon`, whether it updates the projections to shifts, scales and gates; false: AdamW does.
        weight_decay: decoupled decay of the matrices of linear layers, times the learning rate, 0 or more; other
            parameters are not decayed.
        clip_norm: global norm to which gradients are clipped; null: not clipped.
        schedule: `constant`; `cosine` from the peak to `final_factor` of it; `wsd` (warm-up, stable, decay): constant
            until the last `decay_steps`, in which it falls to `final_factor` as 1 - sqrt (Haegele et al. 2024).
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        decay_steps: length of the decay, with `schedule=wsd`; null: a fifth of `train.num_steps`, or all steps after
            the warm-up where these are fewer.
        final_factor: share of the peak, in [0, 1], that `cosine` and `wsd` have reached after the last step.
        first_moment_dtype: `float32`, or `bfloat16`, which saves two bytes a parameter. Updates are computed in float32; only what is kept between steps is rounded. A change on resume casts it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_modulation: bool = True
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_factor: float = 0.0
    first_moment_dtype: str = "float32"

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require_choice("name", self.name, OPTIMIZERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("first_moment_dtype", self.first_moment_dtype, MOMENT_DTYPES)
        for field in ("learning_rate", "eps"):
            value = getattr(self, field)
            require(field, value, value > 0, "must be positive")
        are_decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require("betas", self.betas, are_decays, "must be two numbers in [0, 1)")
        momentum, decay_steps = self.muon_momentum, self.decay_steps
        require("muon_momentum", momentum, 0 <= momentum < 1, "must be in [0, 1)")
        require("decay_steps", decay_steps, decay_steps is None or decay_steps > 0, "must be positive or null")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "must be 0 or more")
        require("final_factor", self.final_factor, 0 <= self.final_factor <= 1, "must be in [0, 1]")
        clip_norm = self.clip_norm
        require("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "must be positive or null")
        for field in ("muon_momentum", "muon_modulation"):
            require_effect(self, field, "name", "muon")
        require_effect(self, "decay_steps", "schedule", "wsd")


def learning_rate_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made."""
    after_warmup = num_steps - config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, after_warmup, alpha=config.final_factor)
    elif config.schedule == "wsd":
        decay_steps = min(config.decay_steps or max(num_steps // 5, 1), after_warmup)
        after = _stable_then_decay(config, after_warmup - decay_steps, decay_steps)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return after
    # The first update has a non-zero rate: count + 1 of warmup_steps.
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _stable_then_decay(config: OptimConfig, stable_steps: int, decay_steps: int) -> optax.Schedule:
    def schedule(count: Any) -> Any:
        # Its first update is below the peak, and its last above the end, which comes after it as that of `cosine`.
        share = jnp.clip((count + 1 - stable_steps) / (decay_steps + 1), 0, 1)
        return config.learning_rate * (1 - (1 - config.final_factor) * jnp.sqrt(share))

    return schedule


def decay_mask(params: Any) -> Any:
    """True for the matrices of linear layers; biases, norms and embedding tables are not decayed."""
    return jax.tree.map(lambda spec: spec.decay, parameter_specs(params))


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, and the learning rate as a function of the number of updates."""

    init: Callable[[Any], optax.OptState]
    update: Callable[..., tuple[Any, optax.OptState]]
    learning_rate: Callable[[Int[Array, ""]], Float[Array, ""]]


def make_optimizer(config: OptimConfig, num_steps: int, compute_dtype: str = "float32") -> Optimizer:
    """The optimizer of a run of `num_steps` (which only matters for the schedules that end).

    Muon makes matrices orthogonal in `compute_dtype`.
    """
    schedule = learning_rate_schedule(config, num_steps)
    transformation = optax.adamw(
        schedule,
        b1=config.betas[0],
        b2=config.betas[1],
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.first_moment_dtype,
    )
    if config.name == "muon":
        transformation = _with_muon(config, schedule, transformation, compute_dtype)
    # The chain, and so the names of its state, is the same without clipping, so that a resume may change it.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    chain = optax.chain(clip, transformation)

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


def _with_muon(
    config: OptimConfig, schedule: optax.Schedule, adamw: optax.GradientTransformation, compute_dtype: str
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, `adamw` for all other parameters."""
    muon = optax.chain(
        scale_by_muon(config.muon_momentum, compute_dtype, config.first_moment_dtype),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )

    def labels(parameters: Any) -> Any:
        of_muon = hidden_matrices(parameters, config.muon_modulation)
        return jax.tree.map(lambda is_muons: "muon" if is_muons else "adamw", of_muon)

    return optax.partition({"muon": muon, "adamw": adamw}, labels)
