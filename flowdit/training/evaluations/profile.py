"""A profiler window."""

from __future__ import annotations

import contextlib

import jax
from etils import epath

from flowdit.storage import written_locally
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState


class Profile(Evaluation):
    """A trace of the steps from `first` to `last` for TensorBoard or Perfetto (`jax.profiler`)."""

    folder = "profile"

    def __init__(self, run_folder: epath.Path, first: int, last: int):
        self._path = run_folder / "profile"
        if jax.process_count() > 1:  # traces are named after the host, which processes may share
            self._path /= f"process_{jax.process_index()}"
        self._first, self._last = first, last
        self._files = contextlib.ExitStack()
        self._is_tracing = False

    def is_due(self, step: int, is_last: bool) -> bool:
        if self._is_tracing:
            return step >= self._last
        return self._first - 1 <= step < self._last  # a run resumed within the window traces the rest of it

    def __call__(self, step: int, state: TrainState) -> Report:
        jax.block_until_ready(state)  # earlier work must not overlap with the next steps
        if self._is_tracing:
            self.close()
            return Report(line=f"profile of steps {self._first} to {step}: {self._path}")
        jax.profiler.start_trace(self._files.enter_context(written_locally(self._path)))
        self._first, self._is_tracing = step + 1, True
        return Report()

    def close(self) -> None:
        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            with self._files:
                jax.profiler.stop_trace()  # which also writes
        except jax.errors.JaxRuntimeError as problem:
            self._last = 0  # so that it is not tried again at each step
            raise OSError(str(problem).partition("\n")[0]) from problem
