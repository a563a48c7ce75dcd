"""Preparing a folder of latent shards and their manifest from images; can be interrupted and run again.

A first pass looks at all images, then it is decided which are used (`preparation.selection`), and a second pass encodes
them. Both work on the units of the source, each of which is done whole or not at all; `dataset.json` is written at the
end. The result does not depend on interruptions, so the manifest's id is that of an uninterrupted run (ArrayRecord files
of identical records are identical).
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from flowdit.data import manifest as manifests
from flowdit.data.feature_maps import Images, write_features
from flowdit.data.manifest import Bucket, Manifest
from flowdit.data.plan import PLAN_NAME, check_claim, claim_folder, keep_former_id, read_plan
from flowdit.data.preparation.buckets import make_buckets
from flowdit.data.preparation.config import PrepareConfig, plan_settings
from flowdit.data.preparation.encode_unit import vae_by_name
from flowdit.data.preparation.engines import Engine, open_engine
from flowdit.data.preparation.filters import FilterConfig
from flowdit.data.preparation.finish import finish, remove_leftovers
from flowdit.data.preparation.passes import Task, check_images, encode, scan
from flowdit.data.preparation.selection import select
from flowdit.data.rejected import FILE_NAME, count_rejected
from flowdit.data.sources import SOURCES, open_images
from flowdit.data.sources.base import Source
from flowdit.data.text_features import write_cache
from flowdit.features import FeatureNetwork, load_features
from flowdit.fields import require, under
from flowdit.hashing import sha256
from flowdit.models.text_encoder import TextConfig, TextEncoder, load_text_encoder
from flowdit.models.vae import AutoencoderKL

__all__ = ["FilterConfig", "PrepareConfig", "prepare"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of `prepare.json` and the shards. In format 1 a record had no key, and the first pass did not exist."""


def prepare(config: PrepareConfig) -> Manifest:
    """Encode the images of `config.source` and write the data set, its text features and its feature maps, or continue an
    interrupted run.

    Raises `ValueError` with one line for invalid settings, too many unreadable images, a folder with a data set of other
    images or settings (which is not changed), and a folder that cannot be written.
    """
    config.check()
    config = config.with_vae()
    with open_engine(config.engine, config.ray) as engine:  # before any work, as its machines may not be there
        return _prepare(config, engine)


def _prepare(config: PrepareConfig, engine: Engine) -> Manifest:
    source = open_images(config, config.filter.columns)
    if config.text_encoder and not source.has_captions:
        raise ValueError(f"text_encoder: {config.source} has no captions to encode, got {config.text_encoder!r}")
    units = tuple(source.units())
    vae = vae_by_name(config.vae)
    buckets = _sizes(config, vae)
    # Before the latents, which may take hours, so that errors are found first. It keeps its memory (5 GB for T5Gemma).
    encoder = _load_text_encoder(config) if config.text_encoder else None
    network = load_features(config.features, config.weights) if config.features else None
    out = Path(config.out or f"data/{source.name}")
    _check_outside_source(out, config)
    plan = _plan(config, source, vae)
    identity = sha256(json.dumps(plan, sort_keys=True))
    task = Task(config=config, source=source, units=units, vae=vae, out=out, identity=identity)
    try:
        manifest = _prepare_latents(task, plan, buckets, engine)
    except OSError as error:
        raise ValueError(f"out: cannot write to {out}: {error.strerror or error}") from None
    if encoder is not None:
        _prepare_text(config, out, manifest, encoder, engine)
    if network is not None:
        _prepare_maps(task, manifest, network, engine)
    return manifest


def _sizes(config: PrepareConfig, vae: AutoencoderKL) -> tuple[Bucket, ...]:
    """The buckets of the settings. Raises `FieldError` if sizes do not fit the VAE."""
    stride = vae.config.stride
    rule = f"must be a multiple of the VAE's stride {stride}"
    require("image_size", config.image_size, config.image_size % stride == 0, rule)
    return make_buckets(config.buckets, config.image_size, stride, config.bucket_multiple, config.bucket_ratios)


def _check_outside_source(out: Path, config: PrepareConfig) -> None:
    """Raise `ValueError` if the data set, and so the sheet of the VAE check, would be among the images."""
    name, _, path = config.source.partition(":")
    if name in SOURCES and not path:  # the embedded images
        return
    source = Path(path if name in SOURCES else config.source).expanduser().resolve()
    folder = out.resolve()
    if source.is_dir() and folder.is_relative_to(source) and not (out / PLAN_NAME).exists():
        raise ValueError(f"out: must be outside the source {config.source}, got {out}")


def _prepare_text(config: PrepareConfig, out: Path, manifest: Manifest, encoder: TextEncoder, engine: Engine) -> None:
    folder = Path(config.text_cache or out / "text_features")
    try:
        # In this process the encoder that is loaded already; in others each its own.
        make = (lambda: encoder) if config.engine == "loop" else functools.partial(_load_text_encoder, config)
        write_cache(folder, out, manifest, encoder, engine, make)
    except OSError as error:
        raise ValueError(f"text_cache: cannot write to {folder}: {error.strerror or error}") from None


