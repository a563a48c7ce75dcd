"""The loss on held-out records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowdit.conditioning import Batch
from flowdit.config import TrainConfig
from flowdit.data.mixture import Mixture
from flowdit.data.origin import PART
from flowdit.data.stream import validation_batches
from flowdit.diffusion.objective import Objective
from flowdit.models.compute import Compute
from flowdit.sharding import own_rows, shard_batch
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState, make_validation_step

CONDITION_GAIN = "validation/condition_gain"


class Validation(Evaluation):
    """Loss of the EMA model on held-out records at fixed times with fixed noise: comparable between steps and runs.

    Data whose validation split has `parts` also have the loss of each. Batches then hold the part of each record, by
    its number. `CONDITION_GAIN` says how much of the condition has been learned: the loss without it less that with it,
    near the noise, where it decides what is drawn.
    """

    def __init__(
        self,
        train: TrainConfig,
        data: Mixture,
        mesh: Mesh,
        encode: Callable[[Batch], Batch],
        objective: Objective,
        compute: Compute,
        seed: int,
        parts: Sequence[str] = (),
    ):
        self.every = train.validate_every
        self._data = data
        self._mesh = mesh
        self._encode = encode
        self._batch_size, self._limit = train.batch_size // train.gradient_accum, train.validation_records
        self._times = objective.validation_times
        self._names = [f"validation/loss_t{t:.4f}" for t in self._times]
        self._parts = [f"validation/loss_{part}" for part in parts]
        self.metrics = dict.fromkeys(["validation/loss", *self._names, *self._parts], "min") | {CONDITION_GAIN: "max"}
        self._step = make_validation_step(objective, seed, compute, mesh)

    def __call__(self, step: int, state: TrainState) -> Report:
        rows = own_rows(self._mesh, self._batch_size)
        groups = 1 + len(self._parts)
        sums, weights = np.zeros(groups), np.zeros(groups)
        for i, batch in enumerate(validation_batches(self._data, self._batch_size, self._limit, rows)):
            on_devices = self._encode(shard_batch(self._mesh, self._grouped(batch)))
            batch_sums, batch_weights = jax.device_get(self._step(state.ema, on_devices, jnp.asarray(i)))
            sums, weights = sums + batch_sums, weights + batch_weights
        means = sums / np.maximum(weights, 1)  # with a limit there may be no record of a part
        at_times, without_condition = np.split(means, [len(self._times)])
        loss, *of_parts = at_times.mean(0).tolist()
        figures = {"validation/loss": loss} | dict(zip(self._names, at_times[:, 0].tolist(), strict=True))
        figures |= {name: one for name, one, n in zip(self._parts, of_parts, weights[1:], strict=True) if n}
        if len(without_condition):
            figures[CONDITION_GAIN] = float(without_condition[0, 0] - at_times[-1, 0])
        return Report(figures, line=f"validation loss {loss:.4f}")

    def _grouped(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with a column of weights for all records and one for those of each part."""
        batch = dict(batch)
        parts = batch.pop(PART, np.full(len(batch["weight"]), -1))
        is_of_group = np.concatenate([np.ones((len(parts), 1)), parts[:, None] == np.arange(len(self._parts))], 1)
        return batch | {"weight": (batch["weight"][:, None] * is_of_group).astype(np.float32)}
