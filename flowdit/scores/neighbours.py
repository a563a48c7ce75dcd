"""Scores by nearest neighbours: improved precision and recall, density and coverage.

A set's manifold is the union of balls around its features, which reach to the k-th nearest neighbour in the set.
Precision is the share of generated images in the manifold of the real ones, recall the share of real images in that of
the generated ones (Kynkaanniemi et al., arXiv:1904.06991, k = 3). Density is the mean number of real balls around a
generated image, divided by k, and coverage the share of real balls with a generated image in them (Naeem et al.,
arXiv:2002.09797, k = 5).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from flowdit.scores.blocks import row_blocks

K_MANIFOLD = 3
"""Neighbours for precision and recall."""
K_DENSITY = 5
"""Neighbours for density and coverage."""
MIN_IMAGES = K_DENSITY + 1
"""Of both sets."""


def neighbour_scores(
    reference: Float32[np.ndarray, "n width"], generated: Float32[np.ndarray, "m width"]
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of two sets of at least `MIN_IMAGES` images each.

    Distances are in float32, of features around their mean, a block of rows at a time.
    """
    centre = reference.mean(axis=0)
    real, fake = reference - centre, generated - centre
    real_radii, fake_radii = _radii(real), _radii(fake)
    in_manifold = np.zeros(len(fake), bool)
    balls = np.zeros(len(fake), np.int64)
    recalled = 0
    covered = 0
    for rows in row_blocks(len(real), len(fake)):
        distances = _squared_distances(real[rows], fake)
        in_manifold |= (distances <= real_radii[rows, :1]).any(axis=0)
        inside = distances <= real_radii[rows, 1:]
        balls += inside.sum(axis=0)
        covered += int(inside.any(axis=1).sum())
        recalled += int((distances <= fake_radii[:, 0]).any(axis=1).sum())
    return {
        "precision": float(in_manifold.mean()),
        "recall": recalled / len(real),
        "density": float(balls.mean() / K_DENSITY),
        "coverage": covered / len(real),
    }


def _squared_distances(x: Float32[np.ndarray, "n width"], y: Float32[np.ndarray, "m width"]) -> np.ndarray:
    distances = x @ y.T
    distances *= -2
    distances += np.square(x).sum(axis=1)[:, None]
    distances += np.square(y).sum(axis=1)
    return np.maximum(distances, 0, out=distances)


def _radii(features: Float32[np.ndarray, "n width"]) -> Float32[np.ndarray, "n 2"]:
    """The squared distances to the third and to the fifth nearest neighbour, without the image itself."""
    radii = np.empty((len(features), 2), np.float32)
    for rows in row_blocks(len(features), len(features)):
        distances = _squared_distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        nearest = np.partition(distances, (K_MANIFOLD - 1, K_DENSITY - 1), axis=1)
        radii[rows] = nearest[:, [K_MANIFOLD - 1, K_DENSITY - 1]]
    return radii
