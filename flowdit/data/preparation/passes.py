"""The two passes over a source: looking at all images, then encoding those that are chosen."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import UInt8

from flowdit.data.encode_images import latent_encoder
from flowdit.data.images import ImageError, center_crop, open_image
from flowdit.data.manifest import Bucket, Split
from flowdit.data.preparation.config import PrepareConfig
from flowdit.data.preparation.encode_unit import EncoderMaker, EncodeSettings, is_finished, splits_of
from flowdit.data.preparation.engines import Engine
from flowdit.data.preparation.scan import Scanner, shown_key
from flowdit.data.preparation.selection import Scans, Selection, read_chosen
from flowdit.data.progress import work_progress
from flowdit.data.rejected import RejectedImages
from flowdit.data.shards import read_sidecar
from flowdit.data.sources.base import Row, Source, Unit
from flowdit.data.vae_check import check_vae
from flowdit.models.vae import AutoencoderKL

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is to be prepared: the units of a source, into the folder `out`. `identity` is that of the plan."""

    config: PrepareConfig
    source: Source
    units: tuple[Unit, ...]
    vae: AutoencoderKL
    out: Path
    identity: str


def scan(task: Task, engine: Engine) -> Scans:
    """The first pass. With a limit it ends as soon as enough images were seen."""
    limits: dict[Split | None, int] = {}
    if (limit := task.config.limit) is not None:
        held_out = max(round(limit * task.config.held_out_fraction), 1)
        limits = {None: limit, "train": limit, "validation": held_out}
    scanner = Scanner(
        source=task.source,
        folder=task.out,
        identity=task.identity,
        columns=task.config.filter.columns,
        held_out_fraction=task.config.held_out_fraction,
        max_pixels=task.config.max_pixels,
        limits=limits,
    )
    return Scans(task.source, list(_scanned(task.units, engine, scanner)), task.out, task.identity, limits)


def _scanned(units: Sequence[Unit], engine: Engine, scanner: Scanner) -> Iterator[Unit]:
    """Scan units until the limits are reached, twice as many each time; those that count, in order."""
    left = dict(scanner.limits)
    start, size = 0, 1 if left else len(units)
    with work_progress("reading", "units", len(units), len(units)) as progress:
        while start < len(units):
            numbers = range(start, min(start + size, len(units)))
            part = [(i, units[i]) for i in numbers if left.get(units[i].split, 1) > 0]
            rows: dict[int, int] = {}
            for i, count in engine.run(scanner, part, has_network=False):
                rows[i] = count
                progress.finish(1)
            for i, unit in part:
                if left.get(unit.split, 1) > 0:
                    yield unit
                if unit.split in left:
                    left[unit.split] -= rows[i]
            start, size = start + size, 2 * size


def encode(task: Task, selection: Selection, units: Sequence[Unit], engine: Engine) -> None:
    """The second pass: write the shards of the units that are not finished, and `rejected.jsonl`.

    Raises `ValueError` with one line for too many images that cannot be read.
    """
    finished = [is_finished(task.out, unit) for unit in units]
    found = list(selection.rejected)
    for unit, is_done in zip(units, finished, strict=True):
        sidecars = [read_sidecar(task.out / unit.file(split)) for split in splits_of(unit)] if is_done else []
        found += (image for sidecar in sidecars if sidecar is not None for image in sidecar.rejected)
    rejected = RejectedImages(epath.Path(task.out), selection.num_images, task.config.max_rejected, found)
    todo = [unit for unit, is_done in zip(units, finished, strict=True) if not is_done]
    left = sum(count for count, is_done in zip(selection.counts, finished, strict=True) if not is_done)
    maker = EncoderMaker(task.source, task.out, encode_settings(task, selection))
    with work_progress("encoding", "images", sum(selection.counts), left) as progress:
        for done in engine.run(maker, todo):
            progress.finish(done.images)
            for image in done.rejected:
                rejected.add(image)
    rejected.write()
    if len(rejected):
        logger.warning(rejected.summary())


def encode_settings(task: Task, selection: Selection) -> EncodeSettings:
    """What the encoding of a unit depends on."""
    config = task.config
    return EncodeSettings(
        vae=config.vae,
        vae_fingerprint=task.vae.fingerprint,
        sizes=selection.buckets or (Bucket(config.image_size, config.image_size),),
        bucket_of=selection.bucket_of,
        has_buckets=bool(selection.buckets),
        class_names=selection.class_names,
        has_captions=task.source.has_captions,
        kept_columns=tuple(dict.fromkeys([*getattr(task.source, "kept_columns", ()), *config.keep_columns])),
        held_out_fraction=config.held_out_fraction,
        batch_size=config.batch_size,
        max_pixels=config.max_pixels,
        dtype=config.dtype,
        posterior_std=config.posterior_std,
        hflip=config.hflip,
    )


def check_images(task: Task, selection: Selection, units: Sequence[Unit]) -> None:
    """Check the VAE on evenly spread images, unless shards were begun."""
    count = min(task.config.vae_check, sum(selection.counts))
    if count and not any(read_sidecar(task.out / unit.file(split)) for unit in units for split in splits_of(unit)):
        check_vae(
            epath.Path(task.out),
            task.vae,
            latent_encoder(task.vae, task.config.batch_size),
            _spread_images(task, selection, units, count),
            count=count,
            batch_size=task.config.batch_size,
            image_size=task.config.image_size,
            dtype=task.config.dtype,
        )


def _spread_images(
    task: Task, selection: Selection, units: Sequence[Unit], count: int
) -> Iterator[tuple[str, UInt8[np.ndarray, "size size 3"]]]:
    """Names and square pixels of `count` evenly spread images, without those that cannot be read."""
    positions = np.arange(count) * sum(selection.counts) // count
    start = 0
    for unit, images in zip(units, selection.counts, strict=True):
        wanted = positions[(positions >= start) & (positions < start + images)] - start
        start += images
        rows = set(read_chosen(task.out, unit).rows[wanted].tolist()) if len(wanted) else set()
        for _, row in task.source.read(unit, rows) if rows else ():
            with contextlib.suppress(ImageError):
                if isinstance(row, Row):
                    image = open_image(row.image, task.config.max_pixels)
                    yield shown_key(row.key), np.asarray(center_crop(image, task.config.image_size))
