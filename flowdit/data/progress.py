"""The progress bar of long tasks."""

import logging

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
