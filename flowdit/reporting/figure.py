"""Charts as one SVG file of their own, with titles and a legend, for pages outside a report."""

from __future__ import annotations

from collections.abc import Sequence

from flowdit.reporting.html import Html, tag
from flowdit.reporting.series import Chart, Series
from flowdit.reporting.svg import HEIGHT, WIDTH, draw

GAP = 30
TITLE = 28
ENTRY = 18
COLUMNS = 2
"""Charts beside one another, and columns of the legend in the width of each."""
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#be185d", "#57606a")
STYLE = "".join(
    [
        "svg{font-family:system-ui,sans-serif}.title{font-size:14px;font-weight:600;fill:#1b1f24}",
        ".name{font-size:12px;fill:#1b1f24}.tick{fill:#5b6570;font-size:11px}.end{text-anchor:end}",
        ".middle{text-anchor:middle}.grid{stroke:#e8ecf0}.level{stroke:#5b6570;stroke-dasharray:4 4}",
        ".line{fill:none;stroke-width:1.75;stroke-linejoin:round}.dot{stroke:#fff}.d1{stroke-dasharray:6 4}",
        ".d2{stroke-dasharray:2 3}",
        *(f".f{i}{{opacity:{i / 10}}}" for i in range(1, 10)),
        *(f".line.c{i}{{stroke:{colour}}}.dot.c{i}{{fill:{colour}}}" for i, colour in enumerate(COLOURS)),
    ]
)


def figure(charts: Sequence[Chart]) -> str:
    """The charts in rows of two, each with its legend if it has several lines."""
    columns = min(COLUMNS, len(charts))
    rows = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    parts: list[Html] = []
    top = 0
    for row in rows:
        for i, chart in enumerate(row):
            parts.append(tag("g", *_panel(chart), transform=f"translate({i * (WIDTH + GAP)} {top})"))
        top += TITLE + HEIGHT + GAP + ENTRY * max(_legend_rows(chart) for chart in row)
    width = columns * (WIDTH + GAP) - GAP
    background = tag("rect", width=width, height=top, fill="#ffffff")
    size = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {top}", "width": width, "height": top}
    return f"{tag('svg', tag('style', Html(STYLE)), background, *parts, **size)}\n"


def _panel(chart: Chart) -> list[Html]:
    drawing = tag("svg", draw(chart), y=TITLE, width=WIDTH, height=HEIGHT)
    parts = [tag("text", chart.title, class_="title", x=4, y=18), drawing]
    for i, line in enumerate(_named(chart)):
        x, y = i % COLUMNS * WIDTH // COLUMNS + 10, TITLE + HEIGHT + 12 + i // COLUMNS * ENTRY
        style = f"line c{line.colour} d{line.dash} f{round(line.fade * 10)}"
        parts.append(tag("line", class_=style, x1=x, x2=x + 22, y1=y, y2=y))
        parts.append(tag("text", line.name, class_="name", x=x + 28, y=y, dy="0.35em"))
    return parts


def _named(chart: Chart) -> list[Series]:
    """The lines of the legend: those with a name, if there are several lines."""
    return [line for line in chart.series if line.name] if len(chart.series) > 1 else []


def _legend_rows(chart: Chart) -> int:
    return -(-len(_named(chart)) // COLUMNS)
