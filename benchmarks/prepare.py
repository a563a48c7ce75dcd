"""Images a second from JPEG files to finished shards, and the share of the time that is not the network.

"The network alone" encodes as many batches of the same size, already in memory. A round of `prepare` is all of it but
the start of the program: both passes, the shards and the manifest. The workers of Ray compute with one thread each, as
if each had a core of its own; their rates are those after the first results, without their start.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
from PIL import Image

from benchmarks.timing import Timing, interleave, table
from flowdit.data.encode_images import latent_encoder
from flowdit.data.preparation import passes
from flowdit.data.preparation.encode_unit import EncoderMaker, vae_by_name
from flowdit.data.preparation.engines import Engine, RayConfig, open_engine
from flowdit.data.preparation.selection import select
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.sources import open_images
from flowdit.data.sources.base import Unit

SOURCE_SIDE = (512, 384)
"""Width and height of the JPEG files."""


class Case(NamedTuple):
    """A VAE, the side of its square crops, and how many images are encoded in batches of how many."""

    name: str
    vae: str
    image_size: int
    images: int
    batch_size: int


def measure() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = (
            Case("embedded VAE, 64 px", "openmoji", 64, 512, 32),
            Case("SD3's VAE, 256 px", str(write_sd3_vae(folder / "sd3")), 256, 8, 4),
        )
        write_images(folder / "images", max(case.images for case in cases))
        parts = [compared(folder, case) for case in cases]
        return "\n\n".join(
            [
                table(["VAE", "images/s, JPEG to shard", "the network alone", "not the network"], parts),
                table(["workers of Ray", "images/s", "over one"], workers_compared(folder, cases[0])),
            ]
        )


def write_sd3_vae(folder: Path) -> Path:
    """An autoencoder of the size of SD3's, with random weights."""
    build: Any = diffusers.AutoencoderKL  # type: ignore[attr-defined]  # whose types are those of its defaults
    vae = build(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int) -> None:
    """JPEG files of smooth noise, about 30 kB each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = SOURCE_SIDE
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
        noise.resize(SOURCE_SIDE, Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)


def config_of(folder: Path, case: Case, out: Path, records_per_shard: int | None = None) -> PrepareConfig:
    return PrepareConfig(
        source=f"folder:{folder / 'images'}",
        out=str(out),
        vae=case.vae,
        image_size=case.image_size,
        batch_size=case.batch_size,
        limit=case.images,
        held_out_fraction=0.0,
        records_per_shard=records_per_shard,
        vae_check=0,
    )


def compared(folder: Path, case: Case) -> list[str]:
    """Rows of the first table, of rounds in turn."""
    encode = latent_encoder(vae_by_name(case.vae), case.batch_size)
    batch = np.zeros((case.batch_size, case.image_size, case.image_size, 3), np.uint8)

    def network() -> None:
        for _ in range(case.images // case.batch_size):
            encode(batch).ready()

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            prepare(config_of(folder, case, Path(out) / "data"))

    timings = interleave({"whole": whole, "network": network}, rounds=2)
    whole_time, network_time = timings["whole"], timings["network"]
    shares = [1 - b / a for a, b in zip(whole_time.seconds, network_time.seconds, strict=True)]
    share = f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
    return [case.name, whole_time.rate(case.images), network_time.rate(case.images), share]


class Together(NamedTuple):
    """Makes workers that begin at the same time, compiled, and say when they have finished a unit."""

    maker: EncoderMaker
    image_size: int
    folder: Path
    workers: int

    def __call__(self) -> Callable[[Unit], tuple[float, float]]:
        work = self.maker()
        work.encode_batch(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)).ready()
        (self.folder / str(os.getpid())).touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.01)
        begun = time.time()

        def timed(unit: Unit) -> tuple[float, float]:
            work(unit)
            return begun, time.time()

        return timed


def workers_compared(folder: Path, case: Case) -> list[list[str]]:
    """Rows of the second table, of rounds in turn."""
    config = config_of(folder, case, folder / "parts", records_per_shard=16)
    source, vae = open_images(config), vae_by_name(case.vae)
    out = Path(config.out)
    out.mkdir()
    task = passes.Task(config=config, source=source, units=tuple(source.units()), vae=vae, out=out, identity="")
    with open_engine("loop", RayConfig()) as loop:
        scans = passes.scan(task, loop)
    selection = select(scans, config.filter, (), config.min_bucket_records)
    maker = EncoderMaker(source, out, passes.encode_settings(task, selection))

    def seconds(engine: Engine, workers: int) -> float:
        ready = folder / "ready"
        ready.mkdir()
        times = list(engine.run(Together(maker, case.image_size, ready, workers), scans.units))
        shutil.rmtree(ready)
        return max(end for _, end in times) - min(begun for begun, _ in times)

    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    try:
        with open_engine("ray", RayConfig(workers=1)) as one, open_engine("ray", RayConfig(workers=2)) as two:
            found = [(seconds(one, 1), seconds(two, 2)) for _ in range(5)]
    finally:
        os.environ["XLA_FLAGS"] = flags
    single, double = (Timing(column) for column in zip(*found, strict=True))
    return [["1", single.rate(case.images), "1.00"], ["2", double.rate(case.images), single.ratio(double)]]
