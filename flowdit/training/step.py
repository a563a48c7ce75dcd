"""The training step as a pure function from state and batch to new state and metrics, without host code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from flowdit.diffusion.objective import Batch, Losses, Objective, Parameters, time_bins
from flowdit.fsdp import over_devices
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.flops import training_flops
from flowdit.optim import Optimizer
from flowdit.power_ema import newest_share
from flowdit.sharding import join_micro_batches, micro_batch

Metrics = dict[str, Any]


class TrainState(eqx.Module):
    """The training state. `model`, `ema`, `averages` and the parameters of auxiliary losses are float32.

    `averages` are the power-function averages of the model (`power_ema`), one for each width; without post-hoc EMA none.
    """

    step: Int[Array, ""]
    model: Any
    ema: Any
    auxiliary: dict[str, Any]
    opt_state: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    averages: tuple[Any, ...] = ()

    @property
    def parameters(self) -> Parameters:
        """The parameters that the optimizer updates."""
        return Parameters(self.model, self.auxiliary)


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
    model: Any, optimizer: Optimizer, auxiliary: dict[str, Any] | None = None, num_averages: int = 0
) -> TrainState:
    """State at step 0; EMA and averages start as copies (the same buffer could not be donated twice)."""
    zero, auxiliary = jnp.zeros((), jnp.int32), auxiliary or {}
    return TrainState(
        step=zero,
        model=model,
        ema=jax.tree.map(jnp.copy, model),
        auxiliary=auxiliary,
        opt_state=optimizer.init(Parameters(model, auxiliary)),
        skipped=jnp.copy(zero),
        skipped_in_row=jnp.copy(zero),
        averages=copies(model, num_averages),
    )


def copies(model: Any, count: int) -> tuple[Any, ...]:
    """The model `count` times, each in buffers of its own."""
    return tuple(jax.tree.map(jnp.copy, model) for _ in range(count))


def loss_and_grads(
    objective: Objective,
    parameters: Parameters,
    batch: Batch,
    keys: Key[Array, " batch"],
    step: Int[Array, ""],
    gradient_accum: int,
    compute: Compute,
    mesh: Mesh | None = None,
) -> tuple[Losses, Parameters]:
    """Losses of all examples and the gradient of the mean loss, over `gradient_accum` micro-batches by scan.

    Each device works on its rows of the batch (`fsdp.over_devices`). Random numbers come from the examples' `keys` inside
    the scan: they are the same for any number of micro-batches and devices, and memory grows only with the micro-batch.
    """

    def of_rows(parameters, rows, step):
        def micro_loss(cast, batch, keys):
            losses = objective.loss(cast, batch, keys, step)
            return losses.total.mean(), losses

        def accumulate(grads, i):
            micro = micro_batch(rows, i, gradient_accum)
            (_, losses), new = jax.value_and_grad(micro_loss, has_aux=True)(compute.cast(parameters), *micro)
            add = lambda total, g: total + g.astype(total.dtype) / gradient_accum
            return jax.tree.map(add, grads, new), losses

        zeros = jax.tree.map(jnp.zeros_like, parameters)
        grads, losses = jax.lax.scan(accumulate, zeros, jnp.arange(gradient_accum))
        return join_micro_batches(losses), grads

    return over_devices(mesh, of_rows, compute.dtype)(parameters, (batch, keys), step)


def example_keys(seed: int, step: Int[Array, ""], batch: Batch) -> Key[Array, " batch"]:
    """A key for each example of the batch of a step, from the number of steps before it."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), len(jax.tree.leaves(batch)[0]))


def image_flops(objective: Objective, compute: Compute, parameters: Parameters, batch: dict[str, Any]) -> int:
    """Training FLOPs of one image of `batch`. Parameters and batch may be shapes; nothing is compiled or run."""

    def loss(parameters, batch, keys):
        return objective.loss(compute.cast(parameters), batch, keys, jnp.zeros((), jnp.int32)).total

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return training_flops(loss, parameters, one, keys)


