"""The training objective. The training step averages, differentiates and logs its losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from flowdit.diffusion import flow
from flowdit.diffusion.auxiliary import AuxiliaryLoss, View, batch_losses

Batch = dict[str, Array]
Example = Mapping[str, Array]
"""The fields of one record of a batch, without the batch axis."""
NUM_TIME_BINS = 8


class Parameters(NamedTuple):
    """All trained parameters: the network, and the parameters of each auxiliary loss by name."""

    model: Any
    auxiliary: dict[str, Any] = {}


class Losses(NamedTuple):
    """For every example: the total loss, its summands by name (for logging), and the flow time.

    `parts` is empty if the total is the only loss. `observed` holds the norms of `models.observe`, if any.
    """

    total: Float[Array, " batch"]
    parts: dict[str, Float[Array, " batch"]]
    t: Float[Array, " batch"]
    observed: Mapping[str, Any] = {}


@runtime_checkable
class Objective(Protocol):
    """A training loss over batches, and the validation loss."""

    @property
    def validation_times(self) -> tuple[float, ...]:
        """Flow times of the first rows of `validation`."""
        ...

    def loss(self, parameters: Parameters, batch: Batch, keys: Key[Array, " batch"], step: Int[Array, ""]) -> Losses:
        """The losses of a batch at a training step, each from its own example and key alone.

        A device or micro-batch calls it with its share of the batch, so a loss that reads other examples would depend on
        the number of devices.
        """
        ...

    def validation(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Float[Array, "rows batch"]:
        """The losses of a batch at fixed times, with noise from `key` alone.

        One more row, if there is one, is the loss at the last time without the condition, with the same noise.
        """
        ...


@runtime_checkable
class Conditions(Protocol):
    """The methods of a conditioning that an objective uses, for one example (`conditioning.Conditioning`)."""

    def condition(self, example: Example) -> Any: ...

    def null(self, condition: Any) -> Any: ...


class Drawn(NamedTuple):
    """One training example: normalised latent, noise, flow time, and its condition or null condition."""

    x_0: Float[Array, "channels height width"]
    noise: Float[Array, "channels height width"]
    t: Float[Array, ""]
    condition: Any


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Conditional flow matching. `mean` and `scale` normalise raw latents, one value or one per channel.

    Times are of `time_distribution`, from step `uniform_after` + 1 on uniform.
    """

    conditioning: Conditions
    drop_rate: float
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    time_distribution: str = "logit_normal"
    time_shift: float = 1.0
    time_std: float = 1.0
    uniform_after: int | None = None
    auxiliary: tuple[AuxiliaryLoss, ...] = ()

    @property
    def validation_times(self) -> tuple[float, ...]:
        return flow.VALIDATION_TIMES

    def loss(self, parameters: Parameters, batch: Batch, keys: Key[Array, " batch"], step: Int[Array, ""]) -> Losses:
        """The flow-matching error of every example, plus the weighted auxiliary losses."""
        drawn = jax.vmap(functools.partial(self.draw, step=step))(batch, keys)
        depths = tuple(sorted({depth for auxiliary in self.auxiliary for depth in auxiliary.depths()}))
        weak = any(auxiliary.reads_weak for auxiliary in self.auxiliary)
        predict = functools.partial(flow.predict, parameters.model, depths=depths, weak=weak)
        predicted = jax.vmap(predict)(drawn.x_0, drawn.noise, drawn.t, drawn.condition)
        total, parts = predicted.error, {}
        views = View(
            example=batch,
            x_0=drawn.x_0,
            x_t=predicted.x_t,
            t=drawn.t,
            velocity=predicted.velocity,
            target=predicted.target,
            hidden=predicted.hidden,
            weak=predicted.weak,
        )
        for auxiliary in self.auxiliary:
            losses = batch_losses(auxiliary, parameters.auxiliary[auxiliary.name], views, step)
            total, parts = total + auxiliary.weight * losses, parts | {auxiliary.name: losses}
        return Losses(total, {"velocity": predicted.error, **parts} if parts else {}, drawn.t, predicted.observed)

    def validation(self, model: Any, batch: Batch, key: PRNGKeyArray) -> Float[Array, "rows batch"]:
        """The flow-matching errors at `validation_times`, one time after the other to save memory.

        If conditions are dropped in training, a last row has the errors at the last time with the null condition.
        """
        x_0 = jax.vmap(lambda example: self.latent(example, None))(batch)
        condition = jax.vmap(self.conditioning.condition)(batch)
        null = jax.vmap(self.conditioning.null)(condition)
        predict = jax.vmap(functools.partial(flow.predict, model))

        def errors_at(t, key, is_dropped):
            noise = jax.random.normal(key, x_0.shape)
            used = jax.tree.map(lambda one, other: jnp.where(is_dropped, one, other), null, condition)
            return predict(x_0, noise, jnp.full(x_0.shape[0], t), used).error

        times = jnp.asarray(self.validation_times)
        keys = jax.random.split(key, len(times))
        is_dropped = jnp.zeros(len(times), bool)
        if self._drops(condition):
            times = jnp.append(times, times[-1])
            keys = jnp.concatenate([keys, keys[-1:]])
            is_dropped = jnp.append(is_dropped, True)
        return jax.lax.map(lambda args: errors_at(*args), (times, keys, is_dropped))

    def _drops(self, conditions: Any) -> bool:
        """Whether training drops conditions: an unconditional model's is its own null."""
        one = jax.tree.map(lambda leaf: leaf[0], conditions)
        return self.drop_rate > 0 and self.conditioning.null(one) is not one

    def latent(self, example: Example, key: PRNGKeyArray | None) -> Float[Array, "c h w"]:
        """The normalised latent; with `latent_std` in the example and a key, a sample from the VAE's posterior."""
        latent = example["latent"]
        if key is not None and "latent_std" in example:
            latent = latent + example["latent_std"] * jax.random.normal(key, latent.shape)
        return flow.normalise_latents(latent, jnp.asarray(self.mean), jnp.asarray(self.scale))

    def draw(self, example: Example, key: PRNGKeyArray, step: Int[Array, ""] | int) -> Drawn:
        """Draw the inputs of `flow.predict` for one example: latent, noise, time, and the condition, dropped or not.

        `step` is the number of steps before this one.
        """
        posterior_key, noise_key, time_key, drop_key = jax.random.split(key, 4)
        x_0 = self.latent(example, posterior_key)
        condition = self.conditioning.condition(example)
        return Drawn(
            x_0=x_0,
            noise=jax.random.normal(noise_key, x_0.shape),
            t=self.time(time_key, step),
            condition=flow.drop_condition(drop_key, condition, self.conditioning.null(condition), self.drop_rate),
        )

    def time(self, key: PRNGKeyArray, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """A training time, after the first `uniform_after` steps of the uniform distribution; `time_shift` holds for both."""
        t = flow.sample_time(key, self.time_distribution, self.time_shift, self.time_std)
        if self.uniform_after is None:
            return t
        return jnp.where(step < self.uniform_after, t, flow.sample_time(key, "uniform", self.time_shift))


def time_bins(losses: Float[Array, " batch"], t: Float[Array, " batch"]) -> tuple[Array, Array]:
    """Sum of losses and count of examples in each of `NUM_TIME_BINS` equal bins of t in [0, 1]."""
    index = jnp.clip((t * NUM_TIME_BINS).astype(jnp.int32), 0, NUM_TIME_BINS - 1)
    one_hot = jax.nn.one_hot(index, NUM_TIME_BINS)
    return losses @ one_hot, one_hot.sum(0)
