"""What a screening has found: figures of each run, and of each option over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from scipy import stats

from benchmarks.screening.jobs import METRICS, Jobs, Run, rates
from benchmarks.screening.plan import BASELINE
from flowdit.reporting.metrics import Curve, read_metrics


class Score(NamedTuple):
    """A score with its standard error, None if it has none."""

    value: float
    error: float | None


class Outcome(NamedTuple):
    """A finished run. `rate` is the steps per second by which its steps were chosen, `measured` those of the run.

    `scores` are those of each part, by "metric_features".
    """

    run: Run
    steps: int
    rate: float
    measured: float | None
    validation: Curve
    scores: dict[str, dict[str, Score]]

    @property
    def lowest(self) -> float | None:
        """The lowest validation loss; None if none was finite."""
        values = self.validation.values[np.isfinite(self.validation.values)]
        return float(values.min()) if len(values) else None

    def minutes(self, step: float) -> float:
        """Minutes of training up to a step, without compilation and evaluations."""
        return step / self.rate / 60


class Mean(NamedTuple):
    """A mean over seeds with the half width of its 95 % interval by Student's t; None for one seed."""

    value: float
    half: float | None
    count: int


class Row(NamedTuple):
    """An option over its seeds. A mean is of all of them, or of those that are compared; none if one lacks the figure.

    `difference`, `steps_to`, `minutes_to` and `share` compare each seed with the baseline of that seed: the lowest
    validation loss less the baseline's, and steps and minutes to the baseline's, which `reached` of `compared` seeds
    reach, also as a share of the baseline's own minutes to it.
    """

    option: str
    seeds: list[int]
    steps: int
    rate: float
    measured: Mean | None
    lowest: Mean | None
    difference: Mean | None
    compared: int
    reached: int
    steps_to: Mean | None
    minutes_to: Mean | None
    share: Mean | None
    scores: dict[str, dict[str, tuple[Mean, float | None]]]


def outcome(jobs: Jobs, run: Run) -> Outcome:
    """The figures of a finished run. Raises `ValueError` if it has no validation loss by the name in the plan."""
    folder, plan = jobs.folder(run), jobs.plan
    curve = read_metrics(epath.Path(folder / METRICS)).curve(plan.loss)
    if curve is None:
        raise ValueError(f"loss: must be a figure of the runs, {folder} has no {plan.loss!r}")
    found = rates(folder)
    measured = statistics.median(found) if found else None
    rate = jobs.rate(run.option) if plan.budget.minutes is not None else (measured or math.nan)
    parts = plan.evaluate.parts if plan.evaluate is not None else {}
    scores = {part: _read(jobs.scores(run, part)) for part in parts}
    return Outcome(run, jobs.steps(run.option), rate, measured, curve, scores)


def _read(content: Any) -> dict[str, Score]:
    points = content["points"] if content is not None else []
    return {
        f"{metric}_{features}": Score(found["value"], found.get("error"))
        for features, metrics in (points[0]["scores"] if points else {}).items()
        for metric, found in metrics.items()
    }


def first_step_below(curve: Curve, target: float) -> float | None:
    """The first step at which a curve is at most `target`, interpolated between its points; None: not reached."""
    known = np.isfinite(curve.values)
    steps, values = curve.steps[known], curve.values[known]
    below = np.flatnonzero(values <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    share = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def mean_of(values: Sequence[float]) -> Mean:
    """The mean with its interval."""
    count = len(values)
    if count < 2:
        return Mean(statistics.fmean(values), None, count)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Mean(statistics.fmean(values), half, count)


class Pair(NamedTuple):
    """A run compared with the baseline of the same seed, whose lowest loss is to be reached; None: not reached."""

    difference: float | None
    steps: float | None
    minutes: float | None
    share: float | None


def compared(one: Outcome, base: Outcome, level: float) -> Pair:
    """Compare a run with the baseline, whose lowest validation loss is `level`."""
    difference = None if one.lowest is None else one.lowest - level
    steps, own = (first_step_below(run.validation, level) for run in (one, base))
    if steps is None or not own:
        return Pair(difference, steps=None, minutes=None, share=None)
    return Pair(difference, steps, one.minutes(steps), one.minutes(steps) / base.minutes(own))


def mean_of_all(values: Sequence[float | None]) -> Mean | None:
    """The mean with its interval; None if there is no value or one is missing."""
    known = [value for value in values if value is not None]
    return mean_of(known) if known and len(known) == len(values) else None


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each option, in order."""
    base = {one.run.seed: one for one in outcomes if one.run.option == BASELINE}
    options = dict.fromkeys(one.run.option for one in outcomes)
    return [_row([one for one in outcomes if one.run.option == option], base) for option in options]


def _row(runs: Sequence[Outcome], bases: Mapping[int, Outcome]) -> Row:
    found = [(one, bases[one.run.seed]) for one in runs if one.run.seed in bases]
    pairs = [compared(one, base, base.lowest) for one, base in found if base.lowest is not None]
    is_baseline = runs[0].run.option == BASELINE
    return Row(
        option=runs[0].run.option,
        seeds=[one.run.seed for one in runs],
        steps=runs[0].steps,
        rate=runs[0].rate,
        measured=mean_of_all([one.measured for one in runs]),
        lowest=mean_of_all([one.lowest for one in runs]),
        difference=None if is_baseline else mean_of_all([pair.difference for pair in pairs]),
        compared=len(pairs),
        reached=sum(pair.steps is not None for pair in pairs),
        steps_to=mean_of_all([pair.steps for pair in pairs]),
        minutes_to=mean_of_all([pair.minutes for pair in pairs]),
        share=None if is_baseline else mean_of_all([pair.share for pair in pairs]),
        scores={part: _mean_scores([one.scores[part] for one in runs]) for part in runs[0].scores},
    )


def _mean_scores(runs: Sequence[dict[str, Score]]) -> dict[str, tuple[Mean, float | None]]:
    """The mean of each score over the runs that have it, and the mean of its standard errors."""
    found = {}
    for name in dict.fromkeys(name for scores in runs for name in scores):
        scores = [each[name] for each in runs if name in each]
        errors = [score.error for score in scores if score.error is not None]
        found[name] = (mean_of([score.value for score in scores]), statistics.fmean(errors) if errors else None)
    return found


def finalists(outcomes: Sequence[Outcome], count: int) -> list[str]:
    """Of the options of the screening, the `count` that are most below the baseline in the lowest validation loss."""
    found = {row.option: row.difference.value for row in rows(outcomes) if row.difference is not None}
    return sorted((option for option in found if found[option] < 0), key=lambda option: found[option])[:count]
