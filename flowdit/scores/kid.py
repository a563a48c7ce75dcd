"""Kernel Inception distance (KID): the unbiased squared MMD with the kernel (x.y / width + 1)^3.

Source: Binkowski et al., "Demystifying MMD GANs" (arXiv:1801.01401). There, and in torch-fidelity, it is the mean over
random subsets of 1,000 images; here all pairs of images are used: the limit of ever more subsets, which has the
same expectation and needs no seed. The spread of overlapping subsets is not an error of their mean. The error here is
the jackknife's over images (Efron and Stein 1981), whose expected square is never too small: it is about 2^1/2 times
too large where both sets are of one distribution, and right where they are not.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64

from flowdit.scores.blocks import row_blocks

MIN_IMAGES = 10
"""Of both sets. The error of fewer is not worth printing."""


def kernel_distance(x: Float32[np.ndarray, "n width"], y: Float32[np.ndarray, "m width"]) -> tuple[float, float]:
    """The unbiased squared MMD of two sets of at least three features each, and its standard error.

    It can be negative where the sets hardly differ. Products are in float32, sums in float64.
    """
    n, m = len(x), len(y)
    within_x, within_y = _sums_within(x), _sums_within(y)
    across_x, across_y = _sums_across(x, y)
    parts = (within_x.sum() / n / (n - 1), within_y.sum() / m / (m - 1), across_x.sum() / n / m)
    value = parts[0] + parts[1] - 2 * parts[2]
    variance = _jackknife(within_x, across_x, m) + _jackknife(within_y, across_y, n)
    return float(value), float(np.sqrt(variance))


def _kernel(x: Float32[np.ndarray, "n width"], y: Float32[np.ndarray, "m width"]) -> Float32[np.ndarray, "n m"]:
    values = x @ y.T
    values /= np.float32(x.shape[1])
    values += np.float32(1)
    return values * values * values  # a power takes longer than the products


def _sums_across(
    x: Float32[np.ndarray, "n width"], y: Float32[np.ndarray, "m width"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " m"]]:
    """The sums of the kernel matrix over its columns and over its rows."""
    over_y = np.empty(len(x))
    over_x = np.zeros(len(y))
    for rows in row_blocks(len(x), len(y)):
        block = _kernel(x[rows], y)
        over_y[rows] = block.sum(axis=1, dtype=np.float64)
        over_x += block.sum(axis=0, dtype=np.float64)
    return over_y, over_x


def _sums_within(x: Float32[np.ndarray, "n width"]) -> Float64[np.ndarray, " n"]:
    """The sums over the rows of a set's own kernel matrix without its diagonal; each pair is computed once."""
    sums = np.zeros(len(x))
    for rows in row_blocks(len(x), len(x)):
        block = _kernel(x[rows], x[rows.start :])
        np.fill_diagonal(block, 0)
        sums[rows] += block.sum(axis=1, dtype=np.float64)
        sums[rows.stop :] += block[:, len(block) :].sum(axis=0, dtype=np.float64)
    return sums


def _jackknife(within: Float64[np.ndarray, " n"], across: Float64[np.ndarray, " n"], others: int) -> float:
    """The part of the variance that comes from one set: from the estimates without one of its n images."""
    n = len(within)
    without = (within.sum() - 2 * within) / (n - 1) / (n - 2) - 2 * (across.sum() - across) / (n - 1) / others
    return float(np.square(without - without.mean()).sum() * (n - 1) / n)
