"""The scores of sets of images against one reference: its features and floors are found once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flowdit.features.base import FeatureNetwork
from flowdit.fields import FieldError
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.floor import Floor, floor
from flowdit.scores.metrics import METRICS, Score, score
from flowdit.scores.prompts import Captioned, EncodeTexts, clip_score, following_of_real, prompt_following

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Score]]
"""Scores by feature network and metric; those of prompt following have the kind of word in their name."""
FOLLOWING = "prompt_following"
CLIP = "clip"
"""The network in whose space images are compared with texts."""


class Texts(NamedTuple):
    """What the scores of a text model need: captions of the reference images whose features are known, and the prompts.

    `kinds` are the kinds of word that prompt following can be counted by, with their words. `encode` is CLIP's text
    encoder, if CLIP is one of the feature networks, and `encoded` the features of the prompts.
    """

    captions: list[str] | None
    prompts: list[str]
    kinds: dict[str, tuple[str, ...]]
    encode: EncodeTexts | None = None
    encoded: Float[np.ndarray, "n width"] | None = None


class Judge(NamedTuple):
    """A reference in several feature spaces.

    `figures` are the names of the scores that it gives in each space, `reference` has the features of the reference, and
    `floors` the scores of real images for as many images as are judged. `seed` is that of the random subsets of scores.
    """

    figures: Mapping[str, list[str]]
    reference: Mapping[str, FeatureSet]
    floors: Mapping[str, Floor]
    seed: int
    texts: Texts | None = None

    def scores(self, images: Mapping[str, FeatureSet]) -> Scores:
        """The scores of a set of images, given by its features in every space."""
        found: Scores = {}
        for space, generated in images.items():
            plain = score(_plain(self.figures[space]), generated, self.reference[space], self.seed)
            found[space] = {s.metric: s for s in [*plain, *self._text_scores(space, generated)]}
        return found

    def _text_scores(self, space: str, generated: FeatureSet) -> list[Score]:
        texts, names = self.texts, self.figures[space]
        if texts is None:
            return []
        assert generated.features is not None
        encode = texts.encode if space == CLIP else None
        found: list[Score] = []
        if "clip_score" in names and texts.encoded is not None:
            found.append(clip_score(generated.features, texts.encoded))
        if any(name.startswith(FOLLOWING) for name in names):
            real = _captioned(self.reference[space], texts)
            words = prompt_following(Captioned(generated.features, texts.prompts), real, encode)
            found += [Score(f"{FOLLOWING}/{word.kind}", word.value, word.error) for word in words]
        return found


def find_figure(figures: Mapping[str, Sequence[str]], name: str) -> tuple[str, str]:
    """The first space that has the score `name`, and its full name. Raises `FieldError` "best" if none has."""
    for space, names in figures.items():
        for figure in names:
            if name in (figure, figure.partition("/")[0]):
                return space, figure
    known = dict.fromkeys(figure for names in figures.values() for figure in names)
    raise FieldError("best", f"must be one of {', '.join(known)}, got {name!r}")


def make_judge(
    figures: Mapping[str, list[str]],
    reference: Mapping[str, FeatureSet],
    num_images: int,
    seed: int = 0,
    texts: Texts | None = None,
) -> Judge:
    """A judge with the floors for `num_images` images."""
    floors = {space: floor(_plain(figures[space]), known, num_images, seed) for space, known in reference.items()}
    for space, known in reference.items():
        if texts is not None and texts.captions is not None and known.features is not None:
            floors[space].scores.update(_of_real(space, known, texts, figures[space]))
    return Judge(figures, reference, floors, seed, texts)


def figures_of(metrics: Sequence[str], network: FeatureNetwork, texts: Texts | None) -> list[str]:
    """The names of the scores in the space of a network: those of `metrics`, by kind of word for prompt following."""
    names: list[str] = []
    for name in metrics:
        if name == FOLLOWING:
            names += [f"{FOLLOWING}/{kind}" for kind in (texts.kinds if texts is not None else ())]
        elif name == "clip_score":
            names += [name] if network.name == CLIP else []
        elif network.num_classes or not METRICS[name].needs_logits:
            names.append(name)
    return names


def _plain(figures: Sequence[str]) -> list[str]:
    """Those that no text is needed for."""
    return [name for name in figures if name in METRICS and not METRICS[name].needs_text]


def _captioned(reference: FeatureSet, texts: Texts) -> Captioned:
    assert reference.features is not None and texts.captions is not None
    return Captioned(reference.features, texts.captions)


def _of_real(space: str, known: FeatureSet, texts: Texts, figures: Sequence[str]) -> dict[str, Score]:
    """The scores of the real images and their own captions."""
    real = _captioned(known, texts)
    encode = texts.encode if space == CLIP else None
    found: dict[str, Score] = {}
    if "clip_score" in figures and encode is not None:
        found["clip_score"] = clip_score(real.features, encode(real.captions))
    if any(name.startswith(FOLLOWING) for name in figures):
        for word in following_of_real(real, texts.kinds, encode):
            name = f"{FOLLOWING}/{word.kind}"
            found[name] = Score(name, word.value, word.error)
            logger.info("%s in %s: %d words, chance %.2f", name, space, len(word.words), word.chance)
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
            is_possible = texts is not None and bool(texts.encode if name == "clip_score" else texts.kinds)
        else:
            is_possible = has_logits or not metric.needs_logits
        if is_possible and min(counts) >= metric.minimum:
            names.append(name)
    return names
