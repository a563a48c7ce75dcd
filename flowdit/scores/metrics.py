"""The scores by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowdit.fields import FieldError, require, require_choice
from flowdit.scores import inception_score as inception
from flowdit.scores import kid, neighbours
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.frechet import frechet_distance


class Metric(NamedTuple):
    """A score: its direction, and what it needs.

    `minimum` is the number of images that it needs of each set. With `needs_features`, the features of reference images
    have to be known, not only their moments. `needs_logits`: of a network with a classifier. `needs_text`: of a model
    that draws from prompts.
    """

    name: str
    title: str
    higher_is_better: bool
    minimum: int
    needs_reference: bool = True
    needs_features: bool = True
    needs_logits: bool = False
    needs_text: bool = False


class Score(NamedTuple):
    """The value of a metric, and its standard error where one is known."""

    metric: str
    value: float
    error: float | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fd", "Frechet distance", False, minimum=2, needs_features=False),
        Metric("kid", "KID", False, minimum=kid.MIN_IMAGES),
        Metric("precision", "Precision", True, minimum=neighbours.MIN_IMAGES),
        Metric("recall", "Recall", True, minimum=neighbours.MIN_IMAGES),
        Metric("density", "Density", True, minimum=neighbours.MIN_IMAGES),
        Metric("coverage", "Coverage", True, minimum=neighbours.MIN_IMAGES),
        Metric(
            "inception_score",
            "Inception score",
            True,
            minimum=inception.MIN_IMAGES,
            needs_reference=False,
            needs_logits=True,
        ),
        Metric("clip_score", "CLIP score", True, minimum=2, needs_reference=False, needs_text=True),
        Metric("prompt_following", "Prompt following", True, minimum=10, needs_text=True),
    )
}


def metric_of(figure: str) -> Metric:
    """The metric of a figure; `prompt_following/colour` is that of one kind of word."""
    return METRICS[figure.partition("/")[0]]


def direction(figure: str) -> str:
    """ "max" if higher values of a figure are better, else "min"."""
    return "max" if metric_of(figure).higher_is_better else "min"


def check_metrics(
    names: Sequence[str],
    num_images: int,
    num_reference: int | None,
    *,
    has_logits: bool = True,
    has_text: bool = False,
) -> None:
    """Raise `FieldError` for the first of the metrics `names` that cannot be computed.

    Args:
        names: different names in `METRICS`.
        num_images: of generated images.
        num_reference: of reference images; None: only statistics of them are known.
        has_logits: whether one of the feature networks has a classifier.
        has_text: whether the model draws from prompts.
    """
    require("metrics", list(names), len(names) > 0, f"must be one or more of {', '.join(METRICS)}")
    require("metrics", list(names), len(set(names)) == len(names), "must be different names")
    for name in names:
        require_choice("metrics", name, METRICS)
        metric = METRICS[name]
        if metric.needs_text and not has_text:
            raise FieldError("metrics", f"{name} must be of a model that draws from prompts, this one does not")
        if metric.needs_logits and not has_logits:
            rule = f"{name} must have a feature network with a classifier, such as inception or efficientnet"
            raise FieldError("metrics", f"{rule}; none of features has one")
        if metric.needs_features and metric.needs_reference and num_reference is None:
            rule = f"{name} must have a reference with images; with the statistics of a .npz file there is only fd"
            raise FieldError("metrics", rule)
        rule = f"must be at least {metric.minimum} for {name}"
        require("num_images", num_images, num_images >= metric.minimum, rule)
        if metric.needs_reference and num_reference is not None:
            rule = f"must have at least {metric.minimum} images for {name}"
            require("reference", num_reference, num_reference >= metric.minimum, rule)


def score(names: Sequence[str], generated: FeatureSet, reference: FeatureSet, seed: int = 0) -> list[Score]:
    """The scores `names` of generated images, in this order, without those of texts and those of missing logits.

    `check_metrics` has allowed them: the generated images have features, and the reference has what they need.
    """
    found: list[Score] = []
    shares: dict[str, float] = {}
    for name in names:
        metric = METRICS[name]
        if metric.needs_text or (metric.needs_logits and generated.logits is None):
            continue
        if name == "fd":
            found.append(Score(name, frechet_distance(generated.moments, reference.moments)))
        elif name == "inception_score":
            found.append(Score(name, *inception.inception_score(_known(generated.logits), seed)))
        elif name == "kid":
            found.append(Score(name, *kid.kernel_distance(_known(reference.features), _known(generated.features))))
        else:
            shares = shares or neighbours.neighbour_scores(_known(reference.features), _known(generated.features))
            found.append(Score(name, shares[name]))
    return found


def _known(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values
