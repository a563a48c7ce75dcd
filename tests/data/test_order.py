"""The order of records: that of Grain's shuffle, on which the batches of all earlier runs depend."""

import itertools

import grain
import numpy as np
import pytest

from flowdit.data.order import ShardWindows, ShuffledOrder, WindowedOrder


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40])
@pytest.mark.parametrize("num_records", [1, 20, 1000, 70_001])
def test_the_order_is_that_of_grain(seed, num_records):
    expected = grain.MapDataset.range(num_records).seed(seed).shuffle().repeat()
    ends = [epoch * num_records for epoch in (0, 1, 2, 7, 1000, 2**33)]
    positions = [end + offset for end in ends for offset in range(-3, 12) if end + offset >= 0]
    assert ShuffledOrder(seed, num_records).take(positions) == [expected[position] for position in positions]


def test_every_epoch_holds_every_record_once():
    order = ShuffledOrder(0, 20)
    epochs = [tuple(order.take(range(20 * epoch, 20 * epoch + 20))) for epoch in range(6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_windows_of_shards_come_one_by_one_and_every_epoch_is_another_permutation():
    counts = [5, 0, 3, 1, 8, 2, 9]
    windows = ShardWindows(0, len(counts), 3)
    order = WindowedOrder(windows, 0, counts)
    shard_of = [shard for shard, count in enumerate(counts) for _ in range(count)]
    epochs = [order.take(range(28 * epoch, 28 * epoch + 28)) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(28)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5
    for epoch, records in enumerate(epochs):
        parts = [windows.shards(epoch * windows.count + i) for i in range(windows.count)]
        assert sorted(itertools.chain(*parts)) == list(range(7)) and {len(part) for part in parts} == {2, 3}
        first = 0
        for i, part in enumerate(parts):
            held = records[first : first + sum(counts[shard] for shard in part)]
            assert {shard_of[record] for record in held} == {shard for shard in part if counts[shard]}
            places = range(28 * epoch + first, 28 * epoch + first + len(held))
            assert {order.window(place) for place in places} == ({epoch * windows.count + i} if held else set())
            first += len(held)


def test_orders_with_the_same_windows_read_the_same_shards():
    windows = ShardWindows(3, 12, 4)
    for counts in ([4] * 12, [1, 2, 3] * 4):
        order = WindowedOrder(windows, 3, counts)
        shard_of = np.repeat(np.arange(12), counts)
        for position in range(3 * sum(counts)):
            assert shard_of[order.take([position])[0]] in windows.shards(order.window(position))


def test_records_are_spread_evenly_within_a_window():
    """Chi-square of where a record of one window comes, over 200 seeds: 9 degrees of freedom, 99.9 % below 27.9."""
    places = []
    for seed in range(200):
        order = WindowedOrder(ShardWindows(seed, 4, 4), seed, [25] * 4)
        places.append(order.take(range(100)).index(7) // 10)
    counts = np.bincount(places, minlength=10)
    assert np.sum((counts - 20) ** 2 / 20) < 27.9
