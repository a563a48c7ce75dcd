"""One training step as a pure function: batch in, new state and metrics out. Nothing here touches the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flowdit.diffusion import flow

Batch = dict[str, Array]
Metrics = dict[str, Array]


class TrainState(eqx.Module):
    """Everything that training changes. `model` and `ema` are float32."""

    step: Int[Array, ""]
    model: Any
    ema: Any
    opt_state: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: which batch field conditions the model, its null value, and how time and latents are treated.

    Stage 1 conditions on `label` with the null class. `mean` and `scale` normalise raw latents, a value or one a channel.
    """

    condition_field: str
    null: Any
    drop_rate: float
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    time_distribution: str = "logit_normal"
    time_shift: float = 1.0
    compute_dtype: str = "float32"

    def latents(self, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, "batch c h w"]:
        """Normalised latents; with `latent_std` in the batch and a key, a fresh draw from the VAE's posterior."""
        latent = batch["latent"]
        if key is not None and "latent_std" in batch:
            latent = latent + batch["latent_std"] * jax.random.normal(key, latent.shape)
        return flow.normalise_latents(latent, jnp.asarray(self.mean), jnp.asarray(self.scale))


def cast_floating(tree: Any, dtype: str) -> Any:
    """Floating-point arrays of `tree` in `dtype`."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def init_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0; the EMA starts as a copy (the same buffer could not be donated twice)."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, model, jax.tree.map(jnp.copy, model), optimizer.init(model), jnp.copy(zero), jnp.copy(zero))


def draw_examples(objective: Objective, batch: Batch, key: PRNGKeyArray) -> dict[str, Any]:
    """Noise, times and dropped conditions, drawn at global batch shape: the same on any number of devices."""
    posterior_key, noise_key, time_key, drop_key = jax.random.split(key, 4)
    x_0 = objective.latents(batch, posterior_key)
    condition = batch[objective.condition_field]
    return {
        "x_0": x_0,
        "noise": jax.random.normal(noise_key, x_0.shape),
        "t": flow.sample_times(time_key, x_0.shape[0], objective.time_distribution, objective.time_shift),
        "condition": flow.drop_condition(drop_key, condition, objective.null, objective.drop_rate),
    }


def loss_and_grads(
    objective: Objective, model: Any, examples: dict[str, Any], gradient_accum: int
) -> tuple[Float[Array, " batch"], Any]:
    """Losses of all examples and the gradient of their mean, over `gradient_accum` micro-batches by scan.

    A micro-batch takes every `gradient_accum`-th example, so that each stays spread over all devices.
    """

    def micro_loss(model, examples):
        losses = flow.example_losses(cast_floating(model, objective.compute_dtype), **examples)
        return losses.mean(), losses

    def accumulate(grads, micro_batch):
        (_, losses), new = jax.value_and_grad(micro_loss, has_aux=True)(model, micro_batch)
        return jax.tree.map(lambda total, g: total + g / gradient_accum, grads, new), losses

    def split(x):
        return x.reshape(-1, gradient_accum, *x.shape[1:]).swapaxes(0, 1)

    zeros = jax.tree.map(jnp.zeros_like, model)
    grads, losses = jax.lax.scan(accumulate, zeros, jax.tree.map(split, examples))
    return losses.swapaxes(0, 1).reshape(-1), grads


def ema_decay_at(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """The decay, or with warm-up min(decay, (1 + step) / (10 + step)), so that short runs forget their start."""
    count = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + count) / (10 + count)) if warmup else jnp.asarray(decay, jnp.float32)


def make_train_step(
    optimizer: optax.GradientTransformation,
    objective: Objective,
    seed: int,
    gradient_accum: int = 1,
    ema_decay: float = 0.9999,
    ema_warmup: bool = False,
    grad_shardings: Any = None,
) -> TrainStep:
    """The jitted step; its state argument is donated.

    A step whose loss or gradient is not finite leaves weights, optimizer and EMA as they were and counts as skipped.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples = draw_examples(objective, batch, jax.random.fold_in(jax.random.key(seed), state.step))
        losses, grads = loss_and_grads(objective, state.model, examples, gradient_accum)
        if grad_shardings is not None:  # reduce-scatter to the owners of the parameters instead of all-reduce
            grads = jax.lax.with_sharding_constraint(grads, grad_shardings)
        loss, grad_norm = losses.mean(), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        decay = ema_decay_at(state.step, ema_decay, ema_warmup)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, model)
        new = (model, ema, opt_state)
        old = (state.model, state.ema, state.opt_state)
        model, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        skipped = state.skipped + (~finite).astype(jnp.int32)
        skipped_in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        bin_sums, bin_counts = flow.loss_bins(losses, examples["t"])
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "skipped_in_row": skipped_in_row,
            "bin_sums": bin_sums,
            "bin_counts": bin_counts,
        }
        return TrainState(state.step + 1, model, ema, opt_state, skipped, skipped_in_row), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_validation_step(objective: Objective, seed: int) -> Callable[[Any, Batch, Array], tuple[Array, Array]]:
    """Jitted (model, batch, batch index) -> summed loss of the batch's examples at each of the fixed times, and weight.

    The noise is a function of (seed, batch index, time), so that every evaluation of every run sees the same.
    """

    def validation_step(model, batch, index):
        model = cast_floating(model, objective.compute_dtype)
        x_0 = objective.latents(batch, None)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x76616C), index)

        def losses_at(t, key):
            noise = jax.random.normal(key, x_0.shape)
            times = jnp.full(x_0.shape[0], t)
            losses = flow.example_losses(model, x_0, noise, times, batch[objective.condition_field])
            return (losses * batch["weight"]).sum()

        times = jnp.asarray(flow.VALIDATION_TIMES)
        sums = jax.lax.map(lambda args: losses_at(*args), (times, jax.random.split(key, len(times))))
        return sums, batch["weight"].sum()

    return jax.jit(validation_step)
