"""The real-to-real floor: the scores of real images against other real images, which no model can be expected to beat.

Every score depends on the number of images: a set of 64 images has a Frechet distance of its own. So a score is read
beside the score of as many real images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowdit.fields import FieldError
from flowdit.scores.feature_set import FeatureSet, rows_of
from flowdit.scores.metrics import METRICS, Score, check_metrics, score


class Floor(NamedTuple):
    """Scores of `count` real images against the others, by metric, and why others are missing."""

    scores: dict[str, Score]
    count: int
    missing: dict[str, str]


def floor(names: Sequence[str], reference: FeatureSet, count: int, seed: int = 0) -> Floor:
    """Score `count` random images of the reference against its others, or one half against the other.

    Halves are used if fewer than `count` images would be left. A reference whose features are not known, only their
    moments, has no floor.
    """
    has_logits = reference.logits is not None
    metrics = [METRICS[name] for name in names]
    names = [metric.name for metric in metrics if not metric.needs_text and (has_logits or not metric.needs_logits)]
    if reference.features is None:
        reason = "the reference has statistics only, no images"
        return Floor({}, 0, dict.fromkeys(names, reason))
    known = len(reference.features)
    used = count if 2 * count <= known else known // 2
    order = np.random.default_rng(seed).permutation(known)
    taken, others = rows_of(reference, np.sort(order[:used])), rows_of(reference, np.sort(order[used:]))
    missing: dict[str, str] = {}
    for name in names:
        try:
            check_metrics([name], used, known - used)
        except FieldError:
            missing[name] = f"it needs at least {METRICS[name].minimum} images, {used} are compared"
    scores = score([name for name in names if name not in missing], taken, others, seed)
    return Floor({found.metric: found for found in scores}, used, missing)
