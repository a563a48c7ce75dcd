"""What generated images are compared with, made before the first is drawn; mistakes of the user are found here."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from flowdit.conditioning import Conditioning
from flowdit.conditioning.base import check_request_args
from flowdit.data.loader import DataConfig
from flowdit.data.manifest import FILE_NAME, Manifest
from flowdit.features import load_features
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.clip import load_clip
from flowdit.fields import FieldError, listed, require
from flowdit.inference.images import make_decoder
from flowdit.models.vae import AutoencoderKL
from flowdit.score_config import ScoringConfig
from flowdit.scores.conditions import DATA, Asked, ask_for_classes, ask_for_prompts
from flowdit.scores.extraction import Extraction
from flowdit.scores.feature_cache import check_statistics, kept_rows, reference_features
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.judge import CLIP, Judge, Texts, figures_of, find_figure, make_judge, possible_metrics
from flowdit.scores.metrics import check_metrics
from flowdit.scores.prompts import EncodeTexts, possible_kinds
from flowdit.scores.references import Images, Reference, open_reference
from flowdit.sharding import make_local_mesh

logger = logging.getLogger(__name__)

REFERENCE_BATCH = 32
"""Reference images whose features are extracted at once."""


class Wanted(NamedTuple):
    """What the images show, as in the settings of `flowdit.evaluate`."""

    labels: Any = DATA
    prompts: Any = DATA
    negative_prompt: str = ""


class Subject(NamedTuple):
    """The model whose images are scored: its data, conditioning and VAE. `data` are the settings of its run's data."""

    manifest: Manifest
    conditioning: Conditioning
    vae: AutoencoderKL
    data: DataConfig


class Comparison(NamedTuple):
    """Images that are asked for, and the real ones that they are compared with in the spaces of some networks."""

    asked: Asked
    reference: Reference
    networks: list[FeatureNetwork]
    judge: Judge


def compare(
    config: ScoringConfig, subject: Subject, seed: int, wanted: Wanted | None = None, best: str | None = None
) -> Comparison:
    """Open the reference, load the feature networks, and check that the metrics, and `best` among them, can be computed.

    Raises `ValueError` naming the first invalid setting.
    """
    has_text = "prompts" in subject.conditioning.request_args
    clip = load_clip(config.weights) if has_text and CLIP in config.features else None
    networks = [
        clip.image if clip is not None and name == CLIP else load_features(name, config.weights)
        for name in config.features
    ]
    reference = find_reference(config, subject)
    asked = ask(subject, reference, config.num_images, seed, wanted or Wanted())
    texts = (
        None if asked.prompts is None else _texts(reference, asked.prompts, None if clip is None else clip.encode_texts)
    )
    count = None if reference.images is None else reference.count
    metrics = (
        config.metrics if config.metrics is not None else possible_metrics(networks, config.num_images, count, texts)
    )
    has_logits = any(network.num_classes for network in networks)
    check_metrics(metrics, config.num_images, count, has_logits=has_logits, has_text=has_text)
    _check_texts(metrics, texts)
    figures = {network.name: figures_of(metrics, network, texts) for network in networks}
    if best is not None:
        find_figure(figures, best)
    known = features_of(reference, networks, cache_folder(config.cache))
    judge = make_judge(figures, known, config.num_images, seed, texts)
    return Comparison(asked, reference, networks, judge)


def find_reference(config: ScoringConfig, subject: Subject) -> Reference:
    """The reference of the settings; `data` is the data set of the run. Raises `FieldError`."""
    name, channels = config.reference, subject.manifest.latent_shape[0]
    if name == DATA:
        name, *others = (folder.path for folder in subject.data.folders)
        if others:
            logger.warning("reference: data is %s alone, without %s of data.mix", name, listed(others))
        is_there = "://" in name or (Path(name) / FILE_NAME).is_file()
        rule = "data is the data set of the run, which is not there: give its new place, or other images"
        require("reference", name, is_there, rule)
    decode = make_decoder(subject.vae, (0.0,) * channels, (1.0,) * channels, make_local_mesh())
    options = {"split": config.reference_split, "resize": config.reference_resize, "where": config.where}
    return open_reference(name, subject.manifest, decode, **options)


def ask(subject: Subject, reference: Reference, count: int, seed: int, wanted: Wanted) -> Asked:
    """What `count` images show. Raises `FieldError` for settings that the model does not take."""
    conditioning, takes = subject.conditioning, subject.conditioning.request_args
    given = {name: value for name, value in wanted._asdict().items() if value != DATA}
    check_request_args(conditioning, given)
    if "labels" in takes:
        classes = subject.manifest.class_names
        counted = lambda: count_labels(reference, classes)
        return ask_for_classes(conditioning.requests, wanted.labels, count, len(classes), seed, counted)
    if "prompts" in takes:
        captions = None if reference.captions is None or wanted.prompts != DATA else reference.captions()
        return ask_for_prompts(conditioning.requests, wanted.prompts, wanted.negative_prompt, count, seed, captions)
    return Asked(conditioning.requests(count), "no condition", "none")


def count_labels(reference: Reference, class_names: Sequence[str]) -> Int[np.ndarray, " classes"]:
    """How many images of each of the model's classes the reference has, by their names.

    Raises `FieldError` if it has no classes, or others.
    """
    advice = "labels=balanced, or classes, need none"
    if reference.labels is None:
        raise FieldError("labels", f"data are the classes of the reference, which has none; {advice}")
    others = [name for name in reference.class_names if name not in class_names]
    rule = f"data are the classes of the reference, which must be among the model's; {advice}"
    require("labels", listed(others), not others, rule)
    numbers = np.asarray([list(class_names).index(name) for name in reference.class_names], np.int64)
    return np.bincount(numbers[reference.labels()], minlength=len(class_names))


def _texts(reference: Reference, prompts: list[str], encode: EncodeTexts | None) -> Texts:
    encoded = None if encode is None else encode(prompts)
    if reference.captions is None or reference.images is None:
        return Texts(None, prompts, {}, encode, encoded)
    every = reference.captions()
    captions = [every[row] for row in kept_rows(len(every))]
    kinds, missing = possible_kinds(prompts, captions)
    for kind, reason in missing.items():
        logger.info("prompt_following/%s is left out: %s", kind, reason)
    return Texts(captions, prompts, kinds, encode, encoded)


def _check_texts(metrics: Sequence[str], texts: Texts | None) -> None:
    if texts is None:
        return
    if "clip_score" in metrics and texts.encode is None:
        raise FieldError("metrics", "clip_score needs CLIP among the features (features=clip weights.clip=...)")
    if "prompt_following" in metrics and not texts.kinds:
        rule = "prompt_following needs a reference of images with captions, and prompts with their words"
        raise FieldError("metrics", rule)


def features_of(reference: Reference, networks: Sequence[FeatureNetwork], cache: Path) -> dict[str, FeatureSet]:
    """The features of the reference in every space, from the cache where they are there."""
    for network in networks:
        check_statistics(reference, network)
    return {network.name: _features_in(reference, network, cache) for network in networks}


def _features_in(reference: Reference, network: FeatureNetwork, cache: Path) -> FeatureSet:
    extraction = Extraction([network], make_local_mesh())  # each process for itself

    def extract(images: Images) -> Extracted:
        return extraction.of_images(images, REFERENCE_BATCH)[network.name]

    return reference_features(reference, network, extract, cache, REFERENCE_BATCH)


def cache_folder(given: str | None) -> Path:
    """The folder for features of references."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(given) if given else cache / "flowdit" / "features"
