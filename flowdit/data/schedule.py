"""Which bucket and which records a batch has: a pure function of the seed and the number of the batch.

A batch is of one bucket, as its latents have one shape. With n records and batches of B, a bucket has had
floor((e + 1) n / B) batches by the end of epoch e, so that the records left over go on into its next epoch, and each is
read once an epoch. The buckets of an epoch's batches are shuffled, with a bounded local cache those of a window's. The rows of a bucket are dealt to the data sets of a
mixture at even distances, by whole numbers that have the ratio of the weights. Each bucket of each data set has an
endless order of its own (`data.order`), which is read from the front, so that an order may keep to some shards at a time.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flowdit.data.order import Order, ShuffledOrder, WindowedOrder
from flowdit.fields import require

MakeOrder = Callable[[int, int], Order]
"""The order of the records of a bucket of a data set, by their numbers (data set, bucket)."""


class Rows(NamedTuple):
    """Rows of a batch: its bucket, and for each row the data set and the record within the bucket of the data set."""

    bucket: int
    data_sets: list[int]
    records: list[int]


class Schedule:
    """The batches of an endless training.

    `counts` has the records of each bucket of each data set, `shares` those that an epoch reads of them: the same
    numbers for a single data set, and with several the same in total, divided by their weights; `sizes` are those of
    all data sets together.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        counts: Sequence[Sequence[int]],
        weights: Sequence[float] = (1.0,),
        make_order: MakeOrder | None = None,
    ):
        require(
            "weights", len(weights), len(weights) == len(counts), f"must be one for each of {len(counts)} data sets"
        )
        self._seed, self._batch_size = seed, batch_size
        self.counts = [list(row) for row in counts]
        self.shares = self.counts if len(counts) == 1 else divide(self.counts, weights)
        columns = list(zip(*self.shares, strict=True))
        self.sizes = [sum(column) for column in columns]
        self._dealt = [[(d, share) for d, share in enumerate(column) if share] for column in columns]
        cells = [(d, b) for b, dealt in enumerate(self._dealt) for d, _ in dealt]
        shuffled = lambda d, b: ShuffledOrder(seed, self.counts[d][b], cells.index((d, b)))
        self._orders = {cell: (make_order or shuffled)(*cell) for cell in cells}
        self.num_buckets = sum(size > 0 for size in self.sizes)
        self._parts = functools.lru_cache(2)(self._find_parts)

    def take(self, number: int, rows: Iterable[int]) -> Rows:
        """The records in `rows` of batch `number`."""
        bucket, rank = self.batch(number)
        first = rank * self._batch_size
        dealt = self._dealt[bucket]
        if len(dealt) == 1:
            rows, data_set = list(rows), dealt[0][0]
            return Rows(bucket, [data_set] * len(rows), self._orders[data_set, bucket].take(first + i for i in rows))
        places = [_deal(first + row, dealt, self.sizes[bucket]) for row in rows]
        records = [self._orders[d, bucket].take([position])[0] for d, position in places]
        return Rows(bucket, [d for d, _ in places], records)

    def batch(self, number: int) -> tuple[int, int]:
        """The bucket of batch `number`, and how many batches of that bucket are before it."""
        if self.num_buckets == 1:
            return next(bucket for bucket, size in enumerate(self.sizes) if size), number
        # A bucket has had less than one batch fewer than its share of all.
        least = number * self._batch_size // sum(self.sizes)
        most = least + self.num_buckets * self._batch_size // sum(self.sizes) + 1
        epoch = bisect.bisect_right(range(least, most + 1), number, key=lambda e: sum(self._before(e + 1))) + least
        parts = self._parts(epoch)
        part = bisect.bisect_right(parts, number, key=sum) - 1
        start, end = parts[part], parts[part + 1]
        batches = tuple(b - a for a, b in zip(start, end, strict=True))
        buckets, ranks = _shuffled_buckets((self._seed, epoch), part, batches)
        place = number - sum(start)
        return int(buckets[place]), start[buckets[place]] + int(ranks[place])

    def front(self, number: int) -> list[tuple[int, Order, int]]:
        """For each data set in batch `number`: its number, its order, and about where the batch is in that."""
        bucket, rank = self.batch(number)
        first, size = rank * self._batch_size, self.sizes[bucket]
        return [(d, self._orders[d, bucket], first * share // size) for d, share in self._dealt[bucket]]

    def _find_parts(self, epoch: int) -> list[list[int]]:
        """The batches of each bucket before each part of an epoch, and before the next epoch.

        An epoch has one part, or the windows of a single data set, so that no bucket is a window ahead of another.
        """
        orders = {bucket: order for (_, bucket), order in self._orders.items() if isinstance(order, WindowedOrder)}
        if len(self.counts) > 1 or not orders:
            return [self._before(epoch), self._before(epoch + 1)]
        places = {bucket: [0, *order.ends(epoch)] for bucket, order in orders.items()}
        num_places = len(next(iter(places.values())))
        return [
            [
                (epoch * size + (places[bucket][i] if size else 0)) // self._batch_size
                for bucket, size in enumerate(self.sizes)
            ]
            for i in range(num_places)
        ]

    def _before(self, epoch: int) -> list[int]:
        """The batches of each bucket before an epoch."""
        return [epoch * size // self._batch_size for size in self.sizes]


def _deal(row: int, dealt: Sequence[tuple[int, int]], size: int) -> tuple[int, int]:
    """The data set of a row of a bucket, counted from the start of training, and the rows before it of that data set.

    Of `size` rows in a row, `dealt` gives each data set its share, at even distances: one data set after the other
    takes its share of the rows that are left over by those before it.
    """
    for data_set, share in dealt:
        before = row * share // size
        if (row + 1) * share // size > before:
            return data_set, before
        row, size = row - before, size - share
    raise AssertionError("the last share is the whole rest")


@functools.lru_cache(8)
def _shuffled_buckets(
    seed: tuple[int, int], part: int, batches: tuple[int, ...]
) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " total"]]:
    """The bucket of each batch of a part of an epoch, and the batches of that bucket before it within the part.

    `seed` is that of the run and the epoch.
    """
    chance = np.random.default_rng([*seed, 0x6275636B, *([part] if part else [])]).random(sum(batches))
    buckets = np.repeat(np.arange(len(batches), dtype=np.int16), batches)[np.argsort(chance, kind="stable")]
    ranks = np.empty(len(buckets), np.int64)
    ranks[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(count) for count in batches])
    return buckets, ranks


