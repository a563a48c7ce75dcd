"""Linear discriminant analysis of image features (Fisher 1936): the class of an image, and a space of classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64, Int

SHRINKAGE = 0.3
"""Share of a multiple of the identity in a covariance of few images for many features."""

Features = Float32[np.ndarray, "n width"]


def discriminant(
    features: Features, labels: Int[np.ndarray, " n"], count: int, shrinkage: float = SHRINKAGE
) -> Callable[[Features], Int[np.ndarray, " m"]]:
    """A linear discriminant of `count` classes of equal probability: from features to the number of the likeliest.

    The covariance within a class is that of standardised features, with a share `shrinkage` of a multiple of the
    identity.
    """
    values = features.astype(np.float64)
    centre, scale = values.mean(axis=0), values.std(axis=0) + 1e-12
    values = (values - centre) / scale
    means = np.stack([values[labels == number].mean(axis=0) for number in range(count)])
    covariance = _covariance(values - means[labels], shrinkage)
    weights: Float64[np.ndarray, "width count"] = np.linalg.solve(covariance, means.T)
    offsets = (means.T * weights).sum(axis=0) / 2
    return lambda some: np.argmax((some - centre) / scale @ weights - offsets, axis=1)


def whitening(features: Features, labels: Int[np.ndarray, " n"]) -> Callable[[Features], Features]:
    """From features to a space in which the covariance within a class, shrunk by `SHRINKAGE`, is the identity.

    The origin is the mean of all features. Classes are numbered from 0; some may have one image, or none.
    """
    values = features.astype(np.float64)
    centre, scale = values.mean(axis=0), values.std(axis=0) + 1e-12
    values = (values - centre) / scale
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, labels, values)
    several = counts[labels] > 1
    residuals = (values - (sums / np.maximum(counts, 1)[:, None])[labels])[several]
    root = np.linalg.cholesky(_covariance(residuals, SHRINKAGE))
    return lambda some: np.linalg.solve(root, ((some - centre) / scale).T).T.astype(np.float32)


def _covariance(residuals: Float64[np.ndarray, "n width"], shrinkage: float) -> Float64[np.ndarray, "width width"]:
    """Shrunk towards a multiple of the identity."""
    covariance = residuals.T @ residuals * ((1 - shrinkage) / len(residuals))
    return covariance + np.eye(len(covariance)) * (shrinkage * np.square(residuals).mean() + 1e-12)
