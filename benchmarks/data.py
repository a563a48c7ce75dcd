"""Reading the same latents from flowdit's shards and from other formats: records a second, and memory.

`python -m benchmarks data`. Each reader has a process of its own and they take turns. Memory is the proportional set
size of the process and of those that it started, so that what several share counts once; what an epoch adds to it is
given beside.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.data_formats import BATCH, READERS, write_all
from benchmarks.timing import Timing, table

ORDERS = ("sequential", "shuffled")
RECORDS = 2048
ROUNDS = 3


class Epoch(NamedTuple):
    """One reading of all records: seconds, and memory in MB before and at its largest."""

    seconds: float
    before: float
    peak: float


class Reader:
    """A reader in a process of its own. A context manager that ends the process."""

    def __init__(self, name: str, folder: Path, count: int):
        self._count = count
        command = (sys.executable, "-m", "benchmarks.data_formats", name, str(folder), str(count))
        root, pipe = Path(__file__).parents[1], subprocess.PIPE
        self._process = subprocess.Popen(command, text=True, cwd=root, stdin=pipe, stdout=pipe)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # its memory is measured from here on

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, order: str) -> Epoch:
        """Read all records once. Raises `RuntimeError` if the reader fails or does not read each record once."""
        before = memory_of(self._process.pid)
        peak, is_over = [before], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.05):
                peak.append(max(peak.pop(), memory_of(self._process.pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            print(order, file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline() or "{}")
        finally:
            is_over.set()
            watcher.join()
        expected = sum(i % 1000 + 1000 * (i % 10) for i in range(self._count))
        if answer.get("records") != self._count or answer["checksum"] != expected:
            raise RuntimeError(f"must read {self._count} records, each once, got {answer}")
        return Epoch(answer["seconds"], before, peak[0])


def memory_of(pid: int) -> float:
    """Proportional set size of a process and its descendants in MB."""
    total = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def measure(count: int = RECORDS, rounds: int = ROUNDS, names: Sequence[str] = tuple(READERS)) -> str:
    """The table, from `rounds` epochs of `count` records, a multiple of the size of a batch, after one that warms up."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        write_all(folder, count)
        readers = {name: stack.enter_context(Reader(name, folder, count)) for name in names}
        epochs: dict[tuple[str, str], list[Epoch]] = {(name, order): [] for name in names for order in ORDERS}
        for _ in range(1 + rounds):
            for (name, order), found in epochs.items():
                found.append(readers[name].read(order))
    rows = []
    first = {order: Timing([epoch.seconds for epoch in epochs[names[0], order][1:]]) for order in ORDERS}
    for (name, order), (_, *found) in epochs.items():
        timing = Timing([epoch.seconds for epoch in found])
        peak = max(epoch.peak for epoch in found)
        added = statistics.median(epoch.peak - epoch.before for epoch in found)
        rows.append([name, order, timing.rate(count), timing.ratio(first[order]), f"{peak:.0f}", f"{added:.0f}"])
    head = ["reader", "order", "records/s", "time over flowdit's", "memory, MB", "added by an epoch, MB"]
    return f"{count} latents of 32 KB, batches of {BATCH}, files in the page cache.\n\n{table(head, rows)}"
