"""Inception score: exp(E KL(p(class | image) || p(class))). Source: Salimans et al., arXiv:1606.03498."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

SPLITS = 10
MIN_IMAGES = 10 * SPLITS


def inception_score(logits: Float32[np.ndarray, "n classes"], seed: int = 0) -> tuple[float, float]:
    """The mean score of ten disjoint splits of at least `MIN_IMAGES` images, and the standard error of this mean.

    The images are shuffled, as those of one class may follow each other. Papers print the standard deviation of the
    splits, which is 10^1/2 times the standard error. A split of fewer images has a lower score.
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = [_score(logits[rows].astype(np.float64)) for rows in np.array_split(order, SPLITS)]
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / np.sqrt(SPLITS))


def _score(logits: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - np.log(p.mean(axis=0))), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))