def ema_decay_at(step: Int[Array, ""], decay: float, warmup: bool) -> Float[Array, ""]:
    """The decay; with warm-up min(decay, (1 + step) / (10 + step)), so that short runs forget their initialisation."""
    count = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + count) / (10 + count)) if warmup else jnp.asarray(decay, jnp.float32)


def power_averages(state: TrainState, model: Any, widths: Sequence[float]) -> tuple[Any, ...]:
    """The averages after an update to `model`. Their time counts updates, so that skipped steps leave no trace."""
    updates = state.step + 1 - state.skipped
    shares = [newest_share(updates, width) for width in widths]
    return tuple(
        jax.tree.map(lambda old, new, share=share: old + share * (new - old), average, model)
        for average, share in zip(state.averages, shares, strict=True)
    )


def make_train_step(
    optimizer: Optimizer,
    objective: Objective,
    seed: int,
    gradient_accum: int = 1,
    ema_decay: float = 0.9999,
    ema_warmup: bool = False,
    compute: Compute = FLOAT32,
    mesh: Mesh | None = None,
    widths: Sequence[float] = (),
    template: TrainState | None = None,
) -> TrainStep:
    """Return the jitted step; its state argument is donated. `mesh` is the mesh of state and batch, None for one
    device. `widths` are those of `TrainState.averages`; the new state has the shardings of `template`, if given.

    A step whose loss or gradient is not finite does not change weights, optimizer, EMA and averages and counts as
    skipped.
    """
    options = {"gradient_accum": gradient_accum, "compute": compute, "mesh": mesh}
    losses_and_gradients = functools.partial(loss_and_grads, objective, **options)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = example_keys(seed, state.step, batch)
        losses, grads = losses_and_gradients(state.parameters, batch, keys, state.step)
        loss, grad_norm = losses.total.mean(), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.parameters)
        parameters = Parameters(*optax.apply_updates(state.parameters, updates))  # type: ignore[misc]
        decay = ema_decay_at(state.step, ema_decay, ema_warmup)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, parameters.model)
        averages = power_averages(state, parameters.model, widths)
        old = (state.parameters, state.ema, state.opt_state, state.averages)
        new = (parameters, ema, opt_state, averages)
        parameters, ema, opt_state, averages = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        skipped = state.skipped + (~finite).astype(jnp.int32)
        skipped_in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The rate of the last update: a skipped step does not update, and the schedule counts updates.
            "learning_rate": optimizer.learning_rate(jnp.maximum(state.step - skipped, 0)),
            "skipped": skipped,
            "skipped_in_row": skipped_in_row,
            "bins": jax.tree.map(lambda part: time_bins(part, losses.t), {"loss": losses.total, **losses.parts}),
        }
        new_state = TrainState(
            step=state.step + 1,
            model=parameters.model,
            ema=ema,
            auxiliary=parameters.auxiliary,
            opt_state=opt_state,
            skipped=skipped,
            skipped_in_row=skipped_in_row,
            averages=averages,
        )
        return new_state, metrics

    return jax.jit(compute.on(mesh, train_step), donate_argnums=0, **_laid_out_like(template))


def _laid_out_like(template: TrainState | None) -> dict[str, Any]:
    """Options of jit for the results of a step: the shardings of `template`, else XLA's choice."""
    return {} if template is None else {"out_shardings": (jax.tree.map(lambda leaf: leaf.sharding, template), None)}


def make_validation_step(
    objective: Objective, seed: int, compute: Compute = FLOAT32, mesh: Mesh | None = None
) -> Callable[[Any, Batch, Array], tuple[Array, Array]]:
    """Return a jitted (model, batch, batch index) -> summed loss of the batch at each fixed time, and weight.

    `weight` of a batch, (rows,) or (rows, groups), weighs its rows, and sums and weight are those of each group.
    The noise is a function of (seed, batch index, time), so it is the same for every evaluation of every run.
    """

    def validation_step(model, batch, index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x76616C), index)
        losses, weight = objective.validation(compute.cast(model), batch, key), batch["weight"]
        losses = losses.reshape(losses.shape + (1,) * (weight.ndim - 1))
        return (losses * weight[None]).sum(1), weight.sum(0)

    return jax.jit(compute.on(mesh, validation_step))
