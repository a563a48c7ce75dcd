"""Reading a cache of text features: a folder with the same shards as a data set, and `text_features.json`.

Records 2i and 2i + 1 of a shard hold the features of the short and the long caption of record i of the data shard of
the same name, so that only the chosen one is read: features of valid tokens (none for an empty caption) and a key of
the text. bfloat16 is stored as uint16 bits, as records do not support it. A cache belongs to one encoder, dtype,
length, data set and captions; any other is refused, as features of another encoder or dtype give plausible losses but
wrong models.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Float64
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flowdit.data.captions import CAPTIONS, CaptionCounts, caption_key, choose_long, chosen_captions
from flowdit.data.manifest import (
    HASH_LIMIT_BYTES,
    Manifest,
    Shard,
    check_different,
    read_manifest,
)
from flowdit.data.plan import former_ids
from flowdit.data.record_files import RecordFiles, ShardFiles
from flowdit.data.records import RecordError
from flowdit.data.shard_cache import open_shards, provide
from flowdit.data.shard_pool import ShardPool
from flowdit.fields import about
from flowdit.json_input import STRICT, Count, Listed
from flowdit.models.text_encoder import TextEncoder
from flowdit.storage import connect

FILE_NAME = "text_features.json"
SCHEMA_VERSION = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CacheManifest:
    """The contents of `text_features.json`. `data` is the id of the data set's manifest, of either version;
    empty captions are not counted.

    Shards correspond to those of the data set, with a record for each caption of a record.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    encoder: str
    fingerprint: str
    dtype: Literal["bfloat16", "float32"]
    max_length: Count
    width: Count
    data: str
    captions: Annotated[int, Field(ge=0)]
    truncated: Annotated[int, Field(ge=0)]
    shards: Annotated[Listed[Shard], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "CacheManifest":
        check_different(self.shards)
        return self

    def check_made_by(
        self, folder: epath.Path, encoder: TextEncoder, manifest: Manifest, former: Sequence[str] = ()
    ) -> None:
        """Raise `ValueError` with the difference unless `encoder` made these features from that data set.

        `former` are ids that the data set had before (`plan.former_ids`).
        """
        theirs, ours = f"{self.fingerprint} ({self.encoder})", f"{encoder.fingerprint} ({encoder.name})"
        for name, same, got, expected in (
            ("fingerprint of the encoder", self.fingerprint == encoder.fingerprint, theirs, ours),
            ("dtype", self.dtype == encoder.dtype, self.dtype, encoder.dtype),
            ("max_length", self.max_length == encoder.max_length, self.max_length, encoder.max_length),
            ("width", self.width == encoder.width, self.width, encoder.width),
        ):
            if not same:
                raise ValueError(f"{folder / FILE_NAME}: {name}: must be {expected} as in this run, got {got}")
        self.check_made_from(folder, manifest, former)

    def check_made_from(self, folder: epath.Path, manifest: Manifest, former: Sequence[str] = ()) -> None:
        """Raise `ValueError` with the difference unless these are features of that data set."""
        if self.data not in (*manifest.ids, *former):
            problem = f"must be {manifest.id} as in this run, got {self.data}"
            raise ValueError(f"{folder / FILE_NAME}: id of the data set: {problem}")
        parallel = [(shard.file, shard.split, len(CAPTIONS) * shard.records) for shard in manifest.shards]
        if [(shard.file, shard.split, shard.records) for shard in self.shards] != parallel:
            raise ValueError(f"{folder / FILE_NAME}: shards: must be those of the data set, with two records for each")


class CachedText(NamedTuple):
    """Features of captions, zero where `mask` is False; `truncated`: the caption was cut."""

    features: Float[np.ndarray, "n max_length width"]
    mask: Bool[np.ndarray, "n max_length"]
    truncated: Bool[np.ndarray, " n"]


class FeatureCache:
    """The features of one split, by caption: 2i is the short caption of record i, 2i + 1 the long one."""

    def __init__(self, files: ShardFiles, cache: CacheManifest, counts: Sequence[int]):
        self._manifest, self.files = cache, files
        self._files = RecordFiles(files, counts, self._check)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int], captions: Sequence[str]) -> CachedText:
        """Features (n, max_length, width), in the encoder's dtype, of the captions at `indices`.

        Raises `RecordError` naming file and record if it is damaged or was not made from these `captions`.
        """
        length, width = self._manifest.max_length, self._manifest.width
        features = np.zeros((len(indices), length, width), DTYPES[self._manifest.dtype])
        lengths, truncated = np.zeros(len(indices), int), np.zeros(len(indices), bool)
        for row, (packed, is_cut) in enumerate(self.read_packed(indices, captions)):
            features[row, : len(packed)] = packed
            lengths[row], truncated[row] = len(packed), is_cut
        return CachedText(features, np.arange(length) < lengths[:, None], truncated)

    def read_packed(
        self, indices: Sequence[int], captions: Sequence[str]
    ) -> Iterator[tuple[Float[np.ndarray, "tokens width"], bool]]:
        """`read` without padding: the features of each caption, and whether it was cut."""
        for index, entry, caption in zip(indices, self._files.read(indices), captions, strict=True):
            self._files.locate(index, _check_key, entry["key"], caption)
            packed = entry["features"].view(DTYPES[self._manifest.dtype])
            self._files.locate(index, _check_finite, packed)
            yield packed, entry["truncated"]

    def _check(self, entry: Mapping[str, Any]) -> None:
        if missing := {"key", "truncated", "features"} - entry.keys():
            raise RecordError(f"{min(missing)}: is missing, the record has {sorted(entry)}")
        if type(entry["truncated"]) is not bool:
            raise RecordError(f"truncated: must be a bool, got {type(entry['truncated']).__name__}")
        features = entry["features"]
        limit = self._manifest.max_length
        width = self._manifest.width
        dtype = packed_dtype(self._manifest.dtype)
        if not isinstance(features, np.ndarray) or features.dtype != dtype:
            found = getattr(features, "dtype", type(features).__name__)
            raise RecordError(f"features: must be an array of {dtype}, got {found}")
        if features.ndim != 2 or features.shape[1] != width or len(features) > limit:
            raise RecordError(f"features: must have shape (at most {limit}, {width}), got {features.shape}")