def _prepare_maps(task: Task, manifest: Manifest, network: FeatureNetwork, engine: Engine) -> None:
    config = task.config
    folder = Path(config.feature_cache or task.out / f"{config.features}_features")
    images = Images(epath.Path(task.out), manifest, task.source, config.max_pixels, config.batch_size)
    try:
        make = functools.partial(load_features, config.features, config.weights)
        write_features(folder, images, network, engine, (lambda: network) if config.engine == "loop" else make)
    except OSError as error:
        raise ValueError(f"feature_cache: cannot write to {folder}: {error.strerror or error}") from None


def _load_text_encoder(config: PrepareConfig) -> TextEncoder:
    text = TextConfig(encoder=config.text_encoder, max_length=config.text_max_length, dtype=config.text_dtype)
    with under("text_"):
        return load_text_encoder(text)


def _prepare_latents(task: Task, plan: Mapping[str, Any], buckets: tuple[Bucket, ...], engine: Engine) -> Manifest:
    terms = _claim(task, plan)
    if (task.out / manifests.FILE_NAME).exists():
        return _finished(task)
    if task.source.listing is not None:
        task.source.listing.write(epath.Path(task.out), task.source.key)
    scans = scan(task, engine)
    selection = select(scans, task.config.filter, buckets, task.config.min_bucket_records)
    selection.check(task.config.held_out_fraction)
    if selection.left_out:
        logger.info(
            "%d of %d images are used: %s", sum(selection.counts), selection.num_images, selection.left_out_by_filters
        )
    check_images(task, selection, scans.units)
    # Meanwhile there were no shards, so that a run with other settings could claim the folder.
    check_claim("out", epath.Path(task.out), plan)
    encode(task, selection, scans.units, engine)
    return finish(task, selection, scans.units, terms)


def _claim(task: Task, plan: Mapping[str, Any]) -> dict[str, str]:
    """Claim the folder; licence and attribution: those given, or else of an earlier run into it, or of the source."""
    out, source = epath.Path(task.out), task.source

    def explain(name: str, stored: Any) -> str | None:
        if name == "captions":
            kinds = {stored is None: "without captions", not source.has_captions: "with captions"}
            return f"was prepared {kinds.get(True, 'with other captions')}"
        if name != "pictures":
            return None
        changes = None if source.listing is None else source.listing.changes(out, stored)
        return f"was prepared from other images{f': {changes}' if changes else ''}"

    given = {name: getattr(task.config, name) or None for name in manifests.TERMS}
    wanted = _comparable(out, plan)
    stored = claim_folder("out", out, wanted, manifests.FILE_NAME, notes=given, explain=explain)
    return {name: stored.get(name) or getattr(source, name) for name in manifests.TERMS}


def _plan(config: PrepareConfig, source: Source, vae: AutoencoderKL) -> dict[str, Any]:
    """Everything that the data set depends on, which must be equal for two runs into one folder."""
    captions = getattr(source, "captions_key", None)
    identity = {"pictures": source.key, "captions": captions, "vae_fingerprint": vae.fingerprint}
    return {"format": FORMAT} | plan_settings(config) | identity


def _comparable(out: epath.Path, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of `plan` that the folder's own must be equal to: of a data set of format 1 what there was then.

    Raises `ValueError` for one that was begun in format 1 and is not finished.
    """
    stored = read_plan("out", out) if out.is_dir() else None
    if stored is None or "format" in stored:
        return plan
    if (out / manifests.FILE_NAME).exists():
        new = {name: value for name, value in plan_settings(PrepareConfig()).items() if name not in stored}
        return {name: value for name, value in plan.items() if name != "format" and new.get(name, ...) != value}
    if any(".array_record" in path.name for path in out.iterdir()):
        raise ValueError(f"out: {out} was begun by an earlier version, which must finish it: give another folder")
    return plan


def _finished(task: Task) -> Manifest:
    """The manifest of the finished data set, with the licence and attribution of the settings if they have any."""
    out = epath.Path(task.out)
    manifest = Manifest.read(out)
    manifests.verify(out, manifest)
    remove_leftovers(task.out, task.units, manifest)
    terms = {name: getattr(task.config, name) or getattr(manifest, name) for name in manifests.TERMS}
    corrected = dataclasses.replace(manifest, **terms)
    rejected = f"; {count} unreadable images were left out: see {FILE_NAME}" if (count := count_rejected(out)) else ""
    logger.info("%s is already prepared from these images with these settings: nothing to encode%s", out, rejected)
    if corrected != manifest:
        keep_former_id(out, manifest.ids[1])
        corrected.write(out)
        for name, value in terms.items():
            if value != (old := getattr(manifest, name)):
                logger.info("%s: %s %r is now %r", out / manifests.FILE_NAME, name, old, value)
    return corrected
