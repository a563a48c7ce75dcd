"""A chart of several plans: memory, time of a step, and images/s, with a row for each topology."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flowdit.canvas import GRID, INK, LIMIT, MUTED, Canvas, Number
from flowdit.hardware import GIGA
from flowdit.planning.planner import Plan

LABELS = 150
PANEL = 330
GAP = 50
ROW = 38
TOP = 46
LEGEND = 22
BOTTOM = 16
MEMORY = ("#0969da", "#54aeff", "#b6e3ff", "#8250df", "#bf8700", "#d0d7de")
COMPUTATION, COMMUNICATION = "#1a7f37", "#bf8700"
RATE, RATE_AT_MOST = "#0969da", "#b6e3ff"


class Bar(NamedTuple):
    """Parts from left to right as (length, colour), the text after them, and a limit that is marked."""

    parts: list[tuple[float, str]]
    text: str
    limit: float = 0.0

    @property
    def length(self) -> float:
        return sum(length for length, _ in self.parts)


class Panel(NamedTuple):
    """A title, the meanings of its colours, and a bar for each topology, None where nothing is known."""

    title: str
    legend: list[tuple[str, str]]
    bars: list[Bar | None]

    @property
    def longest(self) -> float:
        bars = [bar for bar in self.bars if bar is not None]
        return max([max(bar.length, bar.limit) for bar in bars if max(bar.length, bar.limit) > 0], default=1.0)


def save_chart(path: Path, plans: Sequence[Plan]) -> None:
    """Save the chart of `plans` as a PNG."""
    panels = [_memory(plans), _step(plans), _rate(plans)]
    legend = LEGEND * max(len(panel.legend) for panel in panels)
    width = LABELS + len(panels) * (PANEL + GAP)
    height = TOP + len(plans) * ROW + legend + BOTTOM
    canvas = Canvas(width, height)
    for row, plan in enumerate(plans):
        middle = TOP + (row + 0.5) * ROW
        canvas.text(LABELS - 14, middle - 1, plan.topology, INK, anchor="rs", size=13)
        mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
        canvas.text(LABELS - 14, middle + 12, mesh or "1 device", MUTED, anchor="rs", size=10)
    for number, panel in enumerate(panels):
        _draw(canvas, panel, LABELS + number * (PANEL + GAP), len(plans))
    canvas.save(path)


def _memory(plans: Sequence[Plan]) -> Panel:
    """Each bar as a share of its own limit."""
    colours = dict(zip(dict.fromkeys(part for plan in plans for part in plan.memory), MEMORY, strict=False))
    bars: list[Bar | None] = []
    for plan in plans:
        sizes = f"{plan.peak_memory / GIGA:.1f} of {plan.memory_limit / GIGA:.1f} GB"
        parts = [(size / plan.memory_limit, colours[part]) for part, size in plan.memory.items()]
        bars.append(Bar(parts, sizes if plan.fits else f"{sizes}: too much", 1.0))
    return Panel("memory of a device", [*colours.items(), ("limit", LIMIT)], bars)


def _step(plans: Sequence[Plan]) -> Panel:
    bars: list[Bar | None] = []
    for plan in plans:
        if plan.step_seconds is None or plan.compute_seconds is None or plan.communication_seconds is None:
            bars.append(None)
            continue
        low, high = (value * 1e3 for value in plan.step_seconds)
        parts = [(plan.compute_seconds * 1e3, COMPUTATION), (plan.communication_seconds * 1e3, COMMUNICATION)]
        bars.append(Bar(parts, f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"))
    legend = [("computation", COMPUTATION), ("communication, if nothing hides it", COMMUNICATION)]
    return Panel("a step, ms", legend, bars)


def _rate(plans: Sequence[Plan]) -> Panel:
    bars: list[Bar | None] = []
    for plan in plans:
        if plan.images_per_second is None or plan.utilisation is None:
            bars.append(None)
            continue
        low, high = (value / plan.devices for value in plan.images_per_second)
        shown = f"{low:.0f} to {high:.0f}" if high - low > 0.5 else f"{high:.0f}"
        text = f"{shown}, {plan.utilisation.high:.0%} of peak"
        bars.append(Bar([(low, RATE), (high - low, RATE_AT_MOST)], text))
    return Panel("images/s of a device", [("at least", RATE), ("at most", RATE_AT_MOST)], bars)


def _draw(canvas: Canvas, panel: Panel, left: Number, rows: int) -> None:
    unit = PANEL * 0.66 / panel.longest  # the rest is for the text
    canvas.text(left, TOP - 18, panel.title, INK, anchor="ls", size=14)
    canvas.box(left, TOP - 6, left + 1, TOP + rows * ROW, GRID)
    for row, bar in enumerate(panel.bars):
        top, middle = TOP + row * ROW + 8, TOP + (row + 0.5) * ROW
        if bar is None:
            canvas.text(left + 6, middle, "does not fit", LIMIT, anchor="lm", size=12)
            continue
        x = left
        for length, colour in bar.parts:
            canvas.box(x, top, x + length * unit, top + ROW - 16, colour)
            x += length * unit
        if bar.limit:
            place = left + bar.limit * unit
            canvas.box(place - 1, top - 3, place + 1, top + ROW - 13, LIMIT)
        canvas.text(left + max(bar.length, bar.limit) * unit + 6, middle, bar.text, INK, anchor="lm", size=12)
    for row, (name, colour) in enumerate(panel.legend):
        y = TOP + rows * ROW + 8 + row * LEGEND
        canvas.box(left, y, left + 12, y + 12, colour)
        canvas.text(left + 18, y + 6, name, MUTED, anchor="lm", size=12)