def divide(counts: Sequence[Sequence[int]], weights: Sequence[float]) -> list[list[int]]:
    """The records that an epoch of a mixture reads of each bucket of each data set: all of them together, by weight.

    Within a data set they are divided as its records are. Raises `FieldError` for a weight so small that a bucket of
    the data set would never be read.
    """
    total = sum(map(sum, counts))
    exact = [Fraction(weight) for weight in weights]
    shares = apportion(total, [weight / sum(exact) for weight in exact])
    for i, (share, row) in enumerate(zip(shares, counts, strict=True)):
        buckets = sum(count > 0 for count in row)
        rule = f"must give the data set a record of each of its {buckets} buckets in an epoch of {total}"
        require(f"weights[{i}]", weights[i], share >= buckets, rule)
    return [
        apportion(share, [Fraction(count, sum(row)) for count in row])
        for share, row in zip(shares, counts, strict=True)
    ]


def apportion(total: int, parts: Sequence[Fraction]) -> list[int]:
    """`total` divided into whole numbers in the ratio of `parts`, which add up to 1: by largest remainder, and at least
    1 for a part above 0. `total` must be at least the number of such parts.
    """
    least = [int(part > 0) for part in parts]
    shares = [max(int(total * part), one) for part, one in zip(parts, least, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: (shares[i] - total * parts[i], i))
    for i in itertools.cycle(by_remainder if sum(shares) < total else by_remainder[::-1]):
        missing = total - sum(shares)
        if not missing:
            break
        if missing > 0 and least[i]:
            shares[i] += 1
        elif missing < 0 and shares[i] > least[i]:
            shares[i] -= 1
    return shares


def check_buckets(counts: Sequence[Sequence[int]], names: Sequence[str], batch_size: int, *, merge_small: bool) -> None:
    """Raise `FieldError` for a bucket that has fewer records than a batch, unless that is allowed, or is the only one."""
    records = {name: sum(column) for name, column in zip(names, zip(*counts, strict=True), strict=True) if any(column)}
    name = min(records, key=lambda name: records[name])
    small = sum(count < batch_size for count in records.values())
    rule = f"must be at most the {records[name]} records of the bucket of {name} px"
    rule += f" and {small - 1} more" if small > 1 else ""
    rule += "; data.merge_small_buckets=true fills a batch from several epochs"
    require("train.batch_size", batch_size, len(records) == 1 or merge_small or not small, rule)
