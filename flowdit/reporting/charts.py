"""What the charts of a report show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flowdit.features import FEATURES
from flowdit.reporting.metrics import number, thinned
from flowdit.reporting.reading import RunRecord
from flowdit.reporting.results import Point, Results, direction, metric_title
from flowdit.reporting.series import Chart, Series
from flowdit.scores.results import shown_setting

PROFILES = 6
"""Steps that are drawn in a chart by flow time."""
MOST_LINES = 24
"""Of a chart of a sweep."""
BY_TIME = re.compile(r"(?P<name>validation/loss_t|[\w-]+_by_t/)(?P<low>\d(?:\.\d+)?)(?:-(?P<high>\d(?:\.\d+)?))?")
"""Figures at one flow time, or of a bin of flow times."""
MAIN = {
    "train/loss": "training",
    "validation/loss": "validation",
}
RATES = {
    "train/grad_norm": "Gradient norm",
    "train/learning_rate": "Learning rate",
    "train/images_per_second": "Images per second",
    "train/mfu": "Model FLOP utilisation",
}
UNDRAWN = ("train/steps_per_second", "train/tflops_per_second", "train/total_flops", "train/skipped_in_row")
"""Figures that follow from others."""


def curve_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts by step: losses, rates, scores, parts of the loss, and all other figures."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.curves))
    charts = [Chart("curves", "Loss", "step", list(_lines(runs, MAIN)))]
    charts += [_chart("curves", title, runs, name) for name, title in RATES.items()]
    drawn = {*MAIN, *RATES, *UNDRAWN}
    for name in sorted(names):
        if name in drawn or BY_TIME.fullmatch(name):
            continue
        if name == "train/skipped_steps":
            if any((curve := run.metrics.curve(name)) is not None and (curve.values > 0).any() for run in runs):
                charts.append(_chart("curves", "Skipped steps", runs, name))
        elif name.startswith("scores/"):
            charts.append(_chart("scores", _score_title(name.removeprefix("scores/")), runs, name))
        elif name.startswith("train/"):
            charts.append(_chart("parts", f"Part of the loss: {name.removeprefix('train/')}", runs, name))
        else:
            charts.append(_chart("others", name, runs, name))
    return [chart for chart in charts if chart.series]


def _chart(section: str, title: str, runs: Sequence[RunRecord], name: str) -> Chart:
    return Chart(section, title, "step", list(_lines(runs, {name: ""})))


def _score_title(name: str) -> str:
    """`KID in efficientnet, lower is better` of `kid_efficientnet`."""
    for space in FEATURES:
        if name.endswith(f"_{space}"):
            metric = name.removesuffix(f"_{space}")
            return ", ".join(filter(None, [f"{metric_title(metric)} in {space}", direction(metric)]))
    return name


def _lines(runs: Sequence[RunRecord], figures: dict[str, str]) -> Iterator[Series]:
    """Each figure of each run: with several runs the colour tells the run, else the figure."""
    for dash, (figure, words) in enumerate(figures.items()):
        for index, run in enumerate(runs):
            curve = run.metrics.curve(figure)
            if curve is None or not np.isfinite(curve.values).any():
                continue
            thin = thinned(curve)
            name = ", ".join(filter(None, [run.name if len(runs) > 1 else "", words])) or run.name
            yield Series(
                name=name,
                run=index,
                x=thin.steps.tolist(),
                y=thin.values.tolist(),
                colour=index if len(runs) > 1 else dash,
                dash=dash if len(runs) > 1 else 0,
                smooth=figure.startswith("train/"),
                dots=len(thin.steps) <= 60 and not figure.startswith("train/"),
            )


def time_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Losses by flow time: those of each run at several steps, and with several runs their newest side by side."""
    charts = []
    names = dict.fromkeys(m["name"] for run in runs for name in run.metrics.curves if (m := BY_TIME.fullmatch(name)))
    for name in sorted(names, key=lambda name: (not name.startswith("validation"), name != "loss_by_t/", name)):
        title = _time_title(name)
        profiles = [_profiles(run, name) for run in runs]
        newest = [
            Series(f"{run.name}, step {max(found):,}", index, *found[max(found)], colour=index, dots=True)
            for index, (run, found) in enumerate(zip(runs, profiles, strict=True))
            if found
        ]
        if len(newest) > 1:
            charts.append(Chart("time", f"{title}, newest step", "t", newest))
        for index, (run, found) in enumerate(zip(runs, profiles, strict=True)):
            steps = list(found)
            chosen = [steps[round(i * (len(steps) - 1) / (PROFILES - 1))] for i in range(PROFILES)] if steps else []
            chosen = list(dict.fromkeys(chosen))
            lines = [
                Series(f"step {step:,}", index, *found[step], colour=index, fade=(i + 1) / len(chosen), dots=True)
                for i, step in enumerate(chosen)
            ]
            if lines:
                charts.append(Chart("time", f"{title}, {run.name}" if len(runs) > 1 else title, "t", lines))
    return charts


