"""Sampling latents from noise: solving the ODE of the velocity field with Diffrax, t from 1 to 0.

A network that predicts noise is converted to a velocity field and solved from DDPM's last time.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from flowdit.diffusion.flow import Velocity, guided_velocity, internally_guided, shift_times
from flowdit.diffusion.noise_prediction import LAST_TIME, start_at_last_time, velocity_from_noise
from flowdit.diffusion.watch import UNWATCHED, Meter, Watch
from flowdit.fields import FieldError, is_finite_number, require, require_choice

PREDICTIONS = ("velocity", "noise")


class _Solver(NamedTuple):
    build: type[diffrax.AbstractSolver]
    evaluations_per_step: int
    # First-same-as-last solvers reuse the last evaluation of a step, with one extra at the start.
    evaluations_at_start: int


SOLVERS = {
    "euler": _Solver(diffrax.Euler, 1, 0),
    "heun": _Solver(diffrax.Heun, 2, 0),
    "midpoint": _Solver(diffrax.Midpoint, 2, 0),
    "dopri5": _Solver(diffrax.Dopri5, 6, 1),
    "tsit5": _Solver(diffrax.Tsit5, 6, 1),
}
ADAPTIVE_SOLVERS = ("heun", "dopri5", "tsit5")


@dataclasses.dataclass
class SamplerConfig:
    """Settings of the sampler: of the previews of a run, and the defaults of `flowdit.sample` for its checkpoints.

    Attributes:
        solver: ODE solver: `euler`, `heun`, `midpoint`, `dopri5` or `tsit5`.
        steps: steps from noise to data; with `rtol`, the maximum number.
        guidance: weight of classifier-free guidance; 1: none.
        internal_guidance: weight of guidance by the model's own guidance head, which must be trained (`model.guidance_head`);
            takes no further evaluation, alone or beside `guidance`; 1: none.
        guidance_low: lowest flow time with guidance of both kinds; in [0, 1].
        guidance_high: highest flow time with guidance of both kinds; in [`guidance_low`, 1].
        time_shift: shift s of the solver's times, t' = s t / (1 + (s - 1) t); 1: evenly spaced.
        rtol: relative (and absolute) tolerance of adaptive steps, with `heun`, `dopri5` or `tsit5`; null: fixed steps.
    """

    solver: str = "heun"
    steps: int = 25
    guidance: float = 4.0
    internal_guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    time_shift: float = 1.0
    rtol: float | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require_choice("solver", self.solver, SOLVERS)
        check_count("steps", self.steps)
        for name in ("guidance", "internal_guidance", "guidance_low", "guidance_high", "time_shift", "rtol"):
            value = getattr(self, name)
            is_number = is_finite_number(value) or (value is None and name == "rtol")
            require(name, value, is_number, "must be a finite number")
        interval = [self.guidance_low, self.guidance_high]
        is_interval = 0 <= interval[0] <= interval[1] <= 1
        require("guidance_low/guidance_high", interval, is_interval, "must satisfy 0 <= low <= high <= 1")
        require("time_shift", self.time_shift, self.time_shift > 0, "must be positive")
        if self.rtol is not None:
            require("rtol", self.rtol, self.rtol > 0, "must be positive")
            rule = f"adaptive steps need a solver of {', '.join(ADAPTIVE_SOLVERS)}"
            require("rtol", self.solver, self.solver in ADAPTIVE_SOLVERS, rule)


def check_count(field: str, value: Any) -> None:
    """Raise `FieldError` unless `value` is a whole number of at least 1."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(field, value, is_whole, "must be a whole number")
    require(field, value, int(value) >= 1, "must be at least 1")


class Guidance(NamedTuple):
    """Weights of guidance and the flow times between which they hold, as numbers or as inputs of a compiled solve.

    `weight` is that of classifier-free guidance or a guide, `internal` that of the guidance head; None: none of it.
    """

    weight: Any
    low: Any = 0.0
    high: Any = 1.0
    internal: Any = None

    @classmethod
    def of(cls, config: SamplerConfig) -> Guidance:
        weights = [None if weight == 1 else weight for weight in (config.guidance, config.internal_guidance)]
        return cls(weights[0], config.guidance_low, config.guidance_high, weights[1])


class Guide(NamedTuple):
    """A weaker model as guide, in place of the null condition; `prediction` is its output, one of `PREDICTIONS`."""

    model: Velocity
    prediction: str = "velocity"


UNSOLVED = -1
"""The evaluations of an image that needs more adaptive steps than are allowed."""


def check_solved(evaluations: Int[np.ndarray, " batch"], config: SamplerConfig) -> None:
    """Raise `FieldError` if the solve of an image has not reached data."""
    if (evaluations == UNSOLVED).any():
        rtol = "" if config.rtol is None else f" for rtol={config.rtol:g}"
        raise FieldError("steps", f"must be more{rtol}, got {config.steps}")


