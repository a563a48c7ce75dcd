"""The chart of a sweep: a score against guidance, and against evaluations of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flowdit.canvas import GRID, INK, MUTED, Canvas, Number
from flowdit.scores.floor import Floor
from flowdit.scores.metrics import Score
from flowdit.scores.results import Result, shown_score, shown_setting, title, varied

PANEL_WIDTH = 380
PANEL_HEIGHT = 210
LEFT = 64
TOP = 52
GAP = 76
LINE = 17
TICKS = 6
"""At most so many lines across a panel."""
LINES = 12
"""Lines of the legend; the points of a larger sweep are drawn without one."""
COLOURS = (
    "#0969da",
    "#bf8700",
    "#1a7f37",
    "#8250df",
    "#cf222e",
    "#0a7ea4",
    "#9a6700",
    "#57606a",
    "#bf3989",
    "#116329",
    "#54aeff",
    "#e16f24",
)


class Point(NamedTuple):
    """A place on a panel, with the standard error of the score, and whether it is the best point."""

    x: float
    score: Score
    is_best: bool


class Panel(NamedTuple):
    """The points of each line, by its name, over the quantity on the horizontal axis."""

    axis: str
    lines: dict[str, list[Point]]


def save_chart(
    path: Path, results: Sequence[Result], metric: str, floors: Mapping[str, Floor], best: int | None
) -> bool:
    """Save the chart of `metric`, with a row of panels for each feature space. Returns whether there is one to draw."""
    spaces = [features for features in floors if metric in results[0].scores[features]]
    rows = {features: _panels(results, features, metric, best) for features in spaces}
    if not any(rows.values()):
        return False
    legend = LINE * max(len(panel.lines) for panels in rows.values() for panel in panels)
    legend = legend if legend <= LINES * LINE else 0
    height = TOP + PANEL_HEIGHT + 44 + legend
    width = LEFT + max(len(panels) for panels in rows.values()) * (PANEL_WIDTH + GAP)
    canvas = Canvas(width, height * len(rows))
    for row, (features, panels) in enumerate(rows.items()):
        real = floors[features].scores.get(metric)
        for number, panel in enumerate(panels):
            left, top = LEFT + number * (PANEL_WIDTH + GAP), row * height + TOP
            head = f"{title(metric)} in {features} by {panel.axis}"
            canvas.text(left, top - 26, head, INK, anchor="ls", size=14)
            _draw(canvas, panel, left, top, real)
            if legend:
                _draw_legend(canvas, list(panel.lines), left, top + PANEL_HEIGHT + 40)
    canvas.save(path)
    return True


def _panels(results: Sequence[Result], features: str, metric: str, best: int | None) -> list[Panel]:
    names = varied(results)
    panels = []
    if "guidance" in names:
        panels.append(_panel(results, features, metric, best, "guidance", lambda result: result.settings["guidance"]))
    if len({result.evaluations for result in results}) > 1:
        panels.append(_panel(results, features, metric, best, "evaluations", lambda result: result.evaluations))
    return panels


def _panel(
    results: Sequence[Result],
    features: str,
    metric: str,
    best: int | None,
    axis: str,
    place: Callable[[Result], float],
) -> Panel:
    along = ("guidance",) if axis == "guidance" else ("steps",)
    lines: dict[str, list[Point]] = {}
    for i, result in enumerate(results):
        others = [name for name in varied(results) if name not in along]
        name = ", ".join(f"{other} {shown_setting(result.settings[other])}" for other in others)
        lines.setdefault(name, []).append(Point(place(result), result.scores[features][metric], i == best))
    return Panel(axis, {name: sorted(points) for name, points in lines.items()})


def _draw(canvas: Canvas, panel: Panel, left: Number, top: Number, real: Score | None) -> None:
    points = [point for line in panel.lines.values() for point in line]
    ends = [point.score.value + sign * (point.score.error or 0) for point in points for sign in (-1, 1)]
    low_y, high_y = _range(ends)
    is_near = real is not None and low_y - (high_y - low_y) <= real.value <= high_y + (high_y - low_y)
    if real is not None and is_near:
        low_y, high_y = _range([*ends, real.value])
    low_x, high_x = _range([point.x for point in points])
    at_x = lambda x: left + (x - low_x) / (high_x - low_x) * PANEL_WIDTH
    at_y = lambda y: top + PANEL_HEIGHT - (y - low_y) / (high_y - low_y) * PANEL_HEIGHT
    for y in ticks(low_y, high_y):
        canvas.box(left, at_y(y), left + PANEL_WIDTH, at_y(y) + 1, GRID)
        canvas.text(left - 8, at_y(y), f"{y:.6g}", MUTED, anchor="rm", size=11)
    for x in sorted({point.x for point in points}):
        canvas.text(at_x(x), top + PANEL_HEIGHT + 8, f"{x:g}", MUTED, anchor="mt", size=11)
    canvas.text(left + PANEL_WIDTH, top + PANEL_HEIGHT + 24, panel.axis, MUTED, anchor="rt", size=11)
    if real is not None and not is_near:
        text = f"real images: {shown_score(real)}"
        canvas.text(left + PANEL_WIDTH, top - 4, text, MUTED, anchor="rb", size=11)
    elif real is not None:
        for x in range(round(left), round(left + PANEL_WIDTH), 8):
            canvas.line([(x, at_y(real.value)), (x + 4, at_y(real.value))], MUTED, 1)
        canvas.text(left + PANEL_WIDTH, at_y(real.value) - 3, "real images", MUTED, anchor="rb", size=11)
    for number, line in enumerate(panel.lines.values()):
        if len(line) > 1:
            places = [(at_x(point.x), at_y(point.score.value)) for point in line]
            canvas.line(places, COLOURS[number % len(COLOURS)])
    marked = [(point, COLOURS[i % len(COLOURS)]) for i, line in enumerate(panel.lines.values()) for point in line]
    for point, colour in sorted(marked, key=lambda one: one[0].is_best):  # the best one over all others
        _draw_point(canvas, at_x(point.x), at_y, point, colour)


def _draw_point(canvas: Canvas, x: Number, at_y: Callable[[float], float], point: Point, colour: str) -> None:
    value, error = point.score.value, point.score.error
    if error:
        canvas.line([(x, at_y(value - error)), (x, at_y(value + error))], colour, 1)
    if point.is_best:
        canvas.dot(x, at_y(value), 8, "white", INK)
        canvas.text(x, at_y(value) + 11, "best", INK, anchor="mt", size=12)
    canvas.dot(x, at_y(value), 3.5, colour)


def _draw_legend(canvas: Canvas, names: Sequence[str], left: Number, top: Number) -> None:
    for number, name in enumerate(names):
        if name:
            y = top + number * LINE
            canvas.dot(left + 5, y + 6, 4, COLOURS[number % len(COLOURS)])
            canvas.text(left + 16, y + 6, name, MUTED, anchor="lm", size=12)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range around finite values, with some space, and never empty."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    space = (max(known) - min(known)) * 0.08 or max(abs(known[0]) * 0.1, 0.5)
    return min(known) - space, max(known) + space


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, at most `TICKS`."""
    for exponent in range(math.floor(math.log10(high - low)) - 1, math.ceil(math.log10(high - low)) + 1):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            if high / step - low / step <= TICKS - 1:
                first = math.ceil(low / step)
                return [i * step for i in range(first, math.floor(high / step) + 1)]
    return [low, high]
