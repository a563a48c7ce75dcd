"""Preparing a folder of latent shards and their manifest from images; can be interrupted and run again.

Shards are the unit of work: each is encoded separately, and a later run skips the finished ones; `dataset.json` is
written at the end. The result does not depend on interruptions, so the manifest's id is that of an uninterrupted run
(ArrayRecord files of identical records are identical).
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int

from flowdit.data import manifest as manifests
from flowdit.data.encode_images import encoded_records, latent_encoder
from flowdit.data.images import ImageSet, load_images
from flowdit.data.manifest import Manifest, Shard, Split, VaeInfo
from flowdit.data.plan import PLAN_NAME, check_claim, claim_folder, keep_former_id
from flowdit.data.progress import ProgressBar, progress_bar
from flowdit.data.rejected import FILE_NAME, Rejected, RejectedImages, count_rejected
from flowdit.data.shards import (
    channel_statistics,
    finished_sidecar,
    read_sidecar,
    remove_sidecar,
    write_shard,
)
from flowdit.data.text_features import write_cache
from flowdit.data.vae_check import check_vae
from flowdit.fields import FREE_TEXT, require, require_choice, under
from flowdit.models.text_encoder import DTYPES as TEXT_DTYPES
from flowdit.models.text_encoder import TextConfig, TextEncoder, load_text_encoder
from flowdit.models.vae import AutoencoderKL, load_vae
from flowdit.storage import require_local

logger = logging.getLogger(__name__)


@dataclass
class PrepareConfig:
    """Settings of `python -m flowdit.prepare`.

    Attributes:
        source: `openmoji`, `<name>:<path>` of a registered source, or a folder of images with one sub-folder per class.
            Without sub-folders there are no labels: such a data set is for stage 2 if it has captions, otherwise for
            unconditional models.
        captions: JSON Lines file with `file` (path of an image within `source`), `short_caption` and optionally
            `long_caption`;
            empty: none (OpenMoji has its own).
        out: folder of the data set; empty: `data/<name of the source>`.
        vae: `openmoji` (embedded), or a diffusers AutoencoderKL by folder or hub id.
        image_size: side in pixels to which images are resized and cropped; a multiple of the VAE's stride.
        batch_size: images per encoding batch.
        records_per_shard: records of a file; null: about 128 files of 512 to 16,384.
        held_out_fraction: fraction of a folder's images in the validation split, in [0, 1); fixed for OpenMoji.
        posterior_std: also store the posterior's standard deviation, so that training samples a new latent each time.
        hflip: add a mirrored copy of each training image.
        dtype: dtype of the latents on disk, `float16` or `float32`.
        license: licence of the images, for the manifest; empty: the source's own. To correct it later, repeat the
            command with another one.
        attribution: attribution of the images, for the manifest; empty: the source's own. Corrected in the same way.
        vae_check: number of evenly spread images that the VAE first encodes and decodes; their PSNR is printed, with a
            warning below 24 dB on average, and `vae_check.png` shows them beside their reconstructions. 0: none.
        max_rejected: fraction of the images, rounded up, that may be unreadable; they are left out and listed with the
            reason in `rejected.jsonl`. One more ends the run.
        text_encoder: encoder for a cache of caption features, like `text.encoder` in training; empty: none.
        text_dtype: dtype of these features, `bfloat16` or `float32`.
        text_max_length: maximum number of tokens; longer captions are cut.
        text_cache: folder of the features; empty: `text_features` in `out`.
    """

    source: str = "openmoji"
    captions: str = ""
    out: str = ""
    vae: str = "openmoji"
    image_size: int = 64
    batch_size: int = 32
    records_per_shard: int | None = None
    held_out_fraction: float = 0.05
    posterior_std: bool = False
    hflip: bool = False
    dtype: str = "float16"
    license: str = dataclasses.field(default="", metadata=FREE_TEXT)
    attribution: str = dataclasses.field(default="", metadata=FREE_TEXT)
    vae_check: int = 64
    max_rejected: float = 0.01
    text_encoder: str = ""
    text_dtype: str = "bfloat16"
    text_max_length: int = 120
    text_cache: str = ""

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        for name in ("image_size", "batch_size", "records_per_shard", "text_max_length"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "must be at least 1")
        require("vae_check", self.vae_check, self.vae_check >= 0, "must be 0 (no check) or more")
        require_local("out", self.out)
        require_local("text_cache", self.text_cache)
        require("max_rejected", self.max_rejected, 0 <= self.max_rejected <= 1, "must be in [0, 1]")
        require_choice("dtype", self.dtype, ("float16", "float32"))
        require_choice("text_dtype", self.text_dtype, TEXT_DTYPES)


class Job(NamedTuple):
    """One shard to write; its items are rows of (image index, whether mirrored)."""

    file: str
    split: Split
    items: Int[np.ndarray, "records 2"]


def prepare(config: PrepareConfig) -> Manifest:
    """Encode the images of `config.source` and write the data set and its text features, or continue an interrupted
    run.

    Raises `ValueError` with one line for invalid settings, too many unreadable images, a folder with a data set of other
    images or settings (which is not changed), and a folder that cannot be written.
    """
    config.check()
    image_set = load_images(config.source, config.held_out_fraction, config.captions)
    if config.text_encoder and not image_set.captions:
        raise ValueError(f"text_encoder: {config.source} has no captions to encode, got {config.text_encoder!r}")
    jobs = list(_jobs(config, image_set))
    vae = load_vae(config.vae)
    if config.image_size % (stride := vae.config.stride):
        raise ValueError(f"image_size: must be a multiple of the VAE's stride {stride}, got {config.image_size}")
    # Before the latents, which may take hours, so that errors are found first. It keeps its memory (5 GB for T5Gemma).
    encoder = _load_text_encoder(config) if config.text_encoder else None
    out = epath.Path(config.out or f"data/{image_set.name}")
    _check_outside_source(out, config)
    try:
        manifest = _prepare_latents(jobs, out, config, image_set, vae)
    except OSError as error:
        raise ValueError(f"out: cannot write to {out}: {error.strerror or error}") from None
    if encoder is not None:
        _prepare_text(config, out, manifest, encoder)
    return manifest


def _check_outside_source(out: epath.Path, config: PrepareConfig) -> None:
    """Raise `ValueError` if the data set, and so the sheet of the VAE check, would be among the images."""
    folder, source = Path(out).resolve(), Path(config.source).resolve()
    if Path(config.source).is_dir() and folder.is_relative_to(source) and not (out / PLAN_NAME).exists():
        raise ValueError(f"out: must be outside the source {config.source}, got {out}")


def _prepare_text(config: PrepareConfig, out: epath.Path, manifest: Manifest, encoder: TextEncoder) -> None:
    folder = epath.Path(config.text_cache or out / "text_features")
    try:
        write_cache(folder, out, manifest, encoder)
    except OSError as error:
        raise ValueError(f"text_cache: cannot write to {folder}: {error.strerror or error}") from None


def _load_text_encoder(config: PrepareConfig) -> TextEncoder:
    text = TextConfig(encoder=config.text_encoder, max_length=config.text_max_length, dtype=config.text_dtype)
    with under("text_"):
        return load_text_encoder(text)


def _prepare_latents(
    jobs: list[Job], out: epath.Path, config: PrepareConfig, image_set: ImageSet, vae: AutoencoderKL
) -> Manifest:
    terms = _claim(out, config, image_set, vae)
    if (out / manifests.FILE_NAME).exists():
        return _finished(jobs, out, config)
    if image_set.listing is not None:
        image_set.listing.write(out, image_set.key)
    _write_shards(jobs, out, config, image_set, vae)
    return _finish(jobs, out, config, image_set, vae, terms)


def _jobs(config: PrepareConfig, image_set: ImageSet) -> Iterator[Job]:
    """The shards: training records in a fixed random order over all shards, held-out ones in their original order."""
    train, held_out = np.flatnonzero(~image_set.held_out), np.flatnonzero(image_set.held_out)
    if not len(train):
        raise ValueError(f"held_out_fraction: {config.held_out_fraction} leaves no image to train on")
    items = np.array([(i, mirrored) for i in train for mirrored in range(1 + config.hflip)])
    yield from _split_jobs("train", np.random.default_rng(0).permutation(items), config.records_per_shard)
    yield from _split_jobs("validation", np.array([(i, 0) for i in held_out]), config.records_per_shard)


def _split_jobs(split: Split, items: np.ndarray, records_per_shard: int | None) -> Iterator[Job]:
    size = records_per_shard or min(max(math.ceil(len(items) / 128), 512), 16384)
    count = math.ceil(len(items) / size)
    for i in range(count):
        yield Job(f"{split}-{i:05d}-of-{count:05d}.array_record", split, np.array_split(items, count)[i])


def _claim(out: epath.Path, config: PrepareConfig, image_set: ImageSet, vae: AutoencoderKL) -> dict[str, str]:
    """Claim the folder; licence and attribution: those given, or else of an earlier run into it, or of the source."""

    def explain(name: str, stored: Any) -> str | None:
        if name == "captions":
            kinds = {stored is None: "without captions", image_set.captions is None: "with captions"}
            return f"was prepared {kinds.get(True, 'with other captions')}"
        if name != "pictures":
            return None
        listing = image_set.listing
        changes = None if listing is None else listing.changes(out, stored)
        return f"was prepared from other images{f': {changes}' if changes else ''}"

    given = {name: getattr(config, name) or None for name in manifests.TERMS}
    plan = claim_folder("out", out, _plan(config, image_set, vae), manifests.FILE_NAME, notes=given, explain=explain)
    return {name: plan.get(name) or getattr(image_set, name) for name in manifests.TERMS}


def _plan(config: PrepareConfig, image_set: ImageSet, vae: AutoencoderKL) -> dict[str, Any]:
    """Everything that the data set depends on, which must be equal for two runs into one folder."""
    others = {"source", "captions", "out", "text_encoder", "text_dtype", "text_max_length", "text_cache"}
    others |= {"vae_check", "max_rejected", *manifests.TERMS}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in others}
    # "pictures" instead of "images", so that folders started by earlier versions can be finished.
    identity = {"pictures": image_set.key, "captions": image_set.captions_key(), "vae_fingerprint": vae.fingerprint}
    return settings | identity


def _finished(jobs: list[Job], out: epath.Path, config: PrepareConfig) -> Manifest:
    """The manifest of the finished data set, with the licence and attribution of `config` if it has any."""
    manifest = Manifest.read(out)
    manifests.verify(out, manifest)
    _remove_leftovers(jobs, manifest, out)
    terms = {name: getattr(config, name) or getattr(manifest, name) for name in manifests.TERMS}
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


def _write_shards(
    jobs: list[Job], out: epath.Path, config: PrepareConfig, image_set: ImageSet, vae: AutoencoderKL
) -> None:
    finished = {job.file: sidecar for job in jobs if (sidecar := read_sidecar(out / job.file)) is not None}
    found = [image for sidecar in finished.values() for image in sidecar.rejected]
    rejected = RejectedImages(out, len(image_set.held_out), config.max_rejected, found)
    encode_batch = latent_encoder(vae, config.batch_size)
    if config.vae_check and not finished:
        options = {name: getattr(config, name) for name in ("batch_size", "image_size", "dtype")}
        check_vae(out, vae, encode_batch, image_set, count=config.vae_check, **options)
        # Meanwhile there were no shards, so that a run with other settings could claim the folder.
        check_claim("out", out, _plan(config, image_set, vae))
    todo = [job for job in jobs if job.file not in finished]
    total, left = (sum(len(job.items) for job in some) for some in (jobs, todo))
    with progress_bar("encoding", "images", total, left) as progress:
        for job in todo:
            records = encoded_records(
                job.items,
                image_set,
                encode_batch,
                image_size=config.image_size,
                batch_size=config.batch_size,
                dtype=config.dtype,
                posterior_std=config.posterior_std,
            )
            write_shard(out / job.file, _counted(records, rejected, progress))
    rejected.write()
    if len(rejected):
        logger.warning(rejected.summary())


def _counted(
    records: Iterator[dict[str, Any] | Rejected], rejected: RejectedImages, progress: ProgressBar
) -> Iterator[dict[str, Any] | Rejected]:
    for record in records:
        if isinstance(record, Rejected):
            rejected.add(record)
        yield record
        progress.update()


def _finish(
    jobs: list[Job],
    out: epath.Path,
    config: PrepareConfig,
    image_set: ImageSet,
    vae: AutoencoderKL,
    terms: dict[str, str],
) -> Manifest:
    sidecars = [finished_sidecar(out / job.file) for job in jobs]
    train = [s for s, job in zip(sidecars, jobs, strict=True) if job.split == "train" and s.records]
    if not train:
        raise ValueError(f"source: no image of the training split can be read: see {out / FILE_NAME}")
    mean, std = channel_statistics(train)
    side = config.image_size // vae.config.stride
    manifest = Manifest(
        latent_shape=(vae.config.latent_channels, side, side),
        latent_dtype="float16" if config.dtype == "float16" else "float32",
        has_latent_std=config.posterior_std,
        vae=VaeInfo(
            name=config.vae,
            fingerprint=vae.fingerprint,
            shift=float(vae.config.shift_factor),
            scale=float(vae.config.scaling_factor),
            stride=vae.config.stride,
        ),
        image_size=config.image_size,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        class_names=image_set.class_names,
        has_captions=image_set.captions is not None,
        shards=tuple(
            Shard(job.file, job.split, s.records, s.bytes, s.sha256)
            for job, s in zip(jobs, sidecars, strict=True)
            if s.records
        ),
        license=terms["license"],
        attribution=terms["attribution"],
    )
    manifest.write(out)
    _remove_leftovers(jobs, manifest, out)
    logger.info(_summary(manifest, out))
    return manifest


def _remove_leftovers(jobs: list[Job], manifest: Manifest, out: epath.Path) -> None:
    """Remove the sidecars, and shards whose images are all unreadable, which the manifest does not have."""
    kept = {shard.file for shard in manifest.shards}
    for job in jobs:
        remove_sidecar(out / job.file)
        if job.file not in kept:
            (out / job.file).unlink(missing_ok=True)


def _summary(manifest: Manifest, out: epath.Path) -> str:
    mean, std = np.array(manifest.channel_mean), np.array(manifest.channel_std)
    normalised_std = manifest.vae.scale * math.sqrt(np.mean(std**2) + np.var(mean))
    classes = f"{manifest.num_classes} classes" if manifest.class_names else "no classes"
    return (
        f"{out}: {manifest.num_records('train')} training and {manifest.num_records('validation')} validation records, "
        f"{classes}, {'captions' if manifest.has_captions else 'no captions'}, latents {'x'.join(map(str, manifest.latent_shape))}, "
        f"standard deviation after shift and scale {normalised_std:.3f}"
    )
