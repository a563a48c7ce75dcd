"""The records of a split, read by number, and the settings of the training data."""

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float64
from pydantic.dataclasses import dataclass as pydantic_dataclass

from flowdit.data.captions import TextReader
from flowdit.data.feature_cache import MAP, FeatureMaps
from flowdit.data.manifest import HASH_LIMIT_BYTES, Manifest
from flowdit.data.record_files import BadRecords, RecordFiles, ShardFiles
from flowdit.data.records import RecordError
from flowdit.data.schema import Schema
from flowdit.data.shard_cache import largest_window, open_shards
from flowdit.data.shard_pool import ShardPool, shard_pool
from flowdit.fields import FieldError, require
from flowdit.json_input import STRICT, InputError, Positive, parse

Batch = dict[str, np.ndarray]


@pydantic_dataclass(frozen=True, config=STRICT)
class DataFolder:
    """A data set of a run: its folder, its weight in a mixture, and its caches of text features and feature maps."""

    path: str
    weight: Positive = 1.0
    text_cache: str | None = None
    feature_cache: str | None = None


@dataclass
class DataConfig:
    """Settings of the training data and its loader.

    Attributes:
        path: folder made by `python -m flowdit.prepare`, also in an object store (`s3://`, `gs://`).
        num_threads: threads of a process that read and decode batches.
        prefetch: batches prefetched ahead of the training step.
        verify_hashes: compare the hashes of all shards with the manifest when a run starts; for small sets they are
            always compared.
        long_caption_prob: probability of reading the long caption of a record, if it has one; in [0, 1].
        tag_dropout: probability with which each part of a caption behind its first comma is left out in training; in
            [0, 1]. Not with `text_cache`, which holds features of whole captions.
        text_cache: folder of text features written by `prepare`; null: the text encoder runs in the training loop.
        feature_cache: folder of feature maps written by `prepare features=...`, for auxiliary losses that read them, such
            as `auxiliary.repa`; without such a loss it is not opened.
        max_bad_records: damaged records per split that are reported and replaced by the next readable one; one more
            ends the run. Each process counts its own, from its start.
        stall_timeout: seconds of waiting for a batch, or for a checkpoint to be stored, after which a warning names the
            files and records that are being read, or the checkpoint; repeated after twice the time, and so on; 0: never.
        local_dir: folder on a local disk for copies of the shards, if `path` or a cache is in an object store (`s3://`,
            `gs://`); null: `flowdit/data` in the user's cache folder, `~/.cache`.
        local_cache_gb: GB (10^9 bytes) of `local_dir` for shards in object stores, which are then copied when they are
            read; also changes the order of the records, which are shuffled within windows of shards. null: all shards
            are copied when the run starts.
        mix: further data sets to train on, a list of {path, weight, text_cache, feature_cache}; of the rows of all
            batches, each data set has the share of its weight among all, `weight` being that of `path`, to the nearest
            row of an epoch, and at least a row of each bucket. Their weights are 1 and their caches null by default.
        weight: weight of the data set at `path` if `mix` has others.
        merge_small_buckets: allow a bucket (images of one aspect ratio) with fewer records than a batch: its batches are
            filled from several epochs. Without, it is an error.
    """

    path: str = "???"
    num_threads: int = 4
    prefetch: int = 4
    verify_hashes: bool = False
    long_caption_prob: float = 0.5
    tag_dropout: float = 0.0
    text_cache: str | None = None
    feature_cache: str | None = None
    max_bad_records: int = 0
    stall_timeout: float = 60.0
    local_dir: str | None = None
    local_cache_gb: float | None = None
    mix: list[Any] = field(default_factory=list)
    weight: float = 1.0
    merge_small_buckets: bool = False

    @property
    def folders(self) -> list[DataFolder]:
        """All data sets, that of `path` first. Raises `FieldError` for an entry of `mix` that breaks a rule."""
        folders = [DataFolder(self.path, self.weight, self.text_cache, self.feature_cache)]
        for i, entry in enumerate(self.mix):
            try:
                folders.append(parse(DataFolder, entry))
            except InputError as problem:
                raise FieldError(f"mix[{i}]", str(problem)) from None
        return folders

    @property
    def pool(self) -> ShardPool | None:
        """The bounded cache for shards of object stores, if there is one."""
        return shard_pool(self.local_dir, self.local_cache_gb)

    @property
    def hash_limit(self) -> int:
        """Total size in bytes up to which hashes are compared at the start; 0 if damaged records are allowed."""
        return 0 if self.max_bad_records else HASH_LIMIT_BYTES

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require("num_threads", self.num_threads, self.num_threads >= 1, "must be at least 1")
        require("prefetch", self.prefetch, self.prefetch >= 1, "must be at least 1")
        require("max_bad_records", self.max_bad_records, self.max_bad_records >= 0, "must be 0 (none) or more")
        require("stall_timeout", self.stall_timeout, self.stall_timeout >= 0, "must be 0 (never) or more")
        is_positive = self.local_cache_gb is None or self.local_cache_gb > 0
        require("local_cache_gb", self.local_cache_gb, is_positive, "must be positive, or null")
        for name in ("long_caption_prob", "tag_dropout"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "must be in [0, 1]")
        rule = "must be 0 with text_cache, which holds features of whole captions"
        require("tag_dropout", self.tag_dropout, self.tag_dropout == 0 or self.text_cache is None, rule)
        is_weight = math.isfinite(self.weight) and self.weight > 0
        require("weight", self.weight, is_weight, "must be a finite number above 0")
        first, *others = self.folders
        for i, folder in enumerate(others):
            paths = [known.path for known in (first, *others[:i])]
            require(
                f"mix[{i}].path", folder.path, folder.path not in paths, "must be given once in data.path and data.mix"
            )
            rule = "must be given for all data sets of a mixture or for none"
            for name in ("text_cache", "feature_cache"):
                ours, theirs = getattr(first, name), getattr(folder, name)
                require(f"mix[{i}].{name}", theirs, (ours is None) == (theirs is None), rule)


