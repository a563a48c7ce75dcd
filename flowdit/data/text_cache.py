"""Text features computed once: a folder of shards parallel to those of a data set, and `text_features.json`.

Record i of a shard holds the features of both captions of record i of the data shard of the same name, valid tokens only,
and a key of the captions. bfloat16 is stored as its 16 bits, because records know no bfloat16. The cache is bound to
encoder, dtype, length, data set and captions: a reader refuses any other, because features of another encoder or dtype
give plausible losses and wrong models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Float64

from flowdit.data.captions import Counter, caption_key, choose_long
from flowdit.data.manifest import Manifest, Shard, check_shards, parse_fields, read_json, verify_shards
from flowdit.data.record_files import RecordFiles, check_files
from flowdit.data.records import RecordError
from flowdit.models.text_encoder import TextEncoder

FILE_NAME = "text_features.json"
SCHEMA_VERSION = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
CAPTIONS = ("short_caption", "long_caption")


@dataclass(frozen=True)
class CacheManifest:
    """The contents of `text_features.json`. `data` is the id of the data set's manifest; empty captions do not count."""

    encoder: str
    fingerprint: str
    dtype: Literal["bfloat16", "float32"]
    max_length: int
    width: int
    data: str
    captions: int
    truncated: int
    shards: tuple[Shard, ...]
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def parse(cls, data: Any) -> "CacheManifest":
        """The manifest in what came out of JSON. Raises `ManifestError` naming the field that breaks a rule."""
        manifest = parse_fields(cls, data, SCHEMA_VERSION)
        check_shards(manifest.shards)
        return manifest

    def check_made_by(self, folder: Path, encoder: TextEncoder, manifest: Manifest) -> None:
        """Raise `ValueError` saying what differs unless `encoder` made these features, of that data set."""
        theirs, ours = f"{self.fingerprint} ({self.encoder})", f"{encoder.fingerprint} ({encoder.name})"
        for name, same, got, expected in (
            ("fingerprint of the encoder", self.fingerprint == encoder.fingerprint, theirs, ours),
            ("dtype", self.dtype == encoder.dtype, self.dtype, encoder.dtype),
            ("max_length", self.max_length == encoder.max_length, self.max_length, encoder.max_length),
            ("width", self.width == encoder.width, self.width, encoder.width),
            ("id of the data set", self.data == manifest.id, self.data, manifest.id),
        ):
            if not same:
                raise ValueError(f"{folder / FILE_NAME}: {name}: must be {expected} as in this run, got {got}")


class CachedText(NamedTuple):
    """Features of captions, zero where `mask` is False; `truncated`: the caption had more tokens than were read."""

    features: Float[np.ndarray, "n max_length width"]
    mask: Bool[np.ndarray, "n max_length"]
    truncated: Bool[np.ndarray, " n"]


class FeatureCache:
    """The features of one split, in the order of its records."""

    def __init__(self, paths: Sequence[Path], cache: CacheManifest, counts: Sequence[int]):
        self._manifest = cache
        self._files = RecordFiles(paths, counts, self._check)

    def __len__(self) -> int:
        return len(self._files)

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]], use_long: Bool[np.ndarray, " n"]
    ) -> CachedText:
        """Features (n, max_length, width), in the encoder's dtype, of one caption of each of the data set's `records`.

        Raises `RecordError` naming file and record if they are damaged or were made from other captions.
        """
        length, width = self._manifest.max_length, self._manifest.width
        features = np.zeros((len(indices), length, width), DTYPES[self._manifest.dtype])
        lengths, truncated = np.zeros(len(indices), int), np.zeros(len(indices), bool)
        cached = self._files.read(indices)
        for row, (index, entry, record, long) in enumerate(zip(indices, cached, records, use_long, strict=True)):
            self._files.locate(index, _check_key, entry, record)
            packed = entry[CAPTIONS[int(long)]].view(features.dtype)
            self._files.locate(index, _check_finite, packed)
            features[row, : len(packed)] = packed
            lengths[row], truncated[row] = len(packed), entry["truncated"][int(long)]
        return CachedText(features, np.arange(length) < lengths[:, None], truncated)

    def _check(self, entry: Mapping[str, Any]) -> None:
        if missing := {"key", "truncated", *CAPTIONS} - entry.keys():
            raise RecordError(f"{min(missing)}: is missing, the record has {sorted(entry)}")
        _check_array("truncated", entry["truncated"], np.dtype(bool), (len(CAPTIONS),))
        for name in CAPTIONS:
            _check_array(name, entry[name], packed_dtype(self._manifest.dtype), (None, self._manifest.width))
            if (tokens := len(entry[name])) > self._manifest.max_length:
                raise RecordError(f"{name}: must have at most {self._manifest.max_length} tokens, got {tokens}")


def packed_dtype(dtype: str) -> np.dtype:
    """What features of `dtype` are stored as."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)


def _check_array(name: str, value: Any, dtype: np.dtype, shape: tuple[int | None, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        raise RecordError(f"{name}: must be an array of {dtype}, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        raise RecordError(f"{name}: must have shape {shape}, got {value.shape}")


def _check_key(entry: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    expected, got = caption_key(*(record[name] for name in CAPTIONS)), entry["key"]
    if got != expected:
        shown = got.hex() if isinstance(got, bytes) else repr(got)
        raise RecordError(f"key: must be {expected.hex()} for the captions of the data, got {shown}: other captions")


def _check_finite(features: np.ndarray) -> None:
    if not np.isfinite(features.astype(np.float32)).all():  # five times faster than on bfloat16 itself
        raise RecordError("features: must be finite, got NaN or infinite values")


class CachedCaptions:
    """Reads `text_features` (n, max_length, width) in the encoder's dtype beside the mask (`captions.TextReader`)."""

    def __init__(self, cache: FeatureCache, long_caption_prob: float):
        self._cache, self._long_caption_prob, self._truncated = cache, long_caption_prob, Counter()

    @property
    def truncated(self) -> int:
        return self._truncated.value

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]], draws: Float64[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        text = self._cache.read(indices, records, choose_long(records, draws, self._long_caption_prob))
        self._truncated.add(int(text.truncated.sum()))
        return {"text_features": text.features, "text_mask": text.mask}


def open_cache(
    folder: str | Path,
    manifest: Manifest,
    split: str,
    encoder: TextEncoder,
    long_caption_prob: float,
    *,
    verify_hashes: bool = False,
) -> CachedCaptions:
    """The cached text of `split`, of the data set with this manifest.

    Raises `ValueError` in one line if there is no cache, it was made by another encoder or of other data, or a shard is
    missing or changed (contents are compared as `manifest.verify` does).
    """
    folder = Path(folder)
    if not (folder / FILE_NAME).is_file():
        raise ValueError(
            f"data.text_cache: {folder} has no {FILE_NAME}; `python -m flowdit.prepare text_encoder=...` makes it"
        )
    cache = read_json(folder / FILE_NAME, CacheManifest.parse)
    cache.check_made_by(folder, encoder, manifest)
    shards = [shard for shard in cache.shards if shard.split == split]
    if [(s.file, s.records) for s in shards] != [(s.file, s.records) for s in manifest.shards_of(split)]:
        raise ValueError(f"{folder / FILE_NAME}: shards: must be parallel to those of the data set")
    verify_shards(folder, shards, hashes=verify_hashes)
    paths = [folder / shard.file for shard in shards]
    check_files(paths, shards)
    return CachedCaptions(FeatureCache(paths, cache, [shard.records for shard in shards]), long_caption_prob)
