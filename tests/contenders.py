"""Contenders for the tests of `benchmarks.workers`; imported by other processes, so it imports little."""

import os
import time


class Counter:
    def __init__(self, start: int):
        self.value = start

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def fail(self) -> None:
        raise ValueError("no plan\nfor this graph")

    def end(self) -> None:
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)


def broken() -> None:
    raise MemoryError("too large")
