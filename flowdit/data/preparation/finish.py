"""The end of `prepare`: the manifest of the shards, and the removal of what was needed for them only."""

import collections
import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from flowdit.data.loader import open_source
from flowdit.data.manifest import Bucket, Manifest, Part, Shard, Split, VaeInfo
from flowdit.data.origin import HELD_OUT, PART
from flowdit.data.preparation import scan
from flowdit.data.preparation.encode_unit import SPLITS, splits_of
from flowdit.data.preparation.passes import Task
from flowdit.data.preparation.selection import Selection
from flowdit.data.rejected import FILE_NAME
from flowdit.data.schema import Schema
from flowdit.data.shards import Sidecar, channel_statistics, finished_sidecar, remove_sidecar, remove_temporary
from flowdit.data.sources.base import Unit

logger = logging.getLogger(__name__)


def finish(task: Task, selection: Selection, units: Sequence[Unit], terms: Mapping[str, str]) -> Manifest:
    """Write the manifest, with licence and attribution of `terms`, and remove all else.

    Raises `ValueError` if there is no image to train on.
    """
    sidecars: dict[Split, dict[str, Sidecar]] = {split: _sidecars(task.out, split, units) for split in SPLITS}
    if not sidecars["train"]:
        raise ValueError(f"source: no image of the training split can be read: see {task.out / FILE_NAME}")
    mean, std = channel_statistics(sidecars["train"].values())
    config, vae = task.config, task.vae.config
    side = config.image_size // vae.stride
    buckets, shards = _counted(selection.buckets, sidecars)
    manifest = Manifest(
        latent_shape=(vae.latent_channels, side, side),
        latent_dtype="float16" if config.dtype == "float16" else "float32",
        has_latent_std=config.posterior_std,
        vae=VaeInfo(
            name=config.vae,
            fingerprint=task.vae.fingerprint,
            shift=float(vae.shift_factor),
            scale=float(vae.scaling_factor),
            stride=vae.stride,
        ),
        image_size=config.image_size,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        class_names=selection.class_names,
        has_captions=task.source.has_captions,
        shards=shards,
        license=terms["license"],
        attribution=terms["attribution"],
        buckets=buckets,
    )
    manifest = dataclasses.replace(manifest, validation_parts=_validation_parts(task, manifest))
    manifest.write(task.out)
    remove_leftovers(task.out, task.units, manifest)
    logger.info(_summary(manifest, task.out))
    return manifest


def _validation_parts(task: Task, manifest: Manifest) -> tuple[Part, ...]:
    """The records of the validation split by the column that says why they are held out, if the source has it."""
    if HELD_OUT not in getattr(task.source, "kept_columns", ()) or not manifest.num_records("validation"):
        return ()
    records = open_source(task.out, manifest, "validation", schema=Schema({}))
    counts = collections.Counter(records.read([i])[0][PART] for i in range(len(records)))
    return tuple(Part(name, count) for name, count in sorted(counts.items()))


def _sidecars(out: Path, split: Split, units: Sequence[Unit]) -> dict[str, Sidecar]:
    """The finished shards of a split by their files, without empty ones."""
    files = [unit.file(split) for unit in units if split in splits_of(unit)]
    found = {file: finished_sidecar(out / file) for file in files}
    return {file: sidecar for file, sidecar in found.items() if sidecar.records}


def _counted(
    buckets: Sequence[Bucket], sidecars: Mapping[Split, Mapping[str, Sidecar]]
) -> tuple[tuple[Bucket, ...], tuple[Shard, ...]]:
    """The buckets that have records, and the shards with the records of each."""
    found: list[tuple[str, Split, Sidecar]] = [
        (file, split, sidecar) for split in SPLITS for file, sidecar in sidecars[split].items()
    ]
    totals = [sum(sidecar.buckets[i] for _, _, sidecar in found) for i in range(len(buckets))]
    used = [i for i, total in enumerate(totals) if total]
    shards = (
        Shard(
            file=file,
            split=split,
            records=sidecar.records,
            bytes=sidecar.bytes,
            sha256=sidecar.sha256,
            buckets=tuple(sidecar.buckets[i] for i in used),
        )
        for file, split, sidecar in found
    )
    return tuple(buckets[i] for i in used), tuple(shards)


def remove_leftovers(out: Path, units: Sequence[Unit], manifest: Manifest) -> None:
    """Remove sidecars, shards without a record, what killed processes left, and the files of the first pass."""
    kept = {shard.file for shard in manifest.shards}
    for file in sorted(kept | {unit.file(split) for unit in units for split in splits_of(unit)}):
        remove_sidecar(out / file)
        if file not in kept:
            (out / file).unlink(missing_ok=True)
    remove_temporary(out)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(out / scan.FOLDER)


def _summary(manifest: Manifest, out: epath.PathLike) -> str:
    mean, std = np.array(manifest.channel_mean), np.array(manifest.channel_std)
    normalised_std = manifest.vae.scale * math.sqrt(np.mean(std**2) + np.var(mean))
    named = [f"{part.records} {part.name}" for part in manifest.validation_parts]
    held_out = f" ({', '.join(named)})" if named else ""
    parts = [
        f"{manifest.num_records('train')} training and {manifest.num_records('validation')} validation records{held_out}",
        f"{manifest.num_classes} classes" if manifest.class_names else "no classes",
        "captions" if manifest.has_captions else "no captions",
        f"latents {'x'.join(map(str, manifest.latent_shape))}",
        *([f"{len(manifest.buckets)} buckets"] if manifest.buckets else []),
        f"standard deviation after shift and scale {normalised_std:.3f}",
    ]
    return f"{out}: {', '.join(parts)}"
