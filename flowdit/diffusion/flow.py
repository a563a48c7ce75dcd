"""The mathematics of flow matching.

Convention, everywhere in flowdit: t = 0 is data, t = 1 is noise, x_t = (1 - t) x_0 + t noise, and the network predicts
the velocity v = dx_t/dt = noise - x_0 (rectified flow, Liu et al. 2023; Esser et al. 2024, with sigma = t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flowdit.models.observe import collect, observe
from flowdit.models.trunk import Output

VALIDATION_TIMES = tuple((i + 0.5) / 8 for i in range(8))
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")

Velocity = Callable[[Array, Array, Any], Array]
"""model(x_t, t, condition) for one example."""


def interpolate(x_0: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: Float[Array, ""]) -> Array:
    """x_t = (1 - t) x_0 + t noise."""
    return (1 - t) * x_0 + t * noise


def velocity_target(x_0: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """v = noise - x_0."""
    return noise - x_0


def sample_time(key: PRNGKeyArray, distribution: str, shift: float = 1.0, std: float = 1.0) -> Float[Array, ""]:
    """A training time in (0, 1): uniform, or logit-normal(0, std) (Esser et al. 2024, section 3.1), then shifted.

    A shift s of logit-normal times adds log(s) to their mean.
    """
    t = jax.random.uniform(key) if distribution == "uniform" else jax.nn.sigmoid(std * jax.random.normal(key))
    return shift_times(t, shift)


def shift_times(t: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """t' = s t / (1 + (s - 1) t): more steps near the noise for s > 1 (Esser et al. 2024, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(latent_shape: tuple[int, int, int]) -> float:
    """s = sqrt(C H W / 4096), the shift of LightningDiT and SD3 for larger latents."""
    return math.sqrt(math.prod(latent_shape) / 4096)


def normalise_latents(latent: Float[Array, "*b c h w"], mean: Array, scale: Array) -> Float[Array, "*b c h w"]:
    """From raw VAE latents to model inputs: (latent - mean) * scale, scalars or one value per channel."""
    return (latent - _per_channel(mean, latent.ndim)) * _per_channel(scale, latent.ndim)


def denormalise_latents(latent: Float[Array, "*b c h w"], mean: Array, scale: Array) -> Float[Array, "*b c h w"]:
    """Inverse of `normalise_latents`."""
    return latent / _per_channel(scale, latent.ndim) + _per_channel(mean, latent.ndim)


def _per_channel(value: Array, ndim: int) -> Array:
    return jnp.asarray(value, jnp.float32).reshape((1,) * (ndim - 3) + (-1, 1, 1))


def drop_condition(key: PRNGKeyArray, condition: Any, null: Any, rate: float) -> Any:
    """Return one example's condition, or with probability `rate` its null condition (the same pytree)."""
    dropped = jax.random.bernoulli(key, rate)
    return jax.tree.map(lambda value, null_value: jnp.where(dropped, null_value, value), condition, null)


class Prediction(NamedTuple):
    """The network's output for one noised example, the right velocity, and the mean squared error in float32.

    `hidden` holds the tokens after the requested blocks, by depth, `weak` the velocity of the guidance head if it was asked
    for, and `observed` the norms of `models.observe`, if any.
    """

    x_t: Float[Array, "channels height width"]
    velocity: Float[Array, "channels height width"]
    target: Float[Array, "channels height width"]
    error: Float[Array, ""]
    hidden: dict[int, Float[Array, "tokens dim"]] = {}
    weak: Float[Array, "channels height width"] | None = None
    observed: Mapping[str, Any] = {}


def predict(
    model: Any,
    x_0: Float[Array, "channels height width"],
    noise: Float[Array, "channels height width"],
    t: Float[Array, ""],
    condition: Any,
    depths: tuple[int, ...] = (),
    weak: bool = False,
) -> Prediction:
    """Apply the network to one example noised to time `t`; the error is that of Lipman et al. 2023, equation 14.

    With `depths`, `hidden` holds the tokens after these blocks; with `weak`, `weak` the velocity of the guidance head.
    """
    x_t = interpolate(x_0, noise, t)
    with collect() as observed:
        observe("input", x_t)
        if depths or weak:
            output = model.run(x_t, t, condition, depths=depths, weak=weak)
        else:
            output = Output(model(x_t, t, condition), {})
    target = velocity_target(x_0, noise)
    error = jnp.square(output.velocity - target).mean()
    return Prediction(
        x_t=x_t,
        velocity=output.velocity,
        target=target,
        error=error,
        hidden=output.hidden,
        weak=output.weak,
        observed=observed,
    )


def guided_velocity(
    model: Velocity,
    x_t: Float[Array, "batch channels height width"],
    t: Float[Array, ""],
    condition: Any,
    null: Any,
    guidance: float | Float[Array, ""],
    interval: tuple[Any, Any] = (0.0, 1.0),
    guide: Velocity | None = None,
) -> Float[Array, "batch channels height width"]:
    """v = v_null + w (v_cond - v_null) over all channels (Ho & Salimans 2022), both halves in one batch.

    With a `guide`, a weaker model, its velocity for `condition` takes the place of v_null (Karras et al. 2024,
    autoguidance), and `null` is not used.
    Outside `interval` (low <= t <= high) only the conditional velocity is used (Kynkaanniemi et al. 2024).
    `null` has the batch axis of `condition`. With guidance 1, or with neither `null` nor `guide`, only the conditional
    velocity is computed. A traced `guidance` is never taken for 1.
    """
    of_batch = lambda network, x, condition: jax.vmap(network, in_axes=(0, None, 0))(x, t, condition)
    is_one = isinstance(guidance, int | float) and guidance == 1.0
    if is_one or (null is None and guide is None):
        return of_batch(model, x_t, condition)
    if guide is not None:
        v_cond, v_weak = of_batch(model, x_t, condition), of_batch(guide, x_t, condition)
    else:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)
        v_cond, v_weak = jnp.split(of_batch(model, jnp.concatenate([x_t, x_t]), both), 2)
    return jnp.where(_is_inside(interval, t), v_weak + guidance * (v_cond - v_weak), v_cond)


def internally_guided(model: Any, weight: float | Float[Array, ""], interval: tuple[Any, Any] = (0.0, 1.0)) -> Velocity:
    """The field v_weak + w (v - v_weak), with v_weak of the network's guidance head, in one evaluation (Zhou et al. 2025).

    Outside `interval` it is v. Raises `ValueError` when called, if the network has no guidance head.
    """

    def velocity(x_t: Array, t: Array, condition: Any) -> Array:
        output = model.run(x_t, t, condition, weak=True)
        guided = output.weak + weight * (output.velocity - output.weak)
        return jnp.where(_is_inside(interval, t), guided, output.velocity)

    return velocity


def _is_inside(interval: tuple[Any, Any], t: Float[Array, ""]) -> Bool[Array, ""]:
    return (t >= interval[0]) & (t <= interval[1])
