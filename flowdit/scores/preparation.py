"""What an evaluation needs before the first image is drawn; every mistake of the user is found here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from flowdit.conditioning.base import check_request_args
from flowdit.data.manifest import FILE_NAME
from flowdit.features import load_features
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.config import FeatureWeights
from flowdit.fields import FieldError, require
from flowdit.inference.images import make_decoder
from flowdit.inference.sampler import Sampler
from flowdit.scores.conditions import DATA, Asked, ask_for_classes, ask_for_prompts
from flowdit.scores.config import EvaluateConfig
from flowdit.scores.evaluation import Evaluation, LoadModel
from flowdit.scores.extraction import Extraction
from flowdit.scores.feature_cache import check_statistics, kept_rows, reference_features
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.judge import Texts, make_judge, possible_metrics
from flowdit.scores.metrics import check_metrics
from flowdit.scores.prompts import EncodeTexts
from flowdit.scores.references import Images, Reference, open_reference
from flowdit.sharding import make_local_mesh

REFERENCE_BATCH = 32
"""Reference images whose features are extracted at once."""


def prepare(config: EvaluateConfig, load_model: LoadModel) -> Evaluation:
    """Load the model of the first point, the feature networks and the reference, and check all settings.

    Raises `ValueError` naming the first invalid setting.
    """
    points = config.points()
    sampler = load_model(points[0].ema_width)
    for point in points:
        sampler.sampler_config(point.sampler)
    _ = sampler.vae  # its errors come before any work
    networks, encode = load_networks(config.features, config.weights)
    reference = find_reference(config, sampler)
    asked = ask(config, sampler, reference)
    texts = None if asked.prompts is None else _texts(reference, asked, encode)
    count = None if reference.images is None else reference.count
    metrics = config.metrics or possible_metrics(networks, config.num_images, count, texts)
    has_logits = any(network.num_classes for network in networks)
    check_metrics(metrics, config.num_images, count, has_logits=has_logits, has_text=texts is not None)
    _check_texts(metrics, texts)
    require("best", config.best, config.best is None or config.best in metrics, f"must be one of {', '.join(metrics)}")
    known = features_of(reference, networks, cache_folder(config.cache))
    judge = make_judge(metrics, known, config.num_images, config.seed, texts)
    return Evaluation(
        config=config,
        load_model=load_model,
        sampler=sampler,
        reference=reference,
        networks=networks,
        judge=judge,
        asked=asked,
    )


def load_networks(names: Sequence[str], weights: FeatureWeights) -> tuple[list[FeatureNetwork], EncodeTexts | None]:
    """The feature networks, and CLIP's text encoder if CLIP is one of them."""
    return [load_features(name, weights) for name in names], None


def find_reference(config: EvaluateConfig, sampler: Sampler) -> Reference:
    """The reference of the settings; `data` is the data set of the run. Raises `FieldError`."""
    name, manifest = config.reference, sampler.trained.manifest
    if name == DATA:
        name = sampler.trained.config.data.path
        is_there = name not in ("", "???") and (Path(name) / FILE_NAME).is_file()
        rule = "data is the data set of the run, which is not there: give its new place, or other images"
        require("reference", name, is_there or "://" in name, rule)
    channels = manifest.latent_shape[0]
    decode = make_decoder(sampler.vae, (0.0,) * channels, (1.0,) * channels, make_local_mesh())
    split, resize = config.reference_split, config.reference_resize
    return open_reference(name, manifest, decode, split=split, resize=resize)


def ask(config: EvaluateConfig, sampler: Sampler, reference: Reference) -> Asked:
    """What the images show. Raises `FieldError` for settings that the model does not take."""
    conditioning = sampler.trained.conditioning
    count, prompts = config.num_images, config.given_prompts()
    takes = conditioning.request_args
    chosen = {"labels": config.labels, "prompts": prompts}
    given = {name: value for name, value in chosen.items() if value != DATA}
    check_request_args(conditioning, given | {"negative_prompt": config.negative_prompt})
    if "labels" in takes:
        classes = sampler.trained.manifest.num_classes
        counted = lambda: count_labels(reference, classes)
        return ask_for_classes(conditioning.requests, config.labels, count, classes, config.seed, counted)
    if "prompts" in takes:
        captions = reference.captions() if reference.captions is not None and prompts == DATA else None
        return ask_for_prompts(conditioning.requests, prompts, config.negative_prompt, count, config.seed, captions)
    return Asked(conditioning.requests(count), "no condition", "none")


def count_labels(reference: Reference, num_classes: int) -> Int[np.ndarray, " classes"]:
    """How many images of each class the reference has. Raises `FieldError` if it has no such classes."""
    advice = "labels=balanced, or classes, need none"
    if reference.labels is None:
        raise FieldError("labels", f"data are the classes of the reference, which has none; {advice}")
    counts = np.bincount(reference.labels(), minlength=num_classes)
    rule = f"data are the classes of the reference, which must be the model's {num_classes}; {advice}"
    require("labels", len(counts), len(counts) == num_classes, rule)
    return counts


def _texts(reference: Reference, asked: Asked, encode: EncodeTexts | None) -> Texts:
    assert asked.prompts is not None
    captions = None
    if reference.captions is not None and reference.images is not None:
        every = reference.captions()
        captions = [every[row] for row in kept_rows(len(every))]
    return Texts(captions, asked.prompts, encode)


def _check_texts(metrics: Sequence[str], texts: Texts | None) -> None:
    if texts is None:
        return
    if "clip_score" in metrics and texts.encode is None:
        raise FieldError("metrics", "clip_score needs CLIP among the features (features=clip weights.clip=...)")
    if "prompt_following" in metrics and texts.captions is None:
        raise FieldError("metrics", "prompt_following needs a reference of images with captions")


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
