"""What every evaluation answers."""

from __future__ import annotations

import abc
from typing import ClassVar

from flowdit.training.step import TrainState
from flowdit.training.tracking import Report

__all__ = ["Evaluation", "Report"]


class Evaluation(abc.ABC):
    """Something done between steps: after every `every`-th one and the last, unless `is_due` says otherwise.

    Its time does not count as training time.
    """

    every: int = 0
    folder: ClassVar[str | None] = None
    """What it writes to, in the run folder. What cannot be written there costs a warning and not the run."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether it is called after `step`."""
        return self.every > 0 and (is_last or step % self.every == 0)

    def close(self) -> None:  # noqa: B027
        """Called once when the run ends, however it ends."""

    @abc.abstractmethod
    def __call__(self, step: int, state: TrainState) -> Report:
        """All processes call it; `state` must not be kept, as the next step donates it."""
