"""Loading ArrayRecord data with Grain: batches that depend only on the seed and the batch number.

Most of a loader's cost is Grain's bookkeeping per element, so its elements are the numbers of batches, and one map reads
and decodes a process's rows of a batch. Which records they are follows from the seed and the number (`data.order`), and
the state is the number of the next batch: a run may continue on any number of processes and loader threads.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float64, Int

from flowdit.data.loader import Batch, Source
from flowdit.data.mixture import Mixture
from flowdit.data.record_files import being_read
from flowdit.data.schedule import Rows, Schedule
from flowdit.data.shard_pool import ShardPool
from flowdit.data.windows import Windows
from flowdit.hashing import fingerprint


class TrainStream(Iterator[Batch]):
    """An endless stream of the `rows` (default: all) of the global batches; every epoch is a new permutation.

    Batch number i, including the choice of captions, is a function of (seed, i): a row is the same for any division of
    the batch among processes, `num_threads` and `prefetch`. Batches continue across the end of an epoch, so that
    no record is dropped. Of data with buckets, a batch is of one (`data.schedule`).

    If the data are read by way of `pool`, records are shuffled within windows of shards (`data.windows`).
    """

    def __init__(
        self,
        data: Source | Mixture,
        *,
        seed: int,
        batch_size: int,
        num_threads: int = 4,
        prefetch: int = 4,
        rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
        pool: ShardPool | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"train.batch_size: must be at least 1, got {batch_size}")
        self._data = data = Mixture.of(data)
        self._seed, self._batch_size = seed, batch_size
        self._windows = Windows(data, seed, batch_size, pool)
        self._schedule = schedule = self._make_schedule()
        self._identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "num_records": len(data)}
        if len(data.sources) > 1 or schedule.num_buckets > 1:
            self._identity["schedule"] = fingerprint(json.dumps([schedule.counts, schedule.shares]))
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._dataset = grain.MapDataset.range(sys.maxsize // batch_size).map(self._read_next)
        self.shares = schedule.sizes
        """The rows of each bucket in an epoch, in the order of the data's buckets."""
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

    def _make_schedule(self) -> Schedule:
        make_order = None if self._windows.size is None else self._windows.order
        return Schedule(self._seed, self._batch_size, self._data.counts, self._data.weights, make_order)

    def _read_next(self, number: int) -> Batch:
        """`read`, after shards of the batches that follow have begun to be copied."""
        if self._windows.size is not None:
            self._windows.fetch(self._schedule.front(max(number - self._windows.behind, 0)))
        return self.read(number)

    def read(self, number: int) -> Batch:
        """This process's rows of batch `number`, which may be outside of the stream's order."""
        thread = threading.get_ident()
        self._reading[thread] = number
        try:
            rows = self._schedule.take(number, self._rows.tolist())
            return self._data.read_batch(rows, self._draws(number)[self._rows])
        finally:
            del self._reading[thread]

    def _draws(self, number: int) -> Float64[np.ndarray, " batch"]:
        return _draws([self._seed, number], self._batch_size)

    def places(self, number: int) -> list[tuple[os.PathLike[str], int]]:
        """File, and number within it, of every record of the global batch `number`."""
        rows = self._schedule.take(number, range(self._batch_size))
        return self._data.places(rows, self._draws(number))

    def describe_reading(self, number: int) -> str:
        """What is being read at this moment for batch `number`, with files and records, and the numbers of others."""
        reading, files = self._reading.copy(), being_read()
        threads = [thread for thread, batch in reading.items() if batch == number]
        own = [files.get(thread, "records that are read already, and are being decoded") for thread in threads]
        others = sorted(batch for batch in reading.values() if batch != number)
        also = f"; other threads read batches {', '.join(map(str, others))}" if others else ""
        return f"{own[0] if own else 'which no thread is reading'}{also}"

    def get_state(self) -> dict[str, int | str]:
        """The state after the batches returned so far, excluding prefetched ones, as JSON."""
        window = {} if self._windows.size is None else {"window": self._windows.size}
        return {"next_batch": self._next_batch, **self._identity, **window}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `get_state`, on any number of processes and threads.

        Raises `ValueError` if the state belongs to another stream: other data, seed or global batch size, or windows
        for which the local cache has no room.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(f"data state: {name}: must be {ours} as in this run, got {state.get(name)}")
        next_batch = state.get("next_batch")
        if type(next_batch) is not int or next_batch < 0:
            raise ValueError(f"data state: next_batch: must be an integer of at least 0, got {next_batch!r}")
        self._windows.restore(state.get("window"))
        self.close()
        self._schedule = self._make_schedule()
        self._seek(next_batch)

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()

    def _seek(self, next_batch: int) -> None:
        self._next_batch = next_batch
        self._windows.restart()
        self._iterator = iter(self._dataset[next_batch:].to_iter_dataset(self._options))


def validation_batches(
    data: Source | Mixture,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
) -> Iterator[Batch]:
    """Yield at most `limit` evenly spaced records in a fixed order, each once and always with the same caption.

    Every batch is of one bucket and has `batch_size` rows, of which only `rows` are read (default: all); `weight` float32
    (rows,) is 1 for a record and 0 for the padding of a bucket's last batch.
    """
    data, own = Mixture.of(data), np.arange(batch_size) if rows is None else np.asarray(rows)
    count = min(len(data), limit or len(data))
    indices = np.arange(count) * len(data) // count
    draws = _draws(0, len(data))[indices]
    for found, places in data.rows_of(indices.tolist()):
        for start in range(0, len(places), batch_size):
            part = np.minimum(start + own, len(places) - 1).tolist()
            chosen = Rows(found.bucket, [found.data_sets[i] for i in part], [found.records[i] for i in part])
            weight = (start + own < len(places)).astype(np.float32)
            yield data.read_batch(chosen, draws[places][part]) | {"weight": weight}


def _draws(seed: int | list[int], count: int) -> Float64[np.ndarray, " count"]:
    return np.random.default_rng(seed).random(count)