class Samples(NamedTuple):
    """Normalised latents, the number of evaluations of the velocity field for each, and the path if it was asked for."""

    latents: Float[Array, "batch channels height width"]
    evaluations: Int[Array, " batch"]
    path: Float[Array, "batch frames channels height width"] | None = None


def sample(
    model: Velocity,
    noise: Float[Array, "batch channels height width"],
    condition: Any,
    null: Any,
    config: SamplerConfig,
    prediction: str = "velocity",
    watch: Watch = UNWATCHED,
    guidance: Guidance | None = None,
    guide: Guide | None = None,
) -> Samples:
    """Solve dx/dt = v(x, t) from `noise` at t = 1 to data at t = 0. `condition` and `null` have a leading batch axis.

    `prediction` is the output of the model, one of `PREDICTIONS`. With "noise" the solve starts at DDPM's last step,
    and the times are scaled accordingly, also where only the `guide` predicts noise. Guidance is the same for both, as v
    is affine in the noise. Raises `ValueError` for another prediction.

    A guided evaluation runs a batch twice as large, or the guide as well, and counts once. With neither `null` nor `guide`
    there is none. Internal guidance changes the velocity of `model` for both conditions before that. Adaptive steps are
    chosen per image, so that images do not depend on the rest of the batch; one that needs more than `config.steps` has
    `UNSOLVED` evaluations (`check_solved`). A `watch` sees the solve without changing its result. `guidance` takes the
    place of that of `config`, so that a compiled function serves many weights.
    """
    guidance = guidance or Guidance.of(config)
    interval = (guidance.low, guidance.high)
    predictions = [prediction] if guide is None else [prediction, guide.prediction]
    weak = None if guide is None else velocity_field(guide.model, guide.prediction)
    if guidance.internal is not None:
        model = internally_guided(model, guidance.internal, interval)
    model = velocity_field(model, prediction)
    start_time, start = _starting_point(noise, "noise" if "noise" in predictions else "velocity")

    def solve(start: Array, condition: Any, null: Any) -> Samples:
        def field(t: Array, x: Array, args: None) -> Array:
            weight = 1.0 if guidance.weight is None else guidance.weight
            return guided_velocity(model, x, t, condition, null, guidance=weight, interval=interval, guide=weak)

        return _solve(field, start, start_time, config, watch)

    if config.rtol is None:  # the same times for all images: terms that depend only on the time are computed once
        return solve(start, condition, null)

    def solve_one(*example: Any) -> Samples:
        samples = solve(*jax.tree.map(lambda x: x[None], example))
        return jax.tree.map(lambda x: x[0], samples)

    return jax.vmap(solve_one)(start, condition, null)


def _solve(
    field: Callable[..., Array], start: Array, start_time: float, config: SamplerConfig, watch: Watch
) -> Samples:
    solver = SOLVERS[config.solver]
    times = jnp.linspace(start_time, 0.0, watch.frames)
    states = [diffrax.SubSaveAt(ts=times)] if watch.frames else []
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),  # type: ignore[arg-type]
        solver.build(),
        t0=start_time,
        t1=0.0,
        dt0=None if config.rtol is None else -start_time / config.steps,
        y0=start,
        saveat=diffrax.SaveAt(subs=[diffrax.SubSaveAt(t1=True), *states]),
        stepsize_controller=_controller(config, start_time),
        max_steps=config.steps,
        progress_meter=diffrax.NoProgressMeter() if watch.progress is None else Meter(watch.progress),
        throw=False,  # an error within a program on several devices of a CPU ends the process
    )
    assert solution.ys is not None
    evaluations = solver.evaluations_per_step * solution.stats["num_steps"] + solver.evaluations_at_start
    evaluations = jnp.where(solution.result == diffrax.RESULTS.successful, evaluations, UNSOLVED)
    (result,), *path = solution.ys
    evaluations = jnp.broadcast_to(evaluations, start.shape[:1])
    return Samples(result, evaluations, jnp.swapaxes(path[0], 0, 1) if path else None)


def velocity_field(model: Velocity, prediction: str) -> Velocity:
    """The velocity field of a network with this output, one of `PREDICTIONS`. Raises `ValueError` for another one."""
    require_choice("prediction", prediction, PREDICTIONS)
    return velocity_from_noise(model) if prediction == "noise" else model


def _starting_point(noise: Array, prediction: str) -> tuple[float, Array]:
    return (LAST_TIME, start_at_last_time(noise)) if prediction == "noise" else (1.0, noise)


def _controller(config: SamplerConfig, start_time: float) -> diffrax.AbstractStepSizeController:
    if config.rtol is not None:
        return diffrax.PIDController(rtol=config.rtol, atol=config.rtol)
    times = start_time * shift_times(jnp.linspace(1.0, 0.0, config.steps + 1), config.time_shift)
    return diffrax.StepTo(ts=times)


def image_noise(
    seed: Integer[Array, ""] | int, numbers: Int[Array, " n"], latent_shape: tuple[int, int, int]
) -> Float[Array, "n c h w"]:
    """Noise of images by index: a function of (seed, index), independent of batch and devices."""
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, latent_shape))(keys)
