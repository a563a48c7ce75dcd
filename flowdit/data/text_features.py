"""Writing a cache of text features (`text_cache`) from captions; can be interrupted and run again."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from flowdit.data.captions import CAPTIONS, caption_key
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest, Shard, as_json, read_manifest, verify_shards, write_json
from flowdit.data.plan import claim_folder, claimed_id, former_ids
from flowdit.data.preparation.engines import LOOP, Engine
from flowdit.data.progress import advance, work_progress
from flowdit.data.schema import CAPTION_FIELDS, Schema
from flowdit.data.shards import described, finished_sidecar, read_sidecar, remove_sidecar, remove_temporary, write_shard
from flowdit.data.text_cache import FILE_NAME, CacheManifest, packed_dtype
from flowdit.models.text_encoder import MAX_BATCH, TextEncoder

logger = logging.getLogger(__name__)

CHUNK = 128
"""Records per chunk: enough to find captions of similar length; 140 MB of features for T5Gemma."""


def write_cache(
    folder: epath.PathLike,
    data: epath.PathLike,
    manifest: Manifest,
    encoder: TextEncoder,
    engine: Engine = LOOP,
    make_encoder: Callable[[], TextEncoder] | None = None,
) -> CacheManifest:
    """Write the features of all captions of the data set in `data`, or continue an interrupted run.

    The workers of an `engine` in other processes get their encoder from `make_encoder`, which can be pickled.

    Raises `ValueError` with one line if `folder` holds features of another encoder, dtype, length or data set,
    `OSError` if it cannot be written.
    """
    folder, data = epath.Path(folder), epath.Path(data)
    identity = {name: getattr(encoder, name) for name in ("fingerprint", "dtype", "max_length", "width")}
    former = former_ids(data)
    data_id = claimed_id("text_cache", folder, manifest.ids, former)
    claim_folder("text_cache", folder, {"encoder": encoder.name, **identity, "data": data_id}, FILE_NAME)
    if (folder / FILE_NAME).exists():
        cache = read_manifest(CacheManifest, folder / FILE_NAME)
        cache.check_made_by(folder, encoder, manifest, former)
        verify_shards(folder, cache.shards, hashes=False)
        logger.info("%s already holds the text features of this data set: nothing to do", folder)
    else:
        worker = CaptionsMaker(make_encoder or (lambda: encoder), encoder.fingerprint, folder, data, manifest)
        _write_shards(worker, engine)
        cache = _finish(folder, manifest, encoder)
        logger.info(_summary(folder, cache))
    for shard in cache.shards:
        remove_sidecar(folder / shard.file)
    remove_temporary(folder)
    return cache


class CaptionsMaker(NamedTuple):
    """Makes the function that writes the features of a shard, in any process."""

    make_encoder: Callable[[], TextEncoder]
    fingerprint: str
    folder: epath.Path
    data: epath.Path
    manifest: Manifest

    def __call__(self) -> Callable[[Shard], int]:
        encoder = self.make_encoder()
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"text_encoder: {encoder.name} is another network on this machine than where the run began"
            )
        return functools.partial(self._write, encoder)

    def _write(self, encoder: TextEncoder, shard: Shard) -> int:
        """The number of records of the shard."""
        write_shard(self.folder / shard.file, self._records(encoder, shard), _text_sums)
        return shard.records

    def _records(self, encoder: TextEncoder, shard: Shard) -> Iterator[dict[str, Any]]:
        alone = self.manifest.of_shard(shard)
        schema = Schema(CAPTION_FIELDS)  # latents may have several shapes, and are not read here
        source = open_source(self.data, alone, shard.split, schema=schema)
        for start in range(0, len(source), CHUNK):
            records = source.read(range(start, min(start + CHUNK, len(source))))
            yield from _encoded([record[name] for record in records for name in CAPTIONS], encoder)
            advance(len(records))


def _write_shards(maker: CaptionsMaker, engine: Engine) -> None:
    shards = maker.manifest.shards
    todo = [shard for shard in shards if read_sidecar(maker.folder / shard.file) is None]
    total, left = (sum(shard.records for shard in some) for some in (shards, todo))
    with work_progress("encoding text", "records", total, left) as progress:
        for records in engine.run(maker, todo):
            progress.finish(records)


def _encoded(captions: Sequence[str], encoder: TextEncoder) -> list[dict[str, Any]]:
    """The records of `captions`, in order. Captions of similar length share a batch, padded to its longest."""
    entries: dict[int, dict[str, Any]] = {}
    by_length: list[int] = np.argsort(encoder.tokenize(captions).mask.sum(1), kind="stable").tolist()
    for start in range(0, len(captions), MAX_BATCH):
        batch = by_length[start : start + MAX_BATCH]
        texts = encoder.encode([captions[i] for i in batch])
        for i, features, mask, truncated in zip(batch, *texts, strict=True):
            packed = _pack(features[mask], encoder)
            entries[i] = {"key": caption_key(captions[i]), "truncated": bool(truncated), "features": packed}
    return [entries[i] for i in range(len(captions))]


def _pack(features: Float[np.ndarray, "tokens width"], encoder: TextEncoder) -> np.ndarray:
    if not np.isfinite(features.astype(np.float32)).all():
        raise ValueError(f"text_encoder: features of {encoder.name} must be finite in {encoder.dtype}")
    return features.view(packed_dtype(encoder.dtype))


def _text_sums(record: Mapping[str, Any]) -> dict[str, int]:
    return {"captions": int(len(record["features"]) > 0), "truncated": int(record["truncated"])}


def _finish(folder: epath.Path, manifest: Manifest, encoder: TextEncoder) -> CacheManifest:
    sidecars = [finished_sidecar(folder / shard.file) for shard in manifest.shards]
    cache = CacheManifest(
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        dtype="bfloat16" if encoder.dtype == "bfloat16" else "float32",
        max_length=encoder.max_length,
        width=encoder.width,
        data=manifest.id,
        captions=sum(sidecar.sums["captions"] for sidecar in sidecars),
        truncated=sum(sidecar.sums["truncated"] for sidecar in sidecars),
        shards=tuple(map(described, manifest.shards, sidecars)),
    )
    write_json(folder / FILE_NAME, as_json(cache))
    return cache


def _summary(folder: epath.Path, cache: CacheManifest) -> str:
    megabytes = sum(shard.bytes for shard in cache.shards) / 1e6
    return (
        f"{folder}: features of {cache.captions} captions by {cache.encoder} in {cache.dtype}, {megabytes:.1f} MB, "
        f"{cache.truncated} captions truncated to {cache.max_length} tokens"
    )
