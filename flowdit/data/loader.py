"""Loading ArrayRecord data with Grain: batches that depend only on the seed and the batch number.

Most of a loader's cost is Grain's bookkeeping per element, so its elements are the numbers of batches, and one map reads
and decodes a process's rows of a batch. Which records they are follows from the seed and the number (`data.order`), and
the state is the number of the next batch: a run may continue on any number of processes and loader threads.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from etils import epath
from jaxtyping import Float64, Int

from flowdit.data.captions import TextReader
from flowdit.data.manifest import HASH_LIMIT_BYTES, Manifest
from flowdit.data.order import ShuffledOrder
from flowdit.data.record_files import BadRecords, RecordFiles, being_read, check_files
from flowdit.data.records import RecordError
from flowdit.data.schema import Schema
from flowdit.fields import require

Batch = dict[str, np.ndarray]


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
        text_cache: folder of text features written by `prepare`; null: the text encoder runs in the training loop.
        max_bad_records: damaged records per split that are reported and replaced by the next readable one; one more
            ends the run. Each process counts its own, from its start.
        stall_timeout: seconds of waiting for a batch, or for a checkpoint to be stored, after which a warning names the
            files and records that are being read, or the checkpoint; repeated after twice the time, and so on; 0: never.
        local_dir: folder on a local disk for copies of the shards, if `path` or `text_cache` is in an object store
            (`s3://`, `gs://`); null: `flowdit/data` in the user's cache folder, `~/.cache`.
    """

    path: str = "???"
    num_threads: int = 4
    prefetch: int = 4
    verify_hashes: bool = False
    long_caption_prob: float = 0.5
    text_cache: str | None = None
    max_bad_records: int = 0
    stall_timeout: float = 60.0
    local_dir: str | None = None

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
        probability = self.long_caption_prob
        require("long_caption_prob", probability, 0 <= probability <= 1, "must be in [0, 1]")


