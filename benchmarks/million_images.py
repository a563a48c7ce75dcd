"""Memory of `prepare` on many rows, which are made on the fly: `python -m benchmarks million_images`.

Each size is prepared by a process of its own, with the loop, so that its peak is that of driver and worker together.
The VAE is tiny and the images have 8x8 pixels, as the rows are what counts. Duplicates are searched for as well.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np

from benchmarks.timing import table
from flowdit.data.preparation.filters import FilterConfig
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.source_listing import Listing
from flowdit.data.sources import register_source
from flowdit.data.sources.base import Row, Unit

ROWS_PER_UNIT = 5000
SIZES = (100_000, 1_000_000)
SIDE = 8


class Counted:
    """A source of `rows` images that differ in their pixels."""

    name = "counted"
    class_names: tuple[str, ...] | None = ()
    has_captions = False
    license = attribution = ""
    listing: Listing | None = None

    def __init__(self, rows: int):
        self.key = f"{rows} rows"
        self._units = rows // ROWS_PER_UNIT

    def units(self) -> list[Unit]:
        return [Unit(f"{i:05d}-of-{self._units:05d}", None, i) for i in range(self._units)]

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row]]:
        for i in range(ROWS_PER_UNIT) if rows is None else sorted(rows):
            number = unit.part * ROWS_PER_UNIT + i
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            pixels.reshape(-1)[:4] = list(number.to_bytes(4, "big"))
            yield i, Row(f"{number:08d}", pixels)


def write_vae(folder: Path) -> None:
    """An autoencoder of one convolutional block, with random weights."""
    build: Any = diffusers.AutoencoderKL  # type: ignore[attr-defined]  # whose types are those of its defaults
    build(block_out_channels=(8,), norm_num_groups=8, mid_block_add_attention=False).save_pretrained(folder)


def measure() -> str:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_vae(Path(folder) / "vae")
        for rows in SIZES:
            command = [sys.executable, "-m", "benchmarks.million_images", folder, str(rows)]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append([f"{rows:,}", *finished.stdout.splitlines()[-1].split("|")])
    return table(["rows", "after the imports", "peak", "images/s"], found)


def memory() -> float:
    """Peak of this process so far, in MB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run(folder: Path, rows: int) -> str:
    register_source("counted", lambda path, config, numbers: Counted(int(path)))
    before, start = memory(), time.perf_counter()
    prepare(
        PrepareConfig(
            source=f"counted:{rows}",
            out=os.fspath(folder / str(rows)),
            vae=os.fspath(folder / "vae"),
            image_size=SIDE,
            batch_size=256,
            vae_check=0,
            filter=FilterConfig(duplicates=True),
        )
    )
    return f"{before:.0f} MB|{memory():.0f} MB|{rows / (time.perf_counter() - start):.0f}"


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), int(sys.argv[2])))
