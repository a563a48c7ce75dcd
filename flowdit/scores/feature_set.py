"""The features of a set of images, as one network gives them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from flowdit.scores.moments import Moments, moments_of


class FeatureSet(NamedTuple):
    """Moments, features and logits of a set of images.

    `features` is None if only the moments are known, and `logits` if the network has no classifier. A large reference
    keeps features and logits of a part of its images, while its moments are those of all.
    """

    moments: Moments
    features: Float32[np.ndarray, "n width"] | None = None
    logits: Float32[np.ndarray, "n classes"] | None = None


def feature_set(
    features: Float32[np.ndarray, "n width"], logits: Float32[np.ndarray, "n classes"] | None = None
) -> FeatureSet:
    """The set of images with these features, one row an image."""
    return FeatureSet(moments_of(features), features, logits)


def rows_of(whole: FeatureSet, rows: Int[np.ndarray, " rows"]) -> FeatureSet:
    """The set of the images in `rows` of a set whose features are known."""
    assert whole.features is not None
    return feature_set(whole.features[rows], None if whole.logits is None else whole.logits[rows])
