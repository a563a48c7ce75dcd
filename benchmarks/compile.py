"""Trace, lower and compile the training step at two depths: blocks are scanned, so the time should hardly grow."""

import functools

import jax

from benchmarks.timing import interleave, table
from benchmarks.workload import training
from flowdit.models.config import DiTConfig

DEPTHS = (2, 28)


def compile_step(depth: int) -> None:
    """Compile without any cache: traced functions and programs of an earlier call are not reused."""
    jax.clear_caches()
    config = DiTConfig(depth=depth, hidden_dim=96, num_heads=4, patch_size=2)
    work = training(config, (4, 16, 16), batch_size=4)
    work.train_step.lower(jax.eval_shape(work.init), work.batch).compile()  # type: ignore[attr-defined]


def measure() -> str:
    contenders = {f"depth {depth}": functools.partial(compile_step, depth) for depth in DEPTHS}
    timings = interleave(contenders, rounds=3, warmup=0)
    shallow = timings[f"depth {DEPTHS[0]}"]
    rows = [[name, t.shown(), t.ratio(shallow)] for name, t in timings.items()]
    return table(["96 wide", "to a compiled training step", f"time / depth {DEPTHS[0]}"], rows)
