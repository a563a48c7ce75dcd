"""Grain over ArrayRecord: batches whose order depends on the seed and the batch number alone.

Grain's bookkeeping for each element is most of a loader's cost, so indices are shuffled and batched first and one map
reads and decodes a process's whole share of a batch. Every process computes the same global batches and takes its own
rows, and the state is the number of the next batch: a run may continue on any number of processes and loader threads.
"""

import bisect
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader

from flowdit.data.manifest import Manifest, Shard
from flowdit.data.records import RecordError, Schema, decode, stage1_schema

Batch = dict[str, np.ndarray]


@dataclass
class DataConfig:
    """Where the training data lies and how it is read.

    `num_threads` read and decode batches, up to `prefetch` of them ahead of the training step. `verify_hashes` compares
    the contents of the shards with the manifest at the start of a run, whatever their size.
    """

    path: str = "???"
    num_threads: int = 4
    prefetch: int = 4
    verify_hashes: bool = False


@dataclass
class _FileInstruction:
    """The words in which ArrayRecordDataSource takes a file whose length is known."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Source:
    """Random access to the records of one split: `read` takes indices in [0, len(source))."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], schema: Schema):
        self.schema = schema
        self._paths = paths
        self._ends = list(itertools.accumulate(counts))
        files = [_FileInstruction(os.fspath(path), 0, n, n) for path, n in zip(paths, counts, strict=True)]
        self._records = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The records at `indices`, decoded, each of the right types and shapes.

        Raises `RecordError` naming file, record within the file, field and rule.
        """
        return [self._parse(i, data) for i, data in zip(indices, self._read_bytes(indices), strict=True)]

    def read_batch(self, indices: Sequence[int]) -> Batch:
        """The records at `indices` stacked: `latent` float32 (n, channels, height, width), `label` int32 (n,)."""
        records = self.read(indices)
        batch = self.schema.stack(records)
        try:
            self.schema.check_numbers(batch)
        except RecordError:
            for i, record in zip(indices, records, strict=True):
                self._located(i, self.schema.check_numbers, record)
            raise
        return batch

    def _parse(self, index: int, data: bytes) -> dict[str, Any]:
        record = self._located(index, decode, data)
        self._located(index, self.schema.check, record)
        return record

    def _read_bytes(self, indices: Sequence[int]) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(indices)
        except RuntimeError:  # does not say which file: find the record by reading one at a time
            return [self._located(i, self._records.__getitem__, i) for i in indices]

    def _located(self, index: int, function: Any, *args: Any) -> Any:
        """`function(*args)`, whose error becomes one line that says where record `index` lies."""
        try:
            return function(*args)
        except RecordError as error:
            raise RecordError(f"{self._where(index)}: {error}") from error.__cause__
        except RuntimeError as error:
            raise RecordError(f"{self._where(index)}: the file is damaged: {_first_clause(error)}") from None

    def _where(self, index: int) -> str:
        file = bisect.bisect_right(self._ends, index)
        return f"{self._paths[file]}: record {index - (self._ends[file - 1] if file else 0)}"


def open_source(folder: str | Path, manifest: Manifest, split: str = "train") -> Source:
    """The records of `split` ("train" or "validation").

    Raises `ValueError` naming the file if a shard is missing, is not an ArrayRecord file, is cut short, or holds another
    number of records than the manifest says.
    """
    shards = manifest.shards_of(split)
    if not shards:
        raise ValueError(f"{folder}: the data set has no records in split {split!r}")
    paths = [Path(folder) / shard.file for shard in shards]
    with ThreadPoolExecutor(16) as pool:  # thousands of shards on a network disk open slowly one after another
        list(pool.map(_check_shard, paths, shards))
    schema = stage1_schema(manifest.latent_shape, manifest.num_classes, manifest.has_latent_std)
    return Source(paths, [shard.records for shard in shards], schema)


def _check_shard(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path}: is not a whole ArrayRecord file: {_first_clause(error)}") from None
    if count != shard.records:
        raise ValueError(f"{path}: must hold {shard.records} records as in the manifest, holds {count}")


def _first_clause(error: Exception) -> str:
    return str(error).split(";")[0].split("\n")[0]


class TrainStream(Iterator[Batch]):
    """An endless stream of this process's rows of the global batches; every epoch is a new permutation.

    Batch number i is a function of (seed, i): the rows of all processes together are the same for any `process_count`,
    `num_threads` and `prefetch`. Batches run on over the end of an epoch, so that no record is ever dropped.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        num_threads: int = 4,
        prefetch: int = 4,
        process_index: int = 0,
        process_count: int = 1,
    ):
        for name, value in (("num_threads", num_threads), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"data.{name}: must be at least 1, got {value}")
        rows = process_rows(batch_size, process_index, process_count)
        self._identity = {"seed": seed, "batch_size": batch_size, "num_records": len(source)}
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._dataset = indices.batch(batch_size, drop_remainder=True).map(
            lambda batch: source.read_batch(batch[rows].tolist())
        )
        self._seek(0)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The JSON-able state after the batches handed out so far, whatever has been read ahead."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `get_state` was called, on any number of processes and threads.

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


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"train.batch_size: must be a positive multiple of {process_count} processes, got {batch_size}"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def validation_batches(
    source: Source, batch_size: int, limit: int | None = None, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """At most `limit` records, spread evenly over the source, in a fixed order, each once.

    Every batch has `batch_size` rows (this process's share of them); `weight` float32 (rows,) is 1 for a record and 0
    for the padding of the last batch.
    """
    rows = process_rows(batch_size, process_index, process_count)
    count = min(len(source), limit or len(source))
    padded = np.arange(-(-count // batch_size) * batch_size)
    indices = np.minimum(padded, count - 1) * len(source) // count
    weights = (padded < count).astype(np.float32)
    for start in range(0, len(padded), batch_size):
        part = slice(start + rows.start, start + rows.stop)
        yield source.read_batch(indices[part].tolist()) | {"weight": weights[part]}
