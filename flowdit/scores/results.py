"""The results of an evaluation: the best point, the table for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flowdit.scores.floor import Floor
from flowdit.scores.judge import Scores
from flowdit.scores.metrics import Score, metric_of

COLUMNS = {
    "ema_width": "EMA",
    "solver": "solver",
    "steps": "steps",
    "interval": "interval",
    "internal_guidance": "internal guidance",
    "guidance": "guidance",
}
"""The settings that a sweep varies, and the heads of their columns."""
SMOKE = 1_000
"""Scores of fewer images are called smoke figures: they show that a model works, not how good it is."""


class Result(NamedTuple):
    """One point of a sweep: its settings by the names in `COLUMNS`, and its scores.

    `evaluations` is the mean number of evaluations of the velocity field for an image, and `images` the folder of the
    images within `out`, if they were saved.
    """

    settings: dict[str, Any]
    evaluations: float
    scores: Scores
    images: str | None = None


def best_point(results: Sequence[Result], metric: str, features: str) -> int:
    """The index of the point with the best value of a metric; the first of equal ones."""
    values = [result.scores[features][metric].value for result in results]
    return values.index(max(values) if metric_of(metric).higher_is_better else min(values))


def varied(results: Sequence[Result]) -> list[str]:
    """The settings in which the points differ."""
    return [name for name in COLUMNS if len({str(result.settings[name]) for result in results}) > 1]


def lines(results: Sequence[Result], features: str, floor: Floor, count: int, best: int) -> list[str]:
    """The scores in one feature space for the console: a line for each of a single point, a table of several."""
    if len(results) > 1:
        return [describe_floor(features, floor), *(f"  {row}" for row in table(results, features, floor, best))]
    smoke = ", smoke figure" if count < SMOKE else ""
    shown = []
    for name, found in results[0].scores[features].items():
        real = f" (real images: {shown_score(floor.scores[name])})" if name in floor.scores else ""
        shown.append(f"  {title(name)} of {count} images{smoke}: {shown_score(found)}{real}")
    return [describe_floor(features, floor), *shown]


def table(results: Sequence[Result], features: str, floor: Floor, best: int) -> list[str]:
    """A row for each point, the best one marked, and a row of real images."""
    names, metrics = varied(results), list(results[0].scores[features])
    rows = [["", *(COLUMNS[name] for name in names), "evaluations", *(title(name) for name in metrics)]]
    for i, result in enumerate(results):
        chosen = [shown_setting(result.settings[name]) for name in names]
        found = [shown_score(result.scores[features][name]) for name in metrics]
        rows.append(["best" if i == best else "", *chosen, f"{result.evaluations:.0f}", *found])
    if floor.scores:
        cells = [shown_score(floor.scores[name]) if name in floor.scores else "" for name in metrics]
        rows.append(["real", *[""] * len(names), "", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def describe_floor(features: str, floor: Floor) -> str:
    """A line above the table of a feature space: of how many images the scores of real ones are, and which are missing."""
    known = f"real: {floor.count} images of the reference against others" if floor.count else "no scores of real images"
    missing = [f"no {name}, as {reason}" for name, reason in floor.missing.items()]
    return "; ".join([f"{features}, {known}", *missing])


def title(metric: str) -> str:
    """The name of a metric for people; `prompt_following/colour` is one of the words of a kind."""
    kind = metric.partition("/")[2]
    return f"{metric_of(metric).title}, {kind}s" if kind else metric_of(metric).title


def shown_setting(value: Any) -> str:
    """A setting as it is typed."""
    if isinstance(value, tuple | list):
        return "[" + ",".join(shown_setting(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, int | float) else str(value if value is not None else "plain")


def shown_score(score: Score) -> str:
    """A value and its standard error, to as many digits as are of use."""
    if score.error is None:
        return f"{score.value:.4g}"
    return f"{score.value:.4g} ± {score.error:.1g}"


def as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Scores of one feature space by metric, for a file."""
    return {name: {"value": s.value} | ({} if s.error is None else {"error": s.error}) for name, s in scores.items()}


def from_json(stored: Mapping[str, Any]) -> dict[str, Score]:
    """The inverse of `as_json`. Raises `KeyError` or `TypeError` for other content."""
    return {name: Score(name, float(entry["value"]), entry.get("error")) for name, entry in stored.items()}
