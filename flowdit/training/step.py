"""One training step as a pure function: batch in, new state and metrics out. Nothing here touches the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from flowdit.diffusion import flow
from flowdit.sharding import parameter_shardings
from flowdit.training.objective import Objective

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


def init_state(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State at step 0; the EMA starts as a copy (the same buffer could not be donated twice)."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, model, jax.tree.map(jnp.copy, model), optimizer.init(model), jnp.copy(zero), jnp.copy(zero))


def loss_and_grads(
    objective: Objective, model: Any, batch: Batch, keys: Key[Array, " batch"], gradient_accum: int
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Any]:
    """Losses and times of all examples and the gradient of the mean loss, over `gradient_accum` micro-batches by scan.

    What is random comes from the examples' own `keys` inside the scan: it is the same for any number of micro-batches
    and devices, and memory grows with the micro-batch alone.
    """

    def micro_loss(model, batch, keys):
        examples = jax.vmap(objective.draw)(batch, keys)
        losses = flow.example_losses(objective.compute.cast(model), **examples)
        return losses.mean(), (losses, examples["t"])

    def accumulate(grads, i):
        rows = micro_batch((batch, keys), i, gradient_accum)
        (_, results), new = jax.value_and_grad(micro_loss, has_aux=True)(model, *rows)
        return jax.tree.map(lambda total, g: total + g / gradient_accum, grads, new), results

    zeros = jax.tree.map(jnp.zeros_like, model)
    grads, results = jax.lax.scan(accumulate, zeros, jnp.arange(gradient_accum))
    losses, times = join_micro_batches(results)
    return losses, times, grads


def micro_batch(batch: Any, i: Int[Array, ""], count: int) -> Any:
    """Every `count`-th row of `batch` from row i on: each micro-batch stays spread over all devices.

    Cut out one at a time, as all of them at once would be a second copy of the batch.
    """
    cut = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, count, *x.shape[1:]), i, axis=1, keepdims=False)
    return jax.tree.map(cut, batch)


def join_micro_batches(results: Any) -> Any:
    """(count, batch / count, ...) results of the micro-batches -> (batch, ...) in the order of the batch."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


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
    mesh: Mesh | None = None,
) -> TrainStep:
    """The jitted step; its state argument is donated. `mesh` is where state and batch lie, None for one device.

    A step whose loss or gradient is not finite leaves weights, optimizer and EMA as they were and counts as skipped.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), len(batch["latent"]))
        losses, times, grads = loss_and_grads(objective, state.model, batch, keys, gradient_accum)
        if mesh is not None:  # reduce-scatter to the owners of the parameters instead of all-reduce
            grads = jax.lax.with_sharding_constraint(grads, parameter_shardings(mesh, grads))
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
        bin_sums, bin_counts = flow.loss_bins(losses, times)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "skipped_in_row": skipped_in_row,
            "bin_sums": bin_sums,
            "bin_counts": bin_counts,
        }
        return TrainState(state.step + 1, model, ema, opt_state, skipped, skipped_in_row), metrics

    return jax.jit(objective.compute.on(mesh, train_step), donate_argnums=0)


def make_validation_step(
    objective: Objective, seed: int, mesh: Mesh | None = None
) -> Callable[[Any, Batch, Array], tuple[Array, Array]]:
    """Jitted (model, batch, batch index) -> summed loss of the batch's examples at each of the fixed times, and weight.

    The noise is a function of (seed, batch index, time), so that every evaluation of every run sees the same.
    """

    def validation_step(model, batch, index):
        model = objective.compute.cast(model)
        x_0 = jax.vmap(lambda example: objective.latent(example, None))(batch)
        condition = jax.vmap(objective.conditioning.of_example)(batch)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x76616C), index)

        def losses_at(t, key):
            noise = jax.random.normal(key, x_0.shape)
            times = jnp.full(x_0.shape[0], t)
            losses = flow.example_losses(model, x_0, noise, times, condition)
            return (losses * batch["weight"]).sum()

        times = jnp.asarray(flow.VALIDATION_TIMES)
        sums = jax.lax.map(lambda args: losses_at(*args), (times, jax.random.split(key, len(times))))
        return sums, batch["weight"].sum()

    return jax.jit(objective.compute.on(mesh, validation_step))
