"""Snapshots of the power-function averages, from which an EMA of any width is made afterwards."""

from __future__ import annotations

from etils import epath

from flowdit.checkpoint.averages import SNAPSHOTS
from flowdit.checkpoint.files import CheckpointError, list_steps
from flowdit.checkpoint.meta import RunMeta
from flowdit.checkpoint.writer import CheckpointWriter, only_averages
from flowdit.config import TrainConfig
from flowdit.processes import from_first
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState


def snapshots(run_folder: epath.Path, train: TrainConfig, meta: RunMeta, start: int) -> list[Evaluation]:
    """The snapshots of a run that continues from step `start`, if they are switched on."""
    return [Snapshot(run_folder / SNAPSHOTS, train.ema_snapshot_every, meta, start)] if meta.averages else []


class Snapshot(Evaluation):
    """Writes the averages to `<run>/ema/<step>/` at every multiple of `every` steps. The run waits for it.

    Snapshots after step `start`, where the run begins, are removed: they are written again. All processes must create it.
    """

    folder = SNAPSHOTS

    def __init__(self, folder: epath.Path, every: int, meta: RunMeta, start: int):
        self.every = every
        from_first(lambda: [(folder / str(step)).rmtree() for step in list_steps(folder) if step > start])
        self._is_missing = start > 0 and start % every == 0 and from_first(lambda: start not in list_steps(folder))
        self._writer = CheckpointWriter(folder, keep_last=None, keep_every=None, meta=meta, arrays=only_averages)

    def is_due(self, step: int, is_last: bool) -> bool:
        return step % self.every == 0

    def is_overdue(self, step: int) -> bool:
        return self._is_missing

    def __call__(self, step: int, state: TrainState) -> Report:
        self._writer.reached(step, state, {})
        try:
            self._writer.save(wait=True)
        except CheckpointError as problem:  # a snapshot less does not end the run
            raise OSError(str(problem)) from problem
        return Report()
