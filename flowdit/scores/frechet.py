"""Frechet distance between two sets of features, each taken as a Gaussian (FID, if the features are Inception's).

|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2): Dowson and Landau 1982; Heusel et al., arXiv:1706.08500.
"""

from __future__ import annotations

import numpy as np

from flowdit.scores.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet (Wasserstein-2) distance of two Gaussians, at least 0.

    The root is taken by symmetric eigendecompositions in float64, which exist for every covariance. With fewer images
    than features, the covariance has eigenvalues that are 0 but for rounding, and the roots of many of these would add
    up: it is reduced to its range first, that of the set with fewer images.
    """
    if (b.count or np.inf) < (a.count or np.inf):
        a, b = b, a
    values, vectors = np.linalg.eigh(a.covariance)
    in_range = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    half = vectors[:, in_range] * np.sqrt(values[in_range])  # C1 = half @ half.T
    product = np.linalg.eigvalsh(half.T @ b.covariance @ half)
    trace_of_root = np.sqrt(np.maximum(product, 0.0)).sum()
    distance = np.square(a.mean - b.mean).sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)
