"""The scores of sets of images against one reference: its features and floors are found once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowdit.features.base import FeatureNetwork
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.floor import Floor, floor
from flowdit.scores.metrics import METRICS, Score, score
from flowdit.scores.prompts import Captioned, EncodeTexts, clip_score, prompt_following

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Score]]
"""Scores by feature network and metric; those of prompt following have the kind of word in their name."""
FOLLOWING = "prompt_following"
CLIP = "clip"
"""The network in whose space images are compared with texts."""


class Texts(NamedTuple):
    """What the scores of a text model need: captions of the reference images whose features are known, and the prompts.

    `encode` is CLIP's text encoder, if CLIP is one of the feature networks.
    """

    captions: list[str] | None
    prompts: list[str]
    encode: EncodeTexts | None


class Judge(NamedTuple):
    """A reference in several feature spaces.

    `reference` has its features by network, and `floors` the scores of real images for as many images as are judged.
    `seed` is that of the random subsets of scores.
    """

    metrics: list[str]
    reference: Mapping[str, FeatureSet]
    floors: Mapping[str, Floor]
    seed: int
    texts: Texts | None = None

    def scores(self, images: Mapping[str, FeatureSet]) -> Scores:
        """The scores of a set of images, given by its features in every space."""
        found: Scores = {}
        for name, generated in images.items():
            reference = self.reference[name]
            known = {s.metric: s for s in score(self.metrics, generated, reference, self.seed)}
            if self.texts is not None:
                known |= _text_scores(self.metrics, name, generated, self.texts.prompts, reference, self.texts)
            found[name] = known
        return found


def make_judge(
    metrics: Sequence[str],
    reference: Mapping[str, FeatureSet],
    num_images: int,
    seed: int = 0,
    texts: Texts | None = None,
) -> Judge:
    """A judge with the floors for `num_images` images."""
    floors = {}
    for name, known in reference.items():
        floors[name] = floor(metrics, known, num_images, seed)
        if texts is not None and texts.captions is not None:
            floors[name].scores.update(_text_scores(metrics, name, known, texts.captions, known, texts, of_real=True))
    return Judge(list(metrics), reference, floors, seed, texts)


def _text_scores(
    metrics: Sequence[str],
    network: str,
    images: FeatureSet,
    prompts: Sequence[str],
    reference: FeatureSet,
    texts: Texts,
    of_real: bool = False,
) -> dict[str, Score]:
    """The scores of images and their prompts; `of_real`: those of the reference and its captions, to compare with."""
    found: dict[str, Score] = {}
    assert images.features is not None
    encode = texts.encode if network == CLIP else None
    if "clip_score" in metrics and encode is not None:
        found["clip_score"] = clip_score(images.features, encode(prompts))
    if FOLLOWING in metrics and texts.captions is not None and reference.features is not None:
        real = Captioned(reference.features, texts.captions)
        words, missing = prompt_following(Captioned(images.features, prompts), real, encode)
        for kind, reason in missing.items() if of_real else ():
            logger.info("%s/%s is left out in the space of %s: %s", FOLLOWING, kind, network, reason)
        for word in words:
            name, value = f"{FOLLOWING}/{word.kind}", word.ceiling if of_real else word.value
            found[name] = Score(name, value, None if of_real else word.error)
    return found


def possible_metrics(
    networks: Sequence[FeatureNetwork], num_images: int, num_reference: int | None, texts: Texts | None
) -> list[str]:
    """The metrics that the networks, the reference (None: statistics only) and the counts allow."""
    names = []
    for name, metric in METRICS.items():
        has_logits = any(network.num_classes for network in networks)
        counts = [num_images] + ([num_reference or 0] if metric.needs_reference and metric.needs_features else [])
        if metric.needs_text:
            is_possible = texts is not None and (texts.encode if name == "clip_score" else texts.captions) is not None
        else:
            is_possible = has_logits or not metric.needs_logits
        if is_possible and min(counts) >= metric.minimum:
            names.append(name)
    return names
