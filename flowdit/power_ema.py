"""Moving averages of the weights whose profile is a power of the time, and any width from a few of them afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C. The
average at time t weighs the weights at time tau <= t by (gamma + 1) tau^gamma / t^(gamma + 1), so that its width, the
standard deviation of the profile as a fraction of t, is the same at all times. Times are numbers of updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flowdit.fields import require

MAX_WIDTH = 12**-0.5
"""The width of the mean over all updates (gamma = 0). Wider profiles would weigh early weights more than late ones."""


def exponent(width: float) -> float:
    """The gamma of a width sigma_rel in (0, `MAX_WIDTH`).

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-1/2, solved as a cubic equation.
    """
    inverse = float(width) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots)].max())


def check_width(field: str, width: float) -> None:
    """Raise `FieldError` unless the width is one of a profile."""
    require(field, width, 0 < width < MAX_WIDTH, f"must be above 0 and below {MAX_WIDTH:.3f}, the mean of all weights")


def newest_share(updates: Int[Array, ""], width: float) -> Float[Array, ""]:
    """The share of the newest weights in an average after this many updates: 1 - (1 - 1 / updates)^(gamma + 1)."""
    power = jnp.float32(exponent(width) + 1)
    return -jnp.expm1(power * jnp.log1p(-1 / updates.astype(jnp.float32)))


class Average(NamedTuple):
    """An average at a time: its width, and the number of updates."""

    width: float
    updates: int


class Reconstruction(NamedTuple):
    """Factors of the stored averages, whose sum is 1, and the error of their profile: 0 is exact, 1 as far as zero."""

    factors: Float[np.ndarray, " n"]
    error: float


def reconstruct(stored: Sequence[Average], wanted: Average) -> Reconstruction:
    """Factors with which stored averages, none of a later time, are closest to the profile of the wanted one.

    Least squares over the profiles (algorithm 3 of the paper). That the factors add up to 1 is a condition, so that
    weights that do not change come out unchanged.
    """
    gamma = np.array([exponent(average.width) for average in stored])
    time = np.array([float(average.updates) for average in stored])
    goal, end = exponent(wanted.width), float(wanted.updates)
    gram = _products(gamma[:, None], time[:, None], gamma[None], time[None])
    target = _products(gamma, time, goal, end)
    norm = float(_products(goal, end, goal, end))
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of unit length, as early ones are large
    count = len(stored)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram * scale[:, None] * scale
    system[:count, count] = system[count, :count] = scale / scale.max()
    right = np.append(target * scale, 1 / scale.max())
    factors = np.linalg.lstsq(system, right, rcond=1e-13)[0][:count] * scale
    squared = norm - 2 * factors @ target + factors @ gram @ factors
    return Reconstruction(factors, float(np.sqrt(max(squared, 0.0) / norm)))


def _products(gamma_a, time_a, gamma_b, time_b):
    """The integral over time of the product of two profiles."""
    first, last = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    later = np.where(time_a < time_b, gamma_b, gamma_a)  # the exponent of the profile that ends later
    return (gamma_a + 1) * (gamma_b + 1) * (first / last) ** later / ((gamma_a + gamma_b + 1) * last)