def packed_dtype(dtype: str) -> np.dtype:
    """The dtype in which features of `dtype` are stored."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)


def _check_key(key: Any, caption: str) -> None:
    expected = caption_key(caption)
    if not isinstance(key, bytes) or key != expected:
        shown = key[:20].hex() if isinstance(key, bytes) else type(key).__name__
        raise RecordError(f"key: must be {expected.hex()} for the caption of the data, got {shown}: another caption")


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features.astype(np.float32)).all():  # five times faster than in bfloat16
        raise RecordError("features: must be finite, got NaN or infinite values")


class CachedCaptions:
    """Reads `text_features` (n, max_length, width) in the encoder's dtype and the mask (`captions.TextReader`)."""

    def __init__(self, cache: FeatureCache, long_caption_prob: float):
        self._cache, self.files = cache, cache.files
        self._long_caption_prob = long_caption_prob
        self.counts = CaptionCounts()

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]], draws: Float64[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        use_long = choose_long(records, draws, self._long_caption_prob)
        numbers = len(CAPTIONS) * np.asarray(indices) + use_long
        text = self._cache.read(numbers.tolist(), chosen_captions(records, use_long))
        self.counts.add(text.truncated)
        return {"text_features": text.features, "text_mask": text.mask}


def open_cache(
    folder: epath.PathLike,
    manifest: Manifest,
    split: str,
    encoder: TextEncoder,
    long_caption_prob: float,
    *,
    data: epath.PathLike | None = None,
    local_dir: str | None = None,
    pool: ShardPool | None = None,
    verify_hashes: bool = False,
    hash_limit: int = HASH_LIMIT_BYTES,
) -> CachedCaptions:
    """Open the cached text of `split`, for the data set with this manifest. A cache from before a correction of its
    licence is accepted if its folder `data` is given.

    Raises `ValueError` with one line if there is no cache, it was made by another encoder or from other data, or a
    shard is missing or changed (hashes are compared as in `manifest.verify`). Shards of an object store are copied to
    `local_dir` (`data.mirror`), or read by way of `pool`.
    """
    with about("data.text_cache"):
        folder = connect(folder)
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"data.text_cache: {folder} has no {FILE_NAME}; `python -m flowdit.prepare text_encoder=...` makes it"
        )
    cache = read_manifest(CacheManifest, folder / FILE_NAME)
    cache.check_made_by(folder, encoder, manifest, () if data is None else former_ids(data))
    shards = [shard for shard in cache.shards if shard.split == split]
    options = {"hashes": verify_hashes, "limit": hash_limit}
    files = open_shards(provide(folder, shards, local_dir, pool, **options), shards, pool, **options)
    return CachedCaptions(FeatureCache(files, cache, [shard.records for shard in shards]), long_caption_prob)
