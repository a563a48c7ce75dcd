"""The order of records: that of Grain's shuffle, on which the batches of all earlier runs depend."""

import grain
import pytest

from flowdit.data.order import ShuffledOrder


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
