"""The loss on held-out records."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowdit.conditioning import Batch
from flowdit.config import TrainConfig
from flowdit.data.loader import Source, validation_batches
from flowdit.diffusion.objective import Objective
from flowdit.models.compute import Compute
from flowdit.sharding import own_rows, shard_batch
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState, make_validation_step


class Validation(Evaluation):
    """Loss of the EMA model on held-out records at fixed times with fixed noise: comparable between steps and runs."""

    def __init__(
        self,
        train: TrainConfig,
        source: Source,
        mesh: Mesh,
        encode: Callable[[Batch], Batch],
        objective: Objective,
        compute: Compute,
        seed: int,
    ):
        self.every = train.validate_every
        self._source = source
        self._mesh = mesh
        self._encode = encode
        self._batch_size, self._limit = train.batch_size // train.gradient_accum, train.validation_records
        self._times = objective.validation_times
        self._names = [f"validation/loss_t{t:.4f}" for t in self._times]
        self.metrics = dict.fromkeys(["validation/loss", *self._names], "min")
        self._step = make_validation_step(objective, seed, compute, mesh)

    def __call__(self, step: int, state: TrainState) -> Report:
        rows = own_rows(self._mesh, self._batch_size)
        sums, weight = np.zeros(len(self._times)), 0.0
        for i, batch in enumerate(validation_batches(self._source, self._batch_size, self._limit, rows)):
            on_devices = self._encode(shard_batch(self._mesh, batch))
            batch_sums, batch_weight = jax.device_get(self._step(state.ema, on_devices, jnp.asarray(i)))
            sums, weight = sums + batch_sums, weight + float(batch_weight)
        loss = float(sums.sum() / weight / len(sums))
        by_time = {name: float(total / weight) for name, total in zip(self._names, sums, strict=True)}
        return Report({"validation/loss": loss, **by_time}, line=f"validation loss {loss:.4f}")