class Source:
    """Random access to the records of one split by indices in [0, len(source)).

    A record is bad if it, or its record in a cache of captions or maps, is damaged or breaks a rule. It is replaced by the next
    readable one, wrapping around the end. That depends only on the files (and on the choice of captions), so batches
    keep their size and are the same on any number of processes and after a resume.
    """

    def __init__(
        self,
        files: ShardFiles,
        counts: Sequence[int],
        schema: Schema,
        text: TextReader | None = None,
        max_bad_records: int | None = None,
        maps: FeatureMaps | None = None,
    ):
        self.schema, self.text = schema, text
        self.maps = maps
        self.bad_records = BadRecords(max_bad_records)
        self._files = RecordFiles(files, counts, schema.check)

    def part(self, skipped: Sequence[int], counts: Sequence[int], schema: Schema) -> "Source":
        """The source reduced to `counts` records of each file, after the first `skipped`, with their own schema.

        Bad records are replaced by others of the part, and counted together with those of the whole.
        """
        part = copy.copy(self)
        part.schema, part._files = schema, self._files.part(skipped, counts, schema.check)
        return part

    def __len__(self) -> int:
        return len(self._files)

    @property
    def counts(self) -> list[int]:
        """The records of each shard."""
        return self._files.counts

    @property
    def bytes_of_shards(self) -> list[int]:
        """The room that each shard, with those of its captions and maps, needs in the local cache; 0 without one."""
        parts = [files.bytes for files in self._shard_files()]
        return [sum(part[i] for part in parts) for i in range(len(self.counts))]

    def prefer(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Begin to copy what is missing of the shards `now`, which are being read, and `ahead`, which come next."""
        for files in self._shard_files():
            files.prefer(now, ahead)

    def _shard_files(self) -> list[ShardFiles]:
        beside = [reader.files for reader in (self.text, self.maps) if reader is not None]
        return [self._files.files, *(files for files in beside if files is not None)]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read, decode and check the records at `indices`.

        Raises `RecordError` with file, record within the file, field and rule, if more are bad than allowed.
        """
        try:
            return self._files.read(indices)
        except RecordError as problem:
            self._refuse_unless_allowed(problem)
        return [self._next_readable(i, lambda j: self._files.read([j])[0]) for i in indices]

    def read_batch(self, indices: Sequence[int], draws: Float64[np.ndarray, " n"] | None = None) -> Batch:
        """The records at `indices` stacked: `latent` float32 (n, channels, height, width), `label` int32 (n,).

        A source with `text` takes `draws`, a random number in [0, 1) per record, and returns the arrays of `text`
        instead of captions. One with `maps` also returns those, as `feature_map`. Raises `RecordError` like `read`.
        """
        try:
            return self._read_batch(indices, draws)
        except RecordError as problem:
            self._refuse_unless_allowed(problem)

        def read_row(row: int, index: int) -> Batch:
            return self._read_batch([index], None if draws is None else draws[row : row + 1])

        rows = [self._next_readable(i, functools.partial(read_row, row)) for row, i in enumerate(indices)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _read_batch(self, indices: Sequence[int], draws: Float64[np.ndarray, " n"] | None) -> Batch:
        records = self._files.read(indices)
        batch = self.schema.stack(records)
        try:
            self.schema.check_numbers(batch)
        except RecordError:
            for i, record in zip(indices, records, strict=True):
                self._files.locate(i, self.schema.check_numbers, record)
            raise
        places = self._files.numbers(indices)
        if self.maps is not None:
            batch[MAP] = self.maps.read(places, records)
        if self.text is None:
            return batch
        assert draws is not None
        numbers = {name: values for name, values in batch.items() if values.dtype != object}
        return numbers | self.text.read(places, records, draws)

    def places(self, indices: Sequence[int], draws: Float64[np.ndarray, " n"]) -> list[tuple[os.PathLike[str], int]]:
        """File, and number within it, of the records that `read_batch` returns for `indices` and `draws`."""
        if self.bad_records.limit:
            indices = [self._stand_in(index, draws[row : row + 1]) for row, index in enumerate(indices)]
        return [self._files.place(index) for index in indices]

    def _stand_in(self, index: int, draw: Float64[np.ndarray, "1"]) -> int:
        """The first readable record from `index` on, without counting bad ones."""
        for i in range(index, index + len(self)):
            with contextlib.suppress(RecordError):
                self._read_batch([i % len(self)], draw)
                return i % len(self)
        return index

    def _refuse_unless_allowed(self, problem: RecordError) -> None:
        if not self.bad_records.limit:
            self.bad_records.add(problem)

    def _next_readable(self, index: int, read: Callable[[int], Any]) -> Any:
        """The result of `read` for the first readable record from `index` on."""
        for i in range(index, index + len(self)):
            try:
                return read(i % len(self))
            except RecordError as problem:
                self.bad_records.add(problem)
        raise RecordError(f"no record can be read: all {len(self)} of the split or bucket are bad")


def open_source(
    folder: epath.PathLike,
    manifest: Manifest,
    split: str = "train",
    *,
    schema: Schema,
    text: TextReader | None = None,
    maps: FeatureMaps | None = None,
    max_bad_records: int | None = None,
    pool: ShardPool | None = None,
    hashes: bool = False,
    limit: int = HASH_LIMIT_BYTES,
    is_read: bool = True,
) -> Source:
    """Open the records of `split` ("train" or "validation") with fields of `schema`, captions read by `text`, and `maps`.

    Latents must have the manifest's `latent_dtype`. `folder` is local, or in an object store with `pool`; `hashes` and
    `limit` are then those of `manifest.verify`, for the copies (`shard_cache.open_shards`). The first record is read
    unless `is_read` is false.

    Raises `ValueError` naming the file if a shard is missing, truncated, not an ArrayRecord file, or has another number
    of records than in the manifest, and `RecordError` if the first record breaks a rule.
    """
    shards = manifest.shards_of(split)
    if not shards:
        raise ValueError(f"{folder}: the data set has no records in split {split!r}")
    files = open_shards(folder, shards, pool, hashes=hashes, limit=limit)
    counts = [shard.records for shard in shards]
    source = Source(files, counts, schema.of_dtype(manifest.latent_dtype), text, max_bad_records, maps)
    largest_window([source.bytes_of_shards], pool)  # refuses a cache that is too small
    if is_read:
        source.read([0])  # finds a rule that all records break before a run starts
    return source


def open_split(
    folder: epath.PathLike, manifest: Manifest, split: str, **options: Any
) -> dict[tuple[int, int, int], Source]:
    """`open_source` for each bucket that has records, by its latent shape, which replaces that of the schema."""
    whole = open_source(folder, manifest, split, **options, is_read=False)
    shards, sources = manifest.shards_of(split), {}
    for i, (shape, records) in enumerate(zip(manifest.bucket_shapes, manifest.bucket_counts(split), strict=True)):
        if records:
            counts = [shard.buckets[i] if manifest.buckets else shard.records for shard in shards]
            skipped = [sum(shard.buckets[:i]) for shard in shards]
            sources[shape] = source = whole.part(skipped, counts, whole.schema.of_shape(shape))
            source.read([0])
    return sources
