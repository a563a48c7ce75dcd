"""The order of the records in training: an endless sequence in which every epoch is another permutation."""

import bisect
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int


@runtime_checkable
class Order(Protocol):
    """An endless sequence in which every epoch is a permutation of the records."""

    def take(self, positions: Iterable[int]) -> list[int]:
        """The records at `positions`, integers of at least 0."""
        ...


class ShuffledOrder:
    """The sequence `grain.MapDataset.range(num_records).seed(seed).shuffle().repeat()`.

    An element of Grain's data set costs 12 us, as it passes through three objects that each keep statistics; here it
    costs less than 1 us. Nothing is stored: the position of a record is computed, whatever the size of the data set.
    """

    def __init__(self, seed: int, num_records: int, number: int = 0):
        """`number` tells the orders of a run apart; that of 0 is Grain's."""
        self._num_records = num_records
        sequence = np.random.SeedSequence([seed, 1, number] if number else [seed, 1])
        self._seed = int(sequence.generate_state(1, np.uint32)[0])  # as Grain derives it

    def take(self, positions: Iterable[int]) -> list[int]:
        """The records at `positions`, integers of at least 0, in the endless sequence."""
        last, taken = self._num_records - 1, []
        for position in positions:
            epoch, index = divmod(position, self._num_records)
            taken.append(index_shuffle(index, max_index=last, seed=(self._seed + epoch) % 2**32, rounds=4))
        return taken


class ShardWindows:
    """The order of the shards of a data set of which a part is on the local disk: windows of at most `window` shards.

    In every epoch the shards are permuted and cut into `count` windows, whose sizes differ by one at most. All is a
    function of (seed, epoch). `number` tells the data sets of a run apart.
    """

    def __init__(self, seed: int, num_shards: int, window: int, number: int = 0):
        self.count = -(-num_shards // window)
        self._bounds = [num_shards * i // self.count for i in range(self.count + 1)]
        self._seed = (seed, 2, number)
        self.permuted = functools.lru_cache(4)(self._permuted)

    def _permuted(self, epoch: int) -> Int[np.ndarray, " shards"]:
        """The shards in the order of an epoch."""
        chance = np.random.default_rng([*self._seed, epoch]).random(self._bounds[-1])
        return np.argsort(chance, kind="stable")  # `index_shuffle` takes milliseconds for few indices

    def shards(self, number: int) -> list[int]:
        """The shards of window `number`, counted from the start of training."""
        epoch, i = divmod(number, self.count)
        return self.permuted(epoch)[self._bounds[i] : self._bounds[i + 1]].tolist()

    def ends(self, counts: Int[np.ndarray, " shards"], epoch: int) -> Int[np.ndarray, " windows"]:
        """The records before the end of each window of an epoch, from its start. `counts` are those of the shards."""
        return np.concatenate([[0], np.cumsum(counts[self.permuted(epoch)])])[self._bounds[1:]]


class WindowedOrder:
    """An endless sequence in which the records of a window of shards are shuffled, and the windows come one by one.

    `counts` are the records of each shard; records are numbered through in the order of the shards. Every epoch is a
    permutation. Orders with the same windows, as those of the buckets of a data set, read the same shards at a time;
    `number` tells them apart.
    """

    def __init__(self, windows: ShardWindows, seed: int, counts: Sequence[int], number: int = 0):
        self.windows, self._counts = windows, np.asarray(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._num_records = int(self._counts.sum())
        self._seed = int(np.random.SeedSequence([seed, 3, number]).generate_state(1, np.uint32)[0])
        self._epoch = functools.lru_cache(2)(self._read_epoch)

    def _read_epoch(self, epoch: int) -> tuple[list[int], ...]:
        """Shards in their order, records before each of them, and records before the end of each window."""
        shards = self.windows.permuted(epoch)
        before = np.cumsum(self._counts[shards]) - self._counts[shards]
        return shards.tolist(), before.tolist(), self.windows.ends(self._counts, epoch).tolist()

    def ends(self, epoch: int) -> list[int]:
        """The records before the end of each window of an epoch, from its start."""
        return self._epoch(epoch)[2]

    def window(self, position: int) -> int:
        """The number of the window of a position, counted from the start of training."""
        epoch, index = divmod(position, self._num_records)
        return epoch * self.windows.count + bisect.bisect_right(self._epoch(epoch)[2], index)

    def take(self, positions: Iterable[int]) -> list[int]:
        """The records at `positions`, integers of at least 0, in the endless sequence."""
        taken = []
        for position in positions:
            epoch, index = divmod(position, self._num_records)
            shards, before, ends = self._epoch(epoch)
            window = bisect.bisect_right(ends, index)
            first = ends[window - 1] if window else 0
            seed = (self._seed + epoch * self.windows.count + window) % 2**32
            place = first + index_shuffle(index - first, max_index=ends[window] - first - 1, seed=seed, rounds=4)
            i = bisect.bisect_right(before, place) - 1
            taken.append(int(self._starts[shards[i]]) + place - before[i])
        return taken
