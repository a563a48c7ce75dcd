"""Records per second of the training stream, compared with raw reads and with decoding of the same records.

"Decoding alone" is the least that a loader must do, in one thread: the raw read, decoding, all checks, and stacking.
The time of the processors, of all threads, says what a loader costs also where other programs run.
"""

import contextlib
import itertools
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.timing import interleave, table
from flowdit.data.loader import Source
from flowdit.data.record_files import LocalFiles
from flowdit.data.schema import LabelField, record_schema
from flowdit.data.stream import TrainStream

BATCH_SIZE = 128
# Float32 latents of the embedded data (4 KB) and of SD3's VAE at 256 px (64 KB), and their number.
SIZES = {"4 KB": ((16, 8, 8), 16_384), "64 KB": ((16, 32, 32), 2_048)}
PROTOCOLS = (5, 4, 3)  # of pickle: what `prepare` writes, Python's default, and that of files from before 2019


def write_records(path: Path, latent_shape: tuple[int, int, int], count: int, protocol: int = 5) -> Source:
    """Write and open a shard of `count` random latents."""
    latent = np.random.default_rng(0).standard_normal(latent_shape).astype(np.float32)
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
    for i in range(count):
        record: Mapping[str, Any] = {"latent": latent, "label": i % 10}
        writer.write(pickle.dumps(record, protocol))
    writer.close()
    return Source(LocalFiles([path]), [count], record_schema(latent_shape, {"label": LabelField(10)}))


def read_stream(source: Source, num_threads: int) -> None:
    """Read an epoch of the training stream, including its start."""
    stream = TrainStream(source, seed=0, batch_size=BATCH_SIZE, num_threads=num_threads)
    with contextlib.closing(stream):
        for _ in itertools.islice(stream, len(source) // BATCH_SIZE):
            pass


def contenders(path: Path, latent_shape: tuple[int, int, int], count: int, protocol: int) -> dict[str, Callable]:
    source = write_records(path, latent_shape, count, protocol)
    raw = ArrayRecordDataSource(os.fspath(path))
    batches = np.random.default_rng(1).permutation(count).reshape(-1, BATCH_SIZE).tolist()
    return {
        RAW: lambda: [len(raw.__getitems__(batch)) for batch in batches],
        DECODING: lambda: [len(source.read_batch(batch)) for batch in batches],
        "TrainStream, 1 thread": lambda: read_stream(source, 1),
        "TrainStream, 4 threads": lambda: read_stream(source, 4),
    }


RAW, DECODING = "raw batch reads", "decoding alone"


def rows_of(size: str, protocol: int) -> list[list[str]]:
    """Records a second; time over the raw reads; processor time a record, and over decoding alone."""
    latent_shape, count = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        functions = contenders(Path(folder) / "0.array_record", latent_shape, count, protocol)
        wall = interleave(functions, rounds=5)
        work = interleave(functions, rounds=5, clock=time.process_time)
    return [
        [
            f"{size}, protocol {protocol}",
            name,
            wall[name].rate(count),
            wall[name].ratio(wall[RAW]),
            f"{1e6 * work[name].median / count:.1f} us",
            work[name].ratio(work[DECODING]),
        ]
        for name in functions
    ]


def measure() -> str:
    rows = [row for size in SIZES for protocol in PROTOCOLS for row in rows_of(size, protocol)]
    header = ["record", f"batches of {BATCH_SIZE}", "records/s", "time over raw", "work", "work over decoding alone"]
    return table(header, rows)
