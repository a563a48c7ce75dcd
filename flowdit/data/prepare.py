"""Pictures to a folder of latent shards and their manifest, in steps that can be interrupted and run again.

Shards are the unit of work: each is encoded by itself, and a later run skips the finished ones; `dataset.json` is
written when all are. Nothing depends on where a run was interrupted, so the manifest's id is that of a run in one go
(ArrayRecord files of identical records are identical).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import grain
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt8
from tqdm import tqdm

from flowdit.data import manifest as manifests
from flowdit.data.manifest import Manifest, Shard, Split, VaeInfo, write_json
from flowdit.data.pictures import Pictures, center_crop, load_pictures
from flowdit.data.shards import Sidecar, channel_statistics, read_sidecar, remove_sidecar, write_shard
from flowdit.models.vae import AutoencoderKL, Posterior, load_vae

PLAN_NAME = "prepare.json"
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
"""Threads that read pictures, and batches read ahead of the encoder."""

EncodeBatch = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass
class PrepareConfig:
    """What `python -m flowdit.prepare` is told.

    source: "openmoji", or a folder of pictures with one sub-folder a class.
    out: folder of the data set; empty for `data/<name of the source>`.
    vae: "openmoji" (embedded), or a diffusers AutoencoderKL by folder or hub id.
    image_size: side in pixels to which pictures are resized and cropped.
    batch_size: pictures encoded at a time.
    records_per_shard: null for about 128 shards of 512 to 16,384 records.
    held_out_fraction: share of a folder's pictures that make the validation split (OpenMoji's is fixed).
    posterior_std: also store the posterior deviation, so that training can draw a fresh latent at each visit.
    hflip: add a mirrored copy of each training picture.
    dtype: of the latents on disk.
    license, attribution: carried in the manifest; empty for the source's own.
    """

    source: str = "openmoji"
    out: str = ""
    vae: str = "openmoji"
    image_size: int = 64
    batch_size: int = 32
    records_per_shard: int | None = None
    held_out_fraction: float = 0.05
    posterior_std: bool = False
    hflip: bool = False
    dtype: str = "float16"
    license: str = ""
    attribution: str = ""


class Job(NamedTuple):
    """One shard to write; its items are rows of (number of the picture, whether mirrored)."""

    file: str
    split: Split
    items: Int[np.ndarray, "records 2"]


def prepare(config: PrepareConfig) -> Manifest:
    """Encode the pictures of `config.source` and write the data set, or finish one that was begun.

    Raises `ValueError` in one line for settings that do not fit, an unreadable picture (named), a folder that holds a
    data set of other pictures or settings (left as it is), and a folder that cannot be written.
    """
    _check(config)
    pictures = load_pictures(config.source, config.held_out_fraction)
    jobs = list(_jobs(config, pictures))
    vae = load_vae(config.vae)
    if config.image_size % (stride := vae.config.stride):
        raise ValueError(f"image_size: must be a multiple of the VAE's stride {stride}, got {config.image_size}")
    out = Path(config.out or Path("data") / pictures.name)
    try:
        _claim(out, _plan(config, pictures, vae))
        if (out / manifests.FILE_NAME).exists():
            return _finished(out)
        _write_shards(jobs, out, config, pictures, vae)
        return _finish(jobs, out, config, pictures, vae)
    except OSError as error:
        raise ValueError(f"out: cannot write to {out}: {error.strerror or error}") from None


def _check(config: PrepareConfig) -> None:
    for name in ("image_size", "batch_size", "records_per_shard"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if config.dtype not in ("float16", "float32"):
        raise ValueError(f"dtype: must be float16 or float32, got {config.dtype!r}")


def _jobs(config: PrepareConfig, pictures: Pictures) -> Iterator[Job]:
    """The shards: training records in one fixed random order over all of them, held-out ones as they come."""
    train, held_out = np.flatnonzero(~pictures.held_out), np.flatnonzero(pictures.held_out)
    if not len(train):
        raise ValueError(f"held_out_fraction: {config.held_out_fraction} leaves no picture to train on")
    items = np.array([(i, mirrored) for i in train for mirrored in range(1 + config.hflip)])
    yield from _split_jobs("train", np.random.default_rng(0).permutation(items), config.records_per_shard)
    yield from _split_jobs("validation", np.array([(i, 0) for i in held_out]), config.records_per_shard)


def _split_jobs(split: Split, items: np.ndarray, records_per_shard: int | None) -> Iterator[Job]:
    size = records_per_shard or min(max(math.ceil(len(items) / 128), 512), 16384)
    count = math.ceil(len(items) / size)
    for i in range(count):
        yield Job(f"{split}-{i:05d}-of-{count:05d}.array_record", split, np.array_split(items, count)[i])


def _plan(config: PrepareConfig, pictures: Pictures, vae: AutoencoderKL) -> dict[str, Any]:
    """Everything that the data set depends on: two runs into one folder must have it in common."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("source", "out")}
    return settings | {"pictures": pictures.key, "vae_fingerprint": vae.fingerprint}


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` ours, or raise `ValueError` if it belongs to another data set."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN_NAME
    if not path.exists():
        if (out / manifests.FILE_NAME).exists() or any(out.glob("*.array_record")):
            raise ValueError(f"out: {out} holds a data set without {PLAN_NAME}: give another folder")
        return write_json(path, plan)
    try:
        theirs = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"out: {path} is damaged: remove the folder or give another one") from None
    for name, ours in plan.items():
        if theirs.get(name) != ours:
            raise ValueError(
                f"out: {out} was begun with {name}={theirs.get(name)!r}, this run has {ours!r}: give another folder"
            )


def _finished(out: Path) -> Manifest:
    manifest = Manifest.read(out)
    manifests.verify(out, manifest)
    _remove_sidecars(manifest, out)
    print(f"{out} is already prepared from these pictures with these settings: nothing to do")
    return manifest


def _write_shards(jobs: list[Job], out: Path, config: PrepareConfig, pictures: Pictures, vae: AutoencoderKL) -> None:
    encode_batch = _encoder(vae, config.batch_size)
    todo = [job for job in jobs if read_sidecar(out / job.file) is None]
    total, left = (sum(len(job.items) for job in some) for some in (jobs, todo))
    with tqdm(total=total, initial=total - left, unit=" images", desc="encoding", dynamic_ncols=True) as progress:
        for job in todo:
            write_shard(out / job.file, _records(job.items, config, pictures, encode_batch, progress.update))


def _encoder(vae: AutoencoderKL, batch_size: int) -> EncodeBatch:
    """Maps uint8 (n, size, size, 3), n at most `batch_size`, to posterior mean and deviation, on all local devices."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
    vae = eqx.filter_shard(vae, NamedSharding(mesh, PartitionSpec()))
    rows = math.ceil(batch_size / len(devices)) * len(devices)

    def encode_batch(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.pad(images, ((0, rows - len(images)), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
        mean, std = _posterior(vae, jax.device_put(padded, NamedSharding(mesh, PartitionSpec("batch"))))
        return np.asarray(mean)[: len(images)], np.asarray(std)[: len(images)]

    return encode_batch


@eqx.filter_jit
def _posterior(vae: AutoencoderKL, images: UInt8[Array, "batch height width 3"]) -> Posterior:
    return jax.vmap(vae.encode)(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def _records(
    items: np.ndarray,
    config: PrepareConfig,
    pictures: Pictures,
    encode_batch: EncodeBatch,
    on_encoded: Callable[[int], object],
) -> Iterator[dict[str, Any]]:
    """The records of one shard. Latents are the posterior means, raw: before the VAE's shift and scale."""
    images = grain.MapDataset.range(len(items)).map(lambda i: _image(pictures, items[i], config.image_size))
    batches = images.batch(config.batch_size, drop_remainder=False).to_iter_dataset(READ_OPTIONS)
    labels = iter(pictures.labels[items[:, 0]].tolist())
    for batch in batches:
        mean, std = (part.astype(config.dtype) for part in encode_batch(batch))
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"dtype: the VAE's latents are not finite in {config.dtype}: is it the right VAE?")
        for i in range(len(batch)):
            record = {"latent": mean[i], "label": next(labels)}
            yield record | ({"latent_std": std[i]} if config.posterior_std else {})
        on_encoded(len(batch))


def _image(pictures: Pictures, item: np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    index, mirrored = item
    image = np.asarray(center_crop(pictures.open(index), size))
    return image[:, ::-1] if mirrored else image


def _finish(jobs: list[Job], out: Path, config: PrepareConfig, pictures: Pictures, vae: AutoencoderKL) -> Manifest:
    sidecars = [_finished_sidecar(out / job.file) for job in jobs]
    mean, std = channel_statistics(s for s, job in zip(sidecars, jobs, strict=True) if job.split == "train")
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
        class_names=pictures.class_names,
        shards=tuple(
            Shard(job.file, job.split, s.records, s.bytes, s.sha256) for job, s in zip(jobs, sidecars, strict=True)
        ),
        license=config.license or pictures.license,
        attribution=config.attribution or pictures.attribution,
    )
    manifest.write(out)
    _remove_sidecars(manifest, out)
    print(_summary(manifest, out))
    return manifest


def _finished_sidecar(path: Path) -> Sidecar:
    sidecar = read_sidecar(path)
    assert sidecar is not None, path
    return sidecar


def _remove_sidecars(manifest: Manifest, out: Path) -> None:
    for shard in manifest.shards:
        remove_sidecar(out / shard.file)


def _summary(manifest: Manifest, out: Path) -> str:
    mean, std = np.array(manifest.channel_mean), np.array(manifest.channel_std)
    normalised_std = manifest.vae.scale * math.sqrt(np.mean(std**2) + np.var(mean))
    return (
        f"{out}: {manifest.num_records('train')} training and {manifest.num_records('validation')} validation records, "
        f"{manifest.num_classes} classes, latents {'x'.join(map(str, manifest.latent_shape))}, "
        f"deviation after shift and scale {normalised_std:.3f}"
    )
