"""Work done in threads ahead of the one that needs it."""

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD_BYTES = 2**28
"""A hostile source has files of the largest size, and 64 of them would not fit into memory."""
THREADS = 4
"""Decoding and resizing images of 512 pixels in four threads keeps up with about 200 images a second."""


def read_ahead(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    ahead: int,
    weight: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """`function(item)` of each item, in order, computed in threads up to `ahead` items early.

    Items that wait have at most `AHEAD_BYTES` together, by their `weight` in bytes, or are a single one. They are drawn in
    a thread too. Errors of both are raised here.
    """
    results: queue.Queue[Future | None] = queue.Queue(ahead)
    stopped = threading.Event()
    room = _Room()

    def put(result: Future | None) -> None:
        while not stopped.is_set():
            try:
                return results.put(result, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                room.enter(weight(item), stopped)
                future = pool.submit(function, item)
                future.add_done_callback(functools.partial(room.leave, weight(item)))
                put(future)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the thread that waits must know
            put(_failed(error))

    with ThreadPoolExecutor(THREADS, thread_name_prefix="decode") as pool:
        reader = threading.Thread(target=draw, name="read-images", daemon=True)
        reader.start()
        try:
            while (result := results.get()) is not None:
                yield result.result()
        finally:
            stopped.set()
            reader.join()


class _Room:
    """The bytes of the items that wait for a thread."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()

    def enter(self, size: int, stopped: threading.Event) -> None:
        """Wait until there is room, or until `stopped`."""
        with self._changed:
            while self._bytes and self._bytes + size > AHEAD_BYTES and not stopped.is_set():
                self._changed.wait(timeout=0.1)
            self._bytes += size

    def leave(self, size: int, _: "Future[Any]") -> None:
        with self._changed:
            self._bytes -= size
            self._changed.notify()


def _failed(error: BaseException) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
