"""The best checkpoint of a run by a figure of its evaluations, `train.keep_best`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from flowdit.checkpoint.files import find_damage, list_steps, set_aside
from flowdit.checkpoint.meta import Best
from flowdit.checkpoint.retention import read_best
from flowdit.checkpoint.writer import CheckpointWriter
from flowdit.config import TrainConfig
from flowdit.fields import FieldError, listed
from flowdit.processes import from_first
from flowdit.training.evaluations.base import Evaluation

logger = logging.getLogger(__name__)


class Metric(NamedTuple):
    """The figure of `train.keep_best`, "min" or "max", and the evaluation that reports it."""

    name: str
    mode: str
    evaluation: Evaluation


def find_metric(train: TrainConfig, evaluations: Sequence[Evaluation]) -> Metric | None:
    """The metric of `train.keep_best`; None without. Raises `FieldError` if no evaluation reports it."""
    name = train.keep_best
    if name is None:
        return None
    for evaluation in evaluations:
        for figure, mode in evaluation.metrics.items():
            if name in (
                figure,
                figure.rpartition("_")[0].removeprefix("scores/"),
            ):  # `fd`: in the first feature network
                return Metric(figure, mode if train.keep_best_mode == "auto" else train.keep_best_mode, evaluation)
    known = [metric for evaluation in evaluations for metric in evaluation.metrics]
    if not known:
        rule = "must be null where no evaluation reports figures (train.validate_every=0, or no validation records)"
        raise FieldError("train.keep_best", f"{rule}, got {name!r}")
    raise FieldError("train.keep_best", f"must be a figure of an evaluation ({listed(known, 16)}), got {name!r}")


def resumed_best(folder: epath.Path, metric: Metric | None, step: int, stored: Best | None) -> Best | None:
    """The best checkpoint at the step from which a run resumes: that of `best.json` if it includes the evaluation of
    that step, else the one that is `stored` in its checkpoint. None, with a warning, if its checkpoint is lost or it is
    of another metric. A damaged one is set aside. All processes must call it.
    """
    if metric is None:
        return None

    def choose() -> dict[str, Any] | None:
        written = read_best(folder)
        best = written if written is not None and written.measured == step and written.step <= step else stored
        if best is None:
            return None
        where = f"step {best.step} was the best by {best.metric} ({best.value:.6g})"
        if (best.metric, best.mode) != (metric.name, metric.mode):
            logger.warning("train.keep_best: %s; by %s, %s, it is counted anew", where, metric.name, metric.mode)
            return None
        if best.step not in list_steps(folder):
            logger.warning("train.keep_best: %s, but its checkpoint is gone; the best is counted anew", where)
            return None
        return dataclasses.asdict(best)

    chosen = from_first(choose)
    best = None if chosen is None else Best(**chosen)
    # The checkpoint of `step` itself was verified when it was restored.
    if best is not None and best.step != step and (damage := find_damage(folder / str(best.step))) is not None:
        logger.warning("train.keep_best: the best checkpoint is damaged, the best is counted anew: %s", damage)
        from_first(lambda: set_aside(folder / str(best.step)))
        return None
    return best


def is_unmeasured(metric: Metric, best: Best | None, step: int, is_last: bool) -> bool:
    """Whether a run that resumes from `step` has stopped before the evaluation that was due after it."""
    return step > 0 and metric.evaluation.is_due(step, is_last) and (best is None or best.measured != step)


def count(metric: Metric, step: int, figures: Mapping[str, float], writer: CheckpointWriter) -> None:
    """Count the figures of an evaluation after `step`: if they are the best so far, keep its checkpoint.

    All processes must call it. A value that is not finite is never the best; it is logged.
    """
    if metric.name not in figures:  # of another evaluation
        return
    value = float(from_first(lambda: figures[metric.name]))
    if not math.isfinite(value):
        logger.warning("step %d: %s is %s, which is not counted for train.keep_best", step, metric.name, value)
        return
    best = writer.best_so_far()
    sign = 1 if metric.mode == "min" else -1
    if best is None or sign * value < sign * best.value:
        logger.info("step %d  best %s %.6g so far", step, metric.name, value)
        kept = step
    else:
        value, kept = best.value, best.step
    writer.keep_best(Best(metric=metric.name, mode=metric.mode, value=value, step=kept, measured=step))  # type: ignore[arg-type]
