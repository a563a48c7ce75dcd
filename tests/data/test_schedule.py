"""The schedule: the bucket and the records of each batch as a function of seed and number."""

import collections
import itertools
import time

import numpy as np
import pytest

from flowdit.data.order import ShardWindows, ShuffledOrder, WindowedOrder
from flowdit.data.schedule import Schedule, check_buckets, divide
from flowdit.fields import FieldError

BUCKETS = [[50, 23, 0, 101]]
"""One data set; a bucket has no records."""
BATCH = 8


class InTurn:
    """A quick order: each epoch another rotation."""

    def __init__(self, count: int):
        self._count = count

    def take(self, positions):
        return [(p + p // self._count) % self._count for p in positions]


def quick(seed: int, batch_size: int, counts: list[list[int]], weights=(1.0,)) -> Schedule:
    """A schedule whose records are in a quick order: shuffling few of them takes 0.5 ms each."""
    return Schedule(seed, batch_size, counts, weights, lambda d, b: InTurn(counts[d][b]))


def batches(schedule: Schedule, count: int, start: int = 0, batch_size: int = BATCH):
    return [schedule.take(number, range(batch_size)) for number in range(start, start + count)]


@pytest.mark.parametrize("counts", [[[37]], [[0, 37, 0]], [[5]]])
def test_one_bucket_has_the_order_of_a_data_set_without_buckets(counts):
    order = ShuffledOrder(3, max(counts[0]))
    for number, rows in enumerate(batches(Schedule(3, BATCH, counts), 12)):
        assert rows.records == order.take(range(number * BATCH, (number + 1) * BATCH))
        assert set(rows.data_sets) == {0} and counts[0][rows.bucket] == max(counts[0])


def test_each_record_of_a_bucket_is_read_once_an_epoch():
    schedule = quick(0, BATCH, BUCKETS)
    read = collections.defaultdict(list)
    for rows in batches(schedule, 400):
        read[rows.bucket] += rows.records
    assert sorted(read) == [0, 1, 3]
    for bucket, records in read.items():
        count = BUCKETS[0][bucket]
        epochs = [records[i : i + count] for i in range(0, len(records) - count + 1, count)]
        assert len(epochs) >= 10
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_leftovers_of_a_bucket_go_on_into_its_next_epoch():
    """By the end of each epoch every bucket has had as many whole batches as its records fill."""
    schedule, number = quick(0, BATCH, BUCKETS), 0
    for epoch in range(1, 9):
        ends = [epoch * count // BATCH for count in BUCKETS[0]]
        number_at_end = sum(ends)
        found = collections.Counter(schedule.batch(i)[0] for i in range(number_at_end))
        assert [found[bucket] for bucket in range(4)] == ends
        assert number_at_end - number in (20, 21, 22, 23)
        number = number_at_end


def test_the_batches_of_a_bucket_come_in_their_order():
    """An order may then read some shards at a time."""
    schedule, seen = quick(5, BATCH, BUCKETS), collections.Counter()
    for number in range(300):
        bucket, rank = schedule.batch(number)
        assert rank == seen[bucket]
        seen[bucket] += 1


def test_buckets_are_shuffled_anew_in_each_epoch_and_by_the_seed():
    orders = [[quick(seed, BATCH, BUCKETS).batch(i)[0] for i in range(200)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:20] != orders[0][21:41]
    longest = max(len(list(group)) for _, group in itertools.groupby(orders[0]))
    assert longest < 12  # mixed, and not one bucket after the other


def test_a_batch_is_a_function_of_its_number_and_a_row_of_its_place():
    schedule = quick(1, BATCH, [[50, 23, 0, 101], [7, 40, 12, 0]], [2.0, 1.0])
    whole = batches(schedule, 60)
    for number in reversed(range(60)):
        parts = [
            quick(1, BATCH, schedule.counts, [2.0, 1.0]).take(number, rows) for rows in ((0, 1, 2), (3, 4, 5, 6, 7))
        ]
        assert {part.bucket for part in parts} == {whole[number].bucket}
        assert parts[0].records + parts[1].records == whole[number].records
        assert parts[0].data_sets + parts[1].data_sets == whole[number].data_sets


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3], [10.0, 1.0], [1e-2, 1e-2], [3.0, 1e2]])
@pytest.mark.parametrize("counts", [[[50, 23, 0, 101], [7, 40, 12, 0]], [[300], [200]], [[64, 0], [0, 64]]])
def test_the_weights_are_met_exactly_in_each_epoch(counts, weights):
    schedule = quick(0, 1, counts, weights)  # batches of 1: an epoch ends at a batch
    total = sum(map(sum, counts))
    wanted = [total * weight / sum(weights) for weight in weights]
    for epoch in range(3):
        rows = batches(schedule, total, epoch * total, batch_size=1)
        found = collections.Counter((r.data_sets[0], r.bucket) for r in rows)
        assert found == {(d, b): n for d, row in enumerate(schedule.shares) for b, n in enumerate(row) if n}
        for d, row in enumerate(counts):
            assert abs(sum(schedule.shares[d]) - wanted[d]) < max(1, len(row))


def test_a_mixture_by_size_reads_each_record_once_an_epoch():
    counts = [[50, 23, 0, 101], [7, 40, 12, 0]]
    schedule = quick(0, 1, counts, [float(sum(row)) for row in counts])
    assert schedule.shares == counts
    rows = batches(schedule, 233, batch_size=1)
    read = {(r.data_sets[0], r.bucket, r.records[0]) for r in rows}
    assert len(read) == 233


def test_rows_of_a_data_set_come_at_even_distances():
    schedule = quick(0, 100, [[600], [300], [100]], [0.6, 0.3, 0.1])
    for rows in batches(schedule, 30, batch_size=100):
        found = collections.Counter(rows.data_sets)
        assert [found[d] for d in range(3)] == [60, 30, 10]
        assert rows.data_sets != sorted(rows.data_sets)


def test_each_data_set_has_an_endless_shuffled_order_of_its_own():
    schedule = Schedule(0, 10, [[100], [100]], [0.7, 0.3])
    read = [[], []]
    for rows in batches(schedule, 40, batch_size=10):
        for d, record in zip(rows.data_sets, rows.records, strict=True):
            read[d].append(record)
    for records, count in zip(read, (100, 100), strict=True):
        epochs = [records[i : i + count] for i in range(0, len(records) - count + 1, count)]
        assert len(epochs) >= 1
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert read[0][:100] != read[1][:100]


@pytest.mark.parametrize("seed", range(20))
def test_random_mixtures(seed):
    """Whole batches of one bucket, records in range, and the counts of each bucket within a batch of its share."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    data_sets, buckets = rng.integers(1, 5), rng.integers(1, 9)
    counts = rng.integers(0, 300, (data_sets, buckets)).tolist()
    counts[0][0] += 50
    counts = [row for row in counts if any(row)]
    weights = rng.uniform(0.2, 1, len(counts)).tolist()
    schedule = quick(seed, size, counts, weights)
    total = sum(map(sum, counts))
    seen = collections.Counter()
    for number in range(300):
        bucket, rank = schedule.batch(number)
        assert rank == seen[bucket]
        seen[bucket] += 1
        if number % 10 == 0:
            rows = schedule.take(number, range(size))
            assert rows.bucket == bucket and len(rows.records) == len(rows.data_sets) == size
            assert all(0 <= r < counts[d][bucket] for d, r in zip(rows.data_sets, rows.records, strict=True))
            assert all(schedule.shares[d][bucket] for d in rows.data_sets)
    for b in range(buckets):
        share = sum(row[b] for row in schedule.shares) / total
        epoch = total / size  # batches
        assert abs(seen[b] - 300 * share) <= min(epoch, 300) * min(share, 1 - share) + 1 + buckets


def test_shares_are_whole_numbers_of_at_least_one_record():
    shares = divide([[1000, 1], [10_000, 3]], [1.0, 9.0])
    assert sum(map(sum, shares)) == 11_004 and min(map(min, shares)) >= 1
    with pytest.raises(FieldError, match=r"weights\[0\]: must give the data set a record of each of its 2 buckets"):
        divide([[1000, 1], [10_000, 3]], [1e-9, 1.0])


def test_a_bucket_with_fewer_records_than_a_batch_is_named():
    names = ["64x64", "32x96", "96x32"]
    check_buckets([[8, 8, 8]], names, 8, merge_small=False)
    check_buckets([[3]], ["64x64"], 8, merge_small=False)  # as ever: batches take records of several epochs
    check_buckets([[30, 0, 0]], names, 8, merge_small=False)
    check_buckets([[30, 7, 5]], names, 8, merge_small=True)
    check_buckets([[30, 4, 5], [0, 4, 5]], names, 8, merge_small=False)
    rule = "must be at most the 5 records of the bucket of 96x32 px and 1 more; data.merge_small_buckets=true"
    with pytest.raises(FieldError, match=f"train.batch_size: {rule} .*, got 8"):
        check_buckets([[30, 7, 5]], names, 8, merge_small=False)


def test_small_buckets_are_filled_from_several_epochs():
    schedule = quick(0, BATCH, [[40, 3]])
    read = collections.defaultdict(list)
    for rows in batches(schedule, 200):
        read[rows.bucket] += rows.records
    assert len(read[1]) // 3 == pytest.approx(len(read[0]) / 40, abs=3)
    assert collections.Counter(read[1][:30]) == {0: 10, 1: 10, 2: 10}


def test_a_late_batch_of_many_records_is_found_quickly():
    counts = np.random.default_rng(0).integers(10_000, 400_000, (2, 40)).tolist()
    schedule = quick(0, 256, counts, [0.9, 0.1])
    schedule.take(10**9, range(256))  # the buckets of this epoch are shuffled
    start = time.perf_counter()
    for number in range(10**9, 10**9 + 10):
        schedule.take(number, range(256))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(("batch_size", "num_batches"), [(8, 160), (50, 25)])
def test_no_bucket_is_a_window_ahead_of_another(batch_size, num_batches):
    counts = np.random.default_rng(0).integers(0, 60, (4, 12))
    counts[2] = 0
    windows = ShardWindows(0, 12, 3)
    sums = [counts.sum(1).tolist()]
    schedule = Schedule(0, batch_size, sums, make_order=lambda d, b: WindowedOrder(windows, 0, counts[b].tolist(), b))
    read = collections.defaultdict(list)
    seen: collections.Counter[int] = collections.Counter()
    latest = 0
    for number in range(num_batches):
        bucket, rank = schedule.batch(number)
        assert rank == seen[bucket]
        seen[bucket] += 1
        ((_, order, position),) = schedule.front(number)
        assert order.window(position) >= latest - 1 - batch_size // 20
        latest = max(latest, order.window(position))
        read[bucket] += schedule.take(number, range(batch_size)).records
    assert latest >= 4 and sorted(read) == [0, 1, 3]
    for bucket, records in read.items():
        count = sums[0][bucket]
        epochs = [records[i : i + count] for i in range(0, len(records) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and epochs