class Source:
    """Random access to the records of one split by indices in [0, len(source)).

    A record is bad if it, or its caption's record in the cache, is damaged or breaks a rule. It is replaced by the next
    readable one, wrapping around the end. That depends only on the files (and on the choice of captions), so batches
    keep their size and are the same on any number of processes and after a resume.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        schema: Schema,
        text: TextReader | None = None,
        max_bad_records: int | None = None,
    ):
        self.schema, self.text = schema, text
        self.bad_records = BadRecords(max_bad_records)
        self._files = RecordFiles(paths, counts, schema.check)

    def __len__(self) -> int:
        return len(self._files)

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
        instead of captions. Raises `RecordError` like `read`.
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
        if self.text is None:
            return batch
        assert draws is not None
        numbers = {name: values for name, values in batch.items() if values.dtype != object}
        return numbers | self.text.read(indices, records, draws)

    def places(self, indices: Sequence[int], draws: Float64[np.ndarray, " n"]) -> list[tuple[Path, int]]:
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
        raise RecordError(f"no record can be read: all {len(self)} of the split are bad")


def open_source(
    folder: epath.PathLike,
    manifest: Manifest,
    split: str = "train",
    *,
    schema: Schema,
    text: TextReader | None = None,
    max_bad_records: int | None = None,
) -> Source:
    """Open the records of `split` ("train" or "validation") with fields of `schema` and captions read by `text`.

    Latents must have the manifest's `latent_dtype`. `folder` is local (`data.mirror` copies shards of object stores).

    Raises `ValueError` naming the file if a shard is missing, truncated, not an ArrayRecord file, or has another number
    of records than in the manifest, and `RecordError` if the first record breaks a rule.
    """
    shards = manifest.shards_of(split)
    if not shards:
        raise ValueError(f"{folder}: the data set has no records in split {split!r}")
    paths = [Path(folder) / shard.file for shard in shards]  # ArrayRecord reads local files
    counts = [shard.records for shard in shards]
    check_files(paths, shards)
    source = Source(paths, counts, schema.of_dtype(manifest.latent_dtype), text, max_bad_records)
    source.read([0])  # finds a rule that all records break before a run starts
    return source


@dataclass(frozen=True)
class DataSet:
    """An opened, verified data set; `validation` is None without that split."""

    manifest: Manifest
    train: Source
    validation: Source | None


class TrainStream(Iterator[Batch]):
    """An endless stream of the `rows` (default: all) of the global batches; every epoch is a new permutation.

    Batch number i, including the choice of captions, is a function of (seed, i): a row is the same for any division of
    the batch among processes, `num_threads` and `prefetch`. Batches continue across the end of an epoch, so that
    no record is dropped.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        num_threads: int = 4,
        prefetch: int = 4,
        rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"train.batch_size: must be at least 1, got {batch_size}")
        self._identity = {"seed": seed, "batch_size": batch_size, "num_records": len(source)}
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._source, self._order = source, ShuffledOrder(seed, len(source))
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._dataset = grain.MapDataset.range(sys.maxsize // batch_size).map(self.read)
        self.waiting_for: int | None = None
        """The number of the batch that `next` is waiting for."""
        self._reading: dict[int, int] = {}  # batch numbers by thread
        self._seek(0)

    def __next__(self) -> Batch:
        self.waiting_for = self._next_batch
        try:
            batch = next(self._iterator)
        finally:
            self.waiting_for = None
        self._next_batch += 1
        return batch

    def read(self, number: int) -> Batch:
        """This process's rows of batch `number`, which may be outside of the stream's order."""
        thread = threading.get_ident()
        self._reading[thread] = number
        try:
            return self._source.read_batch(self._indices(number, self._rows), self._draws(number)[self._rows])
        finally:
            del self._reading[thread]

    def _indices(self, number: int, rows: Int[np.ndarray, " rows"]) -> list[int]:
        """The records in `rows` of the global batch `number`."""
        first = number * self._identity["batch_size"]
        return self._order.take(first + row for row in rows.tolist())

    def _draws(self, number: int) -> Float64[np.ndarray, " batch"]:
        return _draws([self._identity["seed"], number], self._identity["batch_size"])

    def places(self, number: int) -> list[tuple[Path, int]]:
        """File, and number within it, of every record of the global batch `number`."""
        indices = self._indices(number, np.arange(self._identity["batch_size"]))
        return self._source.places(indices, self._draws(number))

    def describe_reading(self, number: int) -> str:
        """What is being read at this moment for batch `number`, with files and records, and the numbers of others."""
        reading, files = self._reading.copy(), being_read()
        threads = [thread for thread, batch in reading.items() if batch == number]
        own = [files.get(thread, "records that are read already, and are being decoded") for thread in threads]
        others = sorted(batch for batch in reading.values() if batch != number)
        also = f"; other threads read batches {', '.join(map(str, others))}" if others else ""
        return f"{own[0] if own else 'which no thread is reading'}{also}"

    def get_state(self) -> dict[str, int]:
        """The state after the batches returned so far, excluding prefetched ones, as JSON."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `get_state`, on any number of processes and threads.

        Raises `ValueError` if the state belongs to another stream: other data, seed or global batch size.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(f"data state: {name}: must be {ours} as in this run, got {state.get(name)}")
        next_batch = state.get("next_batch")
        if type(next_batch) is not int or next_batch < 0:
            raise ValueError(f"data state: next_batch: must be an integer of at least 0, got {next_batch!r}")
        self.close()
        self._seek(next_batch)

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()

    def _seek(self, next_batch: int) -> None:
        self._next_batch = next_batch
        self._iterator = iter(self._dataset[next_batch:].to_iter_dataset(self._options))


def validation_batches(
    source: Source,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
) -> Iterator[Batch]:
    """Yield at most `limit` evenly spaced records in a fixed order, each once and always with the same caption.

    Every batch has `batch_size` rows, of which only `rows` are read (default: all); `weight` float32 (rows,) is 1 for a record and 0
    for the padding of the last batch.
    """
    own = np.arange(batch_size) if rows is None else np.asarray(rows)
    count = min(len(source), limit or len(source))
    padded = np.arange(-(-count // batch_size) * batch_size)
    indices = np.minimum(padded, count - 1) * len(source) // count
    weights, draws = (padded < count).astype(np.float32), _draws(0, len(source))[indices]
    for start in range(0, len(padded), batch_size):
        part = start + own
        yield source.read_batch(indices[part].tolist(), draws[part]) | {"weight": weights[part]}


def _draws(seed: int | list[int], count: int) -> Float64[np.ndarray, " count"]:
    return np.random.default_rng(seed).random(count)
