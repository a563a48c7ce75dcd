"""The progress bar of long tasks."""

import contextlib
import logging
from collections.abc import Iterator

from tqdm import tqdm as ProgressBar

logger = logging.getLogger(__name__)


def progress_bar(description: str, unit: str, total: int, left: int) -> ProgressBar:
    """A bar on stderr over `total` units of which `left` are to be done. Hidden where information is not logged."""
    return ProgressBar(
        desc=description,
        unit=f" {unit}",
        total=total,
        initial=total - left,
        dynamic_ncols=True,
        disable=not logger.isEnabledFor(logging.INFO),
    )


class WorkProgress:
    """A bar over work that is done in parts, here or in other processes.

    `finish` counts a part that is done. Meanwhile `advance`, which works in this process only, shows how far it is.
    """

    def __init__(self, bar: ProgressBar):
        self._bar, self._finished = bar, bar.n

    def finish(self, count: int) -> None:
        """Count a part of the work that is done, whatever `advance` has said of it."""
        self._finished += count
        self._bar.update(max(self._finished - self._bar.n, 0))


_SHOWN: list[ProgressBar] = []


@contextlib.contextmanager
def work_progress(description: str, unit: str, total: int, left: int) -> Iterator[WorkProgress]:
    """Show a bar, which `advance` moves in this process."""
    with progress_bar(description, unit, total, left) as bar:
        _SHOWN.append(bar)
        try:
            yield WorkProgress(bar)
        finally:
            _SHOWN.remove(bar)


def advance(count: int) -> None:
    """Move the bar of the work that this process does, if it shows one."""
    if _SHOWN:
        _SHOWN[-1].update(count)
