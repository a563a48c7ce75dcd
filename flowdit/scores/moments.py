"""Mean and covariance of features, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64


class Moments(NamedTuple):
    """Mean and covariance (divided by n - 1) of the features of `count` images; `count` is 0 where it is unknown."""

    count: int
    mean: Float64[np.ndarray, " width"]
    covariance: Float64[np.ndarray, "width width"]


def moments_of(features: Float32[np.ndarray, "n width"] | Float64[np.ndarray, "n width"]) -> Moments:
    """The moments of at least one image; the covariance of one image is 0."""
    values = features.astype(np.float64)
    mean = values.mean(axis=0)
    values -= mean
    return Moments(len(values), mean, values.T @ values / max(len(values) - 1, 1))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of images together (Chan et al. 1979), so that features need not be kept."""
    count = a.count + b.count
    difference = b.mean - a.mean
    scatter = a.covariance * (a.count - 1) + b.covariance * (b.count - 1)
    scatter += np.outer(difference, difference) * (a.count * b.count / count)
    return Moments(count, a.mean + difference * (b.count / count), scatter / (count - 1))
