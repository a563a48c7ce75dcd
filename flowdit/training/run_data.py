"""The data of a run: one data set or a mixture, opened and verified, and the shapes of its batches."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from flowdit import conditioning as kinds
from flowdit.conditioning import Conditioning
from flowdit.config import Config
from flowdit.data.feature_cache import FeatureMaps, open_features, read_features
from flowdit.data.loader import DataConfig
from flowdit.data.manifest import Manifest
from flowdit.data.mirror import local_folder
from flowdit.data.mixture import DataSet, Mixture, Opened, Part, mixed, open_mixture
from flowdit.data.origin import PART
from flowdit.data.schedule import check_buckets
from flowdit.data.schema import LATENTS, ChoiceField, FeatureMapField, Schema, record_schema
from flowdit.data.shard_cache import provide
from flowdit.data.stream import TrainStream
from flowdit.fields import about, called, require, under
from flowdit.sharding import batch_sharding, own_rows
from flowdit.training.agreement import require_one_data_set


def open_manifests(config: Config) -> tuple[list[Part], Manifest]:
    """Read the manifests of all data sets, and verify their shards or copy them to the local disk. Returns the data
    sets, and the manifest of their mixture.

    All processes must call it, and read the same data. Raises `ValueError` naming file and rule.
    """
    data, parts = config.data, []
    for key, folder in zip(keys(data, "path"), data.folders, strict=True):
        with about(key):
            read = Manifest.read(folder.path)
            if not read.num_records("train"):
                raise ValueError(f"{folder.path}: the data set has no records in split 'train'")
            parts.append(Part(folder, read))
    with under("data."):
        manifest = mixed(parts, kinds.KINDS[kinds.kind_of(config)].same_in_mixtures)
    require_one_data_set(manifest.id)
    options = {"hashes": data.verify_hashes, "limit": data.hash_limit}
    for key, part in zip(keys(data, "path"), parts, strict=True):
        with about(key):
            provide(part.folder.path, part.manifest.shards, data.local_dir, data.pool, **options)
    return parts, manifest


def feature_caches(config: Config, parts: list[Part]) -> tuple[tuple[int, int, int] | None, str]:
    """The shape of the maps in the feature caches of the data sets, and the identity of their network.

    Without an auxiliary loss that reads maps, None and "". Raises `FieldError` if there is no cache, or
    those of a mixture are of different networks.
    """
    if not (readers := config.map_readers):
        return None, ""
    caches = []
    for key, part in zip(keys(config.data, "feature_cache"), parts, strict=True):
        rule = f"must be given: auxiliary.{readers[0]} reads what `python -m flowdit.prepare features=...` writes"
        require(key, part.folder.feature_cache, bool(part.folder.feature_cache), rule)
        with about(key):
            caches.append(cache := read_features(str(part.folder.feature_cache)))
        rule = f"must hold features of the same network as data.feature_cache, {caches[0].identity}"
        require(key, cache.identity, cache.identity == caches[0].identity, rule)
    return caches[0].shape, caches[0].identity


def keys(data: DataConfig, name: str) -> list[str]:
    """The keys of a setting of all data sets, in their order."""
    return [f"data.{name}", *(f"data.mix[{i}].{name}" for i in range(len(data.mix)))]


def open_data(
    config: Config,
    parts: list[Part],
    manifest: Manifest,
    conditioning: Conditioning,
    map_shape: tuple[int, int, int] | None = None,
) -> DataSet:
    """Open the records of both splits, with the fields of conditioning and auxiliary losses.

    Validation has no auxiliary loss, so feature maps are read for training only.
    """
    data, schema = config.data, batch_schema(config, manifest, conditioning, map_shape).of_records
    options = {"max_bad_records": data.max_bad_records, "pool": data.pool}
    options |= {"hashes": data.verify_hashes, "limit": data.hash_limit}
    caches = dict(zip([part.folder.path for part in parts], keys(data, "feature_cache"), strict=True))

    parts_of_validation = tuple(part.name for part in manifest.validation_parts)
    is_part = {PART: ChoiceField(parts_of_validation)} if parts_of_validation else {}
    schemas = {"train": schema, "validation": Schema({**schema.fields, **is_part})}

    def mixture(split: str) -> Mixture:
        def opener(part: Part) -> Opened:
            path, maps = part.folder.path, None
            folder = local_folder(path, part.manifest.shards, data.local_dir) if data.pool is None else path
            if split == "train" and config.map_readers:
                with about(caches[path]):
                    maps = _open_maps(data, part)
            return Opened(folder, conditioning.reader(split, part), maps)

        return open_mixture(parts, manifest, split, opener, schema=schemas[split], **options)

    return DataSet(manifest, mixture("train"), mixture("validation") if manifest.num_records("validation") else None)


def _open_maps(data: DataConfig, part: Part) -> FeatureMaps:
    options = {"local_dir": data.local_dir, "pool": data.pool}
    options |= {"verify_hashes": data.verify_hashes, "hash_limit": data.hash_limit}
    return open_features(str(part.folder.feature_cache), part.manifest, data=part.folder.path, **options)


def make_stream(config: Config, data: DataSet, mesh: Mesh) -> TrainStream:
    """This process's share of the training batches. Raises `FieldError` for a bucket that does not fill a batch."""
    size, names = config.train.batch_size, [shape_in_pixels(data.manifest, s) for s in data.manifest.bucket_shapes]
    check_buckets(data.train.counts, names, size, merge_small=config.data.merge_small_buckets)
    weights = {f"weights[{i}]": key for i, key in enumerate(keys(config.data, "weight"))}
    with called(weights):
        return TrainStream(
            data.train,
            seed=config.seed,
            batch_size=size,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
            rows=own_rows(mesh, size),
            pool=config.data.pool,
        )


def shape_in_pixels(manifest: Manifest, latent_shape: tuple[int, int, int]) -> str:
    """Height and width of the images of a latent shape, `64x32`."""
    return "x".join(str(side * manifest.vae.stride) for side in latent_shape[1:])


def batch_schema(
    config: Config, manifest: Manifest, conditioning: Conditioning, map_shape: tuple[int, int, int] | None
) -> Schema:
    """What a record holds for conditioning and auxiliary losses, with feature maps of `map_shape`.

    Raises `ValueError` if two read a field differently.
    """
    fields = conditioning.fields()
    for loss in config.auxiliary_losses():
        for name, field in loss.fields().items():
            field = FeatureMapField(map_shape) if isinstance(field, FeatureMapField) else field
            if name in LATENTS or fields.setdefault(name, field) != field:
                others = fields.get(name, "a latent")
                raise ValueError(f"auxiliary.{loss.name}: reads the field {name} as {field}, others as {others}")
    return record_schema(manifest.latent_shape, fields, manifest.has_latent_std)


def abstract_batch(
    config: Config,
    manifest: Manifest,
    conditioning: Conditioning,
    mesh: Mesh,
    latent_shape: tuple[int, int, int] | None = None,
    map_shape: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the global batch that the step gets, after `Conditioning.encode`.

    Its latents have `latent_shape`, by default that of the manifest, its feature maps, if any, `map_shape`.
    """
    schema = batch_schema(config, manifest, conditioning, map_shape).of_shape(latent_shape or manifest.latent_shape)
    columns = {
        name: jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
        for name, values in schema.stack([]).items()
        if values.dtype != object  # captions, of which `encode` makes features
    }
    size, sharding = config.train.batch_size, batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=sharding)
        for name, one in (columns | conditioning.encoded()).items()
    }
