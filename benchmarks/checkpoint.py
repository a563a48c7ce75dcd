"""Time for which a save blocks the embedded model's training, and time until it is on disk."""

import tempfile
from pathlib import Path

import jax
from etils import epath

from benchmarks.timing import Timing, seconds, table
from benchmarks.workload import EMBEDDED, EMBEDDED_LATENT, training
from flowdit.checkpoint.meta import read_meta
from flowdit.checkpoint.writer import CheckpointWriter

PRETRAINED = Path(__file__).parents[1] / "pretrained" / "openmoji"
BATCH_SIZE = 64
ROUNDS = 5
WARMUP = 1
ROWS = ("training step", "save (blocking)", "save, to the files being on disk", "save and the step after it")


class Saving:
    """A training run that saves into `folder`."""

    def __init__(self, folder: Path):
        self.workload = training(EMBEDDED, EMBEDDED_LATENT, BATCH_SIZE)
        self.state = self.workload.init()
        self.megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / 1e6
        self.writer = CheckpointWriter(epath.Path(folder), keep_last=1, keep_every=None, meta=read_meta(PRETRAINED))

    def step(self) -> None:
        self.state, _ = jax.block_until_ready(self.workload.train_step(self.state, self.workload.batch))

    def save(self) -> None:
        step = int(self.state.step)
        self.writer.reached(step, self.state, {"next_batch": step})
        self.writer.save()

    def round(self) -> tuple[float, ...]:
        """Seconds for each of `ROWS`. The step after a save may copy buffers that are being saved, and shares the cores."""
        step, blocking = seconds(self.step), seconds(self.save)
        on_disk = blocking + seconds(self.writer.last_good)
        self.step()
        with_step = seconds(self.save) + seconds(self.step)
        self.writer.last_good()
        return step, blocking, on_disk, with_step


def measure() -> str:
    with tempfile.TemporaryDirectory() as folder:
        run = Saving(Path(folder))
        rounds = [run.round() for _ in range(WARMUP + ROUNDS)]
        run.writer.__exit__(None, None, None)
    timings = [Timing(column) for column in zip(*rounds[WARMUP:], strict=True)]
    rows = [[name, t.shown(), t.ratio(timings[0])] for name, t in zip(ROWS, timings, strict=True)]
    return table([f"batch {BATCH_SIZE}, a state of {run.megabytes:.0f} MB", "time", "in steps"], rows)
