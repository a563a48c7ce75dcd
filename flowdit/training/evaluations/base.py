"""The base class of evaluations."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

from flowdit.tracking import Report
from flowdit.training.step import TrainState

__all__ = ["Evaluation", "Report"]


class Evaluation(abc.ABC):
    """An evaluation between steps: by default after every `every`-th step and the last (`is_due`).

    Its time is not counted as training time.
    """

    every: int = 0
    folder: ClassVar[str | None] = None
    """Its folder within the run folder. Write errors there give a warning and do not end the run."""
    metrics: Mapping[str, str] = {}
    """The figures that every report holds and that `train.keep_best` may name: "min" if lower is better, else "max"."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether it is called after `step`."""
        return self.every > 0 and (is_last or step % self.every == 0)

    def is_overdue(self, step: int) -> bool:
        """Whether a run that resumes from `step` must call it first, as it ended before that. All processes agree."""
        return False

    def close(self) -> None:  # noqa: B027
        """Called once at the end of the run, also after an error."""

    @abc.abstractmethod
    def __call__(self, step: int, state: TrainState) -> Report:
        """Called by all processes. Do not keep `state`, as the next step donates it."""
