"""The measured training step: flowdit's, on random latents."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.sizes import NUM_CLASSES
from flowdit.conditioning.labels import Labels
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.training.step import Batch, TrainState, TrainStep, init_state, make_train_step

EMBEDDED = DiTConfig(depth=8, hidden_dim=192, num_heads=6, patch_size=2)
EMBEDDED_LATENT = (16, 8, 8)
"""The latents of the `openmoji` preset, whose model is `EMBEDDED`."""


class Workload(NamedTuple):
    """A training step, its inputs, its objective, and how the network is computed."""

    train_step: TrainStep
    init: Callable[[], TrainState]
    batch: Batch
    objective: FlowMatching
    compute: Compute


def training(
    config: DiTConfig, latent_shape: tuple[int, int, int], batch_size: int, compute: Compute = FLOAT32
) -> Workload:
    """Training of `config` on one device: draws, loss, gradient, clipping, AdamW and EMA, as in a run."""
    optimizer = make_optimizer(OptimConfig(), num_steps=1000)
    channels = latent_shape[0]
    objective = FlowMatching(
        Labels(tuple(map(str, range(NUM_CLASSES)))), 0.1, mean=(0.0,) * channels, scale=(1.0,) * channels
    )

    def init() -> TrainState:
        return init_state(build_dit(config, channels, NUM_CLASSES, key=jax.random.key(0)), optimizer)

    latents = jax.random.normal(jax.random.key(1), (batch_size, *latent_shape))
    batch = {"latent": latents, "label": jnp.arange(batch_size, dtype=jnp.int32) % NUM_CLASSES}
    step = make_train_step(optimizer, objective, seed=0, compute=compute)
    return Workload(step, jax.jit(init), batch, objective, compute)


def repeated(workload: Workload) -> Callable[[], None]:
    """Return a function that runs one more step on each call, and waits for it."""
    state = workload.init()

    def run() -> None:
        nonlocal state
        state, metrics = workload.train_step(state, workload.batch)
        jax.block_until_ready((state, metrics))

    return run
