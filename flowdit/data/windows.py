"""Reading data sets of which only a part is on the local disk: the order of the records, and the shards that come next.

The shards of each data set are read in windows (`order.ShardWindows`). The number of shards in a window is part of a
run's state, as the order depends on it.
"""

from collections.abc import Iterable
from typing import Any

from flowdit.data.mixture import Mixture
from flowdit.data.order import Order, ShardWindows, WindowedOrder
from flowdit.data.shard_cache import cache_for, largest_window
from flowdit.data.shard_pool import ShardPool
from flowdit.fields import FieldError

LAG = 32
"""Batches of a window after which the next one is fetched."""


class Windows:
    """The windows of the data sets of a run, of `size` shards; None: records are shuffled among all shards.

    The size is the largest for which the cache has room (`largest_window`), until another is restored.
    """

    def __init__(self, data: Mixture, seed: int, batch_size: int, pool: ShardPool | None = None):
        self._data, self._seed = data, seed
        self._batch_size = batch_size
        self._bytes = {d: source.bytes_of_shards for d, source in data.data_sets.items()}
        self._largest = largest_window(list(self._bytes.values()), pool)
        self._resize(self._largest)

    def _resize(self, size: int | None) -> None:
        self.size = size
        shards = {} if size is None else {d: len(sizes) for d, sizes in self._bytes.items()}
        self._of = {d: ShardWindows(self._seed, count, size or 1, d) for d, count in shards.items()}
        self.restart()

    def restore(self, size: Any) -> None:
        """Use windows of the size that is stored in the state of a run: its order never changes.

        Raises `ValueError` for another thing than a size, and for windows for which the cache has no room.
        """
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"data state: window: must be an integer of at least 1, got {size!r}")
        if self._largest is not None and size is None:
            rule = "must be null to continue this run: its records are shuffled among all shards"
            raise FieldError("data.local_cache_gb", rule)
        if self._largest is not None and size is not None and size > self._largest:
            least = cache_for(size, list(self._bytes.values()))
            rule = (
                f"must be at least {least:g} to continue this run: it shuffles the records of {size} shards at a time"
            )
            raise FieldError("data.local_cache_gb", rule)
        self._resize(size)

    def order(self, data_set: int, bucket: int) -> Order:
        """The order of the records of a bucket of a data set."""
        counts = self._data.source(bucket, data_set).counts
        return WindowedOrder(self._of[data_set], self._seed, counts, bucket)

    @property
    def behind(self) -> int:
        """Batches that are read of a window before the next one is fetched: other threads and processes may still read
        the one before.
        """
        most = max((windows.count for windows in self._of.values()), default=1)
        return min(LAG, len(self._data) // (4 * most * self._batch_size))

    def restart(self) -> None:
        """Forget which shards were fetched, as batches of another part come next."""
        self._latest = dict.fromkeys(self._of, -1)

    def fetch(self, front: Iterable[tuple[int, Order, int]]) -> None:
        """Begin to copy the shards of the window of each place (`Schedule.front`), and of the next one."""
        for d, order, position in front:
            if isinstance(order, WindowedOrder) and (window := order.window(position)) > self._latest[d]:
                self._latest[d] = window
                shards = self._of[d].shards
                self._data.data_sets[d].prefer(shards(window), shards(window + 1))
