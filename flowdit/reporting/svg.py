"""Charts as SVG, for readers without JavaScript; the page's script draws the same ones again, for the size of the screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowdit.reporting.html import Html, joined, tag
from flowdit.reporting.series import Chart, Series

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT = 56, 12
TOP, BOTTOM = 10, 36

Number = int | float


class Scale(NamedTuple):
    """A range of values along an axis of the drawing, and where its ticks are."""

    low: float
    high: float
    start: Number
    end: Number
    ticks: list[float]

    def at(self, value: Number) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(chart: Chart) -> Html:
    """The chart with linear axes."""
    xs = [x + side * (line.bars or 0) / 2 for line in chart.series for x in line.x for side in (-1, 1)]
    ys = [y for line in chart.series for y in line.y if math.isfinite(y)] + list(chart.levels.values())
    ys += [0.0 for line in chart.series if line.bars]
    across = _scale(xs, LEFT, WIDTH - RIGHT, space=0.0)
    up = _scale(ys, HEIGHT - BOTTOM, TOP, space=0.05)
    parts: list[Html] = []
    for tick in up.ticks:
        y = _short(up.at(tick))
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", amount(tick), class_="tick end", x=LEFT - 8, y=y, dy="0.32em"))
    at = lambda tick: _short(across.at(tick))
    floor = HEIGHT - BOTTOM + 16
    parts += [tag("text", amount(tick), class_="tick middle", x=at(tick), y=floor) for tick in across.ticks]
    parts.append(tag("text", chart.axis, class_="tick end", x=WIDTH - RIGHT, y=HEIGHT - 4))
    for name, value in chart.levels.items():
        y = _short(up.at(value))
        parts.append(tag("line", class_="level", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", name, class_="tick end", x=WIDTH - RIGHT, y=_short(up.at(value) - 4)))
    parts += [(_bars if line.bars else _line)(line, across.at, up.at) for line in chart.series]
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=chart.title)


def _bars(line: Series, across: Callable[[Number], float], up: Callable[[Number], float]) -> Html:
    """A bar from zero for each value."""
    half, parts = (line.bars or 0) / 2, []
    for x, y in zip(line.x, line.y, strict=True):
        left, right = across(x - half), across(x + half)
        size = {"width": _short(max(right - left - 1, 0.5)), "height": _short(abs(up(0) - up(y)))}
        parts.append(tag("rect", class_=f"bar c{line.colour}", x=_short(left), y=_short(min(up(y), up(0))), **size))
    return joined(parts)


def _line(line: Series, across: Callable[[Number], float], up: Callable[[Number], float]) -> Html:
    style = f"c{line.colour} d{line.dash} f{round(line.fade * 10)}"
    path, parts = [], []
    pen = "M"
    for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{_short(across(x))} {_short(up(y))}")
        pen = "L"
        error = line.error[i] if line.error else None
        if error:
            ends = {"y1": _short(up(y - error)), "y2": _short(up(y + error))}
            parts.append(tag("line", class_=f"line {style}", x1=_short(across(x)), x2=_short(across(x)), **ends))
        if line.dots or len(line.x) == 1:
            parts.append(tag("circle", class_=f"dot {style}", cx=_short(across(x)), cy=_short(up(y)), r=3))
        if i == line.best:
            parts.append(tag("circle", class_="ring", cx=_short(across(x)), cy=_short(up(y)), r=7))
    return joined([tag("path", class_=f"line {style}", d="".join(path)), *parts])


def _scale(values: Sequence[Number], start: Number, end: Number, space: float) -> Scale:
    low, high = (float(min(values)), float(max(values))) if values else (0.0, 1.0)
    if not high - low > abs(high) * 1e-9:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    margin = (high - low) * space
    low, high = low - (margin if low < 0 or low > margin else low), high + margin
    return Scale(low, high, start, end, ticks(low, high))


def ticks(low: Number, high: Number, count: int = 5) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / count
    if not (rough > 0 and math.isfinite(rough)):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.7)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)][:20]


def amount(value: Number) -> str:
    """A number for an axis: `0.25`, `1,800`, `40k`, `1.2M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if letter != 'k' else 1e3):.4g}{letter}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def _short(value: Number) -> str:
    return f"{value:.1f}"
