"""Records per second of the training stream, compared with raw reads of the same number of records."""

import contextlib
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from benchmarks.timing import Timing, interleave, table
from flowdit.data.loader import Source, TrainStream
from flowdit.data.schema import LabelField, record_schema
from flowdit.data.shards import write_shard

BATCH_SIZE = 128
# Float32 latents of the embedded data (4 KB) and of SD3's VAE at 256 px (64 KB), and their number.
SIZES = {"4 KB": ((16, 8, 8), 16_384), "64 KB": ((16, 32, 32), 2_048)}


def write_records(path: Path, latent_shape: tuple[int, int, int], count: int) -> Source:
    """Write and open a shard of `count` random latents."""
    latent = np.random.default_rng(0).standard_normal(latent_shape).astype(np.float32)
    write_shard(path, ({"latent": latent, "label": i % 10} for i in range(count)))
    return Source([path], [count], record_schema(latent_shape, {"label": LabelField(10)}))


def read_stream(source: Source, num_threads: int) -> None:
    """Read an epoch of the training stream, including its start."""
    stream = TrainStream(source, seed=0, batch_size=BATCH_SIZE, num_threads=num_threads)
    with contextlib.closing(stream):
        for _ in itertools.islice(stream, len(source) // BATCH_SIZE):
            pass


def compare(path: Path, latent_shape: tuple[int, int, int], count: int) -> dict[str, Timing]:
    source, raw = write_records(path, latent_shape, count), ArrayRecordDataSource(os.fspath(path))
    batches = np.random.default_rng(1).permutation(count).reshape(-1, BATCH_SIZE).tolist()
    contenders = {
        "raw batch reads": lambda: [len(raw.__getitems__(batch)) for batch in batches],
        "decoded and checked, no Grain": lambda: [len(source.read_batch(batch)) for batch in batches],
        "TrainStream, 1 thread": lambda: read_stream(source, 1),
        "TrainStream, 4 threads": lambda: read_stream(source, 4),
    }
    return interleave(contenders, rounds=5)


def measure() -> str:
    rows = []
    for size, (latent_shape, count) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            timings = compare(Path(folder) / "0.array_record", latent_shape, count)
        raw = timings["raw batch reads"]
        rows += [[size, name, t.rate(count), t.ratio(raw)] for name, t in timings.items()]
    return table(["record", f"batches of {BATCH_SIZE}", "records/s", "time / raw"], rows)
