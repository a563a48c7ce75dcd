"""Start and memory of the loader on a million records in 1,000 shards (2.4 GB): `python -m benchmarks million`."""

import contextlib
import itertools
import tempfile
import time
from pathlib import Path

from benchmarks.long_run import usage
from benchmarks.noise_data import CLASS_NAMES, LATENT_SHAPE, write_noise_data
from benchmarks.timing import table
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest, verify
from flowdit.data.schema import LabelField, record_schema
from flowdit.data.stream import TrainStream


def measure() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write_noise_data(folder, num_shards=1000, records_per_shard=1000)
        start = time.perf_counter()
        manifest = Manifest.read(folder)
        verify(folder, manifest)
        schema = record_schema(LATENT_SHAPE, {"label": LabelField(len(CLASS_NAMES))})
        stream = TrainStream(open_source(folder, manifest, schema=schema), seed=0, batch_size=256)
        with contextlib.closing(stream):
            next(stream)
            rows.append(["first batch", f"{time.perf_counter() - start:.1f} s"])
            for count in (200, 1800):
                for _ in itertools.islice(stream, count):
                    pass
                now = usage()
                rows.append(
                    [f"{count} batches later", f"{now['memory'] / 1e3:.0f} MB, {now['descriptors']} descriptors"]
                )
    return table(["point", "figure"], rows)
