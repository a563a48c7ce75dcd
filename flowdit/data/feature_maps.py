"""Writing a cache of feature maps (`feature_cache`): a pass over the images of a finished data set.

A shard of the data set is made of one unit of the source, which is read again; an image is found by the key of its
record, cropped as the latent's was, and mirrored where the record is. Can be interrupted and run again.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float16, UInt8

from flowdit.data.encode_images import on_all_devices
from flowdit.data.feature_cache import FILE_NAME, FeatureManifest, image_key
from flowdit.data.images import ImageError, cover_crop, open_image
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest, Shard, as_json, read_manifest, verify_shards, write_json
from flowdit.data.plan import claim_folder, claimed_id, former_ids
from flowdit.data.preparation.engines import LOOP, Engine
from flowdit.data.preparation.scan import content_hash, shown_key, weight
from flowdit.data.preparation.spool import Spool
from flowdit.data.preparation.threads import read_ahead
from flowdit.data.progress import advance, work_progress
from flowdit.data.records import RecordError
from flowdit.data.schema import Schema
from flowdit.data.shards import (
    Tally,
    described,
    finished_sidecar,
    read_sidecar,
    remove_sidecar,
    remove_temporary,
    write_encoded,
)
from flowdit.data.sources.base import Row, Source, Unit
from flowdit.features import FeatureNetwork

logger = logging.getLogger(__name__)

CHUNK = 256
"""Records of the data set that are read at a time."""


class Images(NamedTuple):
    """The finished data set in `folder`, and the source that it was made from."""

    folder: epath.PathLike
    manifest: Manifest
    source: Source
    max_pixels: int
    batch_size: int


def write_features(
    folder: epath.PathLike,
    images: Images,
    network: FeatureNetwork,
    engine: Engine = LOOP,
    make_network: Callable[[], FeatureNetwork] | None = None,
) -> FeatureManifest:
    """Write the maps of all training images of a data set, or continue an interrupted run.

    The workers of an `engine` in other processes get their network from `make_network`, which can be pickled.

    Raises `ValueError` with one line if `folder` holds features of another network or data set, or an image is not in the
    source any more, `OSError` if it cannot be written.
    """
    folder, manifest = epath.Path(folder), images.manifest
    former = former_ids(images.folder)
    data_id = claimed_id("feature_cache", folder, manifest.ids, former)
    claim_folder("feature_cache", folder, {"features": network.map_identity, "data": data_id}, FILE_NAME)
    if (folder / FILE_NAME).exists():
        cache = read_manifest(FeatureManifest, folder / FILE_NAME)
        cache.check_made_from(folder, manifest, former)
        verify_shards(folder, cache.shards, hashes=False)
        logger.info("%s already holds the features of this data set: nothing to do", folder)
    else:
        maker = MapsMaker(make_network or (lambda: network), network.map_identity, Path(folder), images)
        _write_shards(maker, engine)
        cache = _finish(folder, manifest, network)
        logger.info(_summary(folder, cache))
    for shard in cache.shards:
        remove_sidecar(folder / shard.file)
    remove_temporary(folder)
    return cache


class MapsMaker(NamedTuple):
    """Makes the function that writes the maps of a shard, which was made of a unit, in any process."""

    make_network: Callable[[], FeatureNetwork]
    identity: str
    folder: Path
    images: Images

    def __call__(self) -> Callable[[tuple[Unit, Shard]], int]:
        network = self.make_network()
        if network.map_identity != self.identity:
            raise ValueError(f"features: {network.name} is another network on this machine than where the run began")
        see = on_all_devices(network.model, _maps, self.images.batch_size)
        return functools.partial(self._write, lambda pixels: see(pixels).ready())

    def _write(self, see: Callable[[np.ndarray], np.ndarray], item: tuple[Unit, Shard]) -> int:
        """The number of records of the shard."""
        unit, shard = item
        total = Tally()
        with Spool(self.folder, lambda record: {}) as spool:
            for batch in _batches(self._shown(unit, shard), self.images.batch_size):
                maps = see(np.stack([shown.pixels for shown in batch]))
                if not np.isfinite(maps).all():
                    raise ValueError("features: must be finite in float16: check the weights of the network")
                for shown, one in zip(batch, maps, strict=True):
                    spool.add(shown.number, {"key": shown.key, "map": one})
                advance(len(batch))
            for number in range(shard.records):
                total.include(spool.tally(number))
            records = (record for number in range(shard.records) for record in spool.records(number))
            write_encoded(self.folder / shard.file, records, total)
        return shard.records

    def _shown(self, unit: Unit, shard: Shard) -> "Iterator[_Shown]":
        """The pixels of all records of the shard, in the order of the source.

        Raises `ValueError` if one of their images is not in the unit, is another now, or cannot be read.
        """
        wanted = self._wanted(shard)
        rows = (
            (number, row)
            for number, row in self.images.source.read(unit)
            if isinstance(row, Row) and shown_key(row.key) in wanted
        )
        ahead = max(2 * self.images.batch_size, 16)
        found = 0
        for shown in read_ahead(lambda numbered: self._look(numbered[1], wanted), rows, ahead, weight):
            found += 1
            yield from shown
        if found != len(wanted):
            missing = f"{len(wanted) - found} of the {len(wanted)} images of {shard.file} are not there any more"
            raise ValueError(f"source: {missing}")

    def _wanted(self, shard: Shard) -> "dict[str, list[_Wanted]]":
        """The records of a shard by their keys; of an image there may also be the mirrored copy."""
        images, wanted = self.images, {}
        alone = images.manifest.of_shard(shard)
        source = open_source(images.folder, alone, shard.split, schema=Schema({}))
        for start in range(0, shard.records, CHUNK):
            for number, record in enumerate(source.read(range(start, min(start + CHUNK, shard.records))), start):
                try:
                    key = image_key(record)
                except RecordError as error:
                    raise ValueError(
                        f"features: {epath.Path(images.folder) / shard.file}: record {number}: {error}"
                    ) from None
                height, width = (images.manifest.vae.stride * side for side in record["latent"].shape[1:])
                one = _Wanted(number, key, record.get("content_hash"), height, width, bool(record.get("mirrored")))
                wanted.setdefault(record["key"], []).append(one)
        return wanted

    def _look(self, row: Row, wanted: "dict[str, list[_Wanted]]") -> "list[_Shown]":
        name, content = shown_key(row.key), content_hash(row)
        records = wanted[name]
        if any(record.content not in (None, content) for record in records):
            raise ValueError(f"source: {name} is not the image that was prepared")
        try:
            image = open_image(row.image, self.images.max_pixels)
        except ImageError as error:
            raise ValueError(f"source: {name} cannot be read any more: {error}") from None
        pixels = np.asarray(cover_crop(image, records[0].height, records[0].width))
        return [
            _Shown(record.number, record.key, pixels[:, ::-1] if record.is_mirrored else pixels) for record in records
        ]


def _maps(model: Any, images: UInt8[Array, "n height width 3"]) -> Float16[Array, "n rows columns dim"]:
    return model.maps(images).astype(jnp.float16)


class _Wanted(NamedTuple):
    """A record whose image is looked for: its number in the shard, and what the latent shows of the image."""

    number: int
    key: bytes
    content: bytes | None
    height: int
    width: int
    is_mirrored: bool


class _Shown(NamedTuple):
    """What the latent of a record shows."""

    number: int
    key: bytes
    pixels: UInt8[np.ndarray, "height width 3"]


def _batches(images: Iterator[_Shown], size: int) -> Iterator[list[_Shown]]:
    """Batches of images of one size; the last ones of each size may be smaller."""
    waiting: dict[tuple[int, ...], list[_Shown]] = {}
    for image in images:
        batch = waiting.setdefault(image.pixels.shape, [])
        batch.append(image)
        if len(batch) == size:
            yield batch
            waiting[image.pixels.shape] = []
    yield from filter(None, waiting.values())


def _write_shards(maker: MapsMaker, engine: Engine) -> None:
    images = maker.images
    shards = images.manifest.shards_of("train")
    units = {unit.file("train"): unit for unit in images.source.units()}
    unknown = next((shard.file for shard in shards if shard.file not in units), None)
    if unknown is not None:
        raise ValueError(f"source: has no part for {unknown}: it is not the source that was prepared")
    todo = [(units[shard.file], shard) for shard in shards if read_sidecar(maker.folder / shard.file) is None]
    total, left = (sum(shard.records for shard in some) for some in (shards, [shard for _, shard in todo]))
    with work_progress("features", "images", total, left) as progress:
        for records in engine.run(maker, todo):
            progress.finish(records)


def _finish(folder: epath.Path, manifest: Manifest, network: FeatureNetwork) -> FeatureManifest:
    shards = manifest.shards_of("train")
    sidecars = [finished_sidecar(folder / shard.file) for shard in shards]
    cache = FeatureManifest(
        network=network.name,
        identity=network.map_identity,
        shape=network.map_shape,
        data=manifest.id,
        shards=tuple(map(described, shards, sidecars)),
    )
    write_json(folder / FILE_NAME, as_json(cache))
    return cache


def _summary(folder: epath.Path, cache: FeatureManifest) -> str:
    rows, columns, width = cache.shape
    records = sum(shard.records for shard in cache.shards)
    megabytes = sum(shard.bytes for shard in cache.shards) / 1e6
    return f"{folder}: maps of {records} images by {cache.network}, {rows}x{columns}x{width}, {megabytes:.1f} MB"