def _time_title(name: str) -> str:
    part = name.removesuffix("_by_t/")
    if name.startswith("validation"):
        return "Validation loss by t"
    return "Training loss by t" if part == "loss" else f"Part of the loss by t: {part}"


def _profiles(run: RunRecord, name: str) -> dict[int, tuple[list[float], list[float]]]:
    """Flow times and values of a figure at each step that has all of them."""
    curves: dict[float, dict[int, float]] = {}
    for figure, curve in run.metrics.curves.items():
        if (found := BY_TIME.fullmatch(figure)) and found["name"] == name:
            low, high = float(found["low"]), float(found["high"] or found["low"])
            curves[(low + high) / 2] = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    times = sorted(curves)
    if len(times) < 2:
        return {}
    common = sorted(set.intersection(*(set(curves[t]) for t in times)))
    return {step: (times, [curves[t][step] for t in times]) for step in common}


def sweep_charts(results: Results) -> list[Chart]:
    """The metric by which a sweep is judged, in each feature space, against guidance and against evaluations."""
    charts = []
    for space in results.spaces():
        metrics = results.metrics(space)
        metric = results.best_metric if results.best_metric in metrics else metrics[0]
        floor = results.floors.get(space, {}).get(metric)
        levels = {} if floor is None else {"real images": floor.value}
        for axis, along, place in _axes(results):
            if series := _sweep_lines(results, space, metric, along, place):
                title = f"{metric_title(metric)} in {space} by {axis}"
                charts.append(Chart("sweep", title, axis, series, direction(metric), levels))
    return charts


def _sweep_lines(
    results: Results, space: str, metric: str, along: str, place: Callable[[Point], float | None]
) -> list[Series]:
    """A line for each combination of the settings besides the one `along` the axis."""
    lines: dict[str, list[tuple[float, float, float | None, bool]]] = {}
    others = [name for name in results.varied() if name != along]
    for i, point in enumerate(results.points):
        score, x = point.scores.get(space, {}).get(metric), place(point)
        if score is not None and x is not None:
            name = ", ".join(f"{other} {shown_setting(point.settings.get(other))}" for other in others)
            is_best = i == results.best and len(results.points) > 1
            lines.setdefault(name or metric_title(metric), []).append((x, score.value, score.error, is_best))
    series = []
    for colour, (name, points) in enumerate(list(lines.items())[:MOST_LINES]):
        x, y, error, is_best = (list(column) for column in zip(*sorted(points, key=lambda p: p[0]), strict=True))
        best = is_best.index(True) if True in is_best else None
        series.append(Series(name, results.run or 0, x, y, colour=colour % 8, error=error, dots=True, best=best))
    return series


def _axes(results: Results) -> Iterator[tuple[str, str, Callable[[Point], float | None]]]:
    """Axes along which the points differ: name, the setting that it stands for, and the place of a point."""

    if "guidance" in results.varied():
        yield "guidance", "guidance", lambda point: number(point.settings.get("guidance"))
    if len({point.evaluations for point in results.points}) > 1:
        yield "evaluations", "steps", lambda point: point.evaluations
