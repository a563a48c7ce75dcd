"""What the pages of this package have in common: one HTML file that loads nothing, its charts, and how it is written."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import flowdit
from flowdit.fields import FieldError
from flowdit.reporting.html import Html, escaped, json_for_script, note, tag
from flowdit.reporting.series import Chart
from flowdit.reporting.svg import draw
from flowdit.storage import reason


def whole_page(title: str, body: Html, data: dict[str, Any], generator: str) -> str:
    """The whole file. `data` has the `charts` for the page's script, and the `runs` that they are of.

    The page's own policy forbids any request and other scripts. `generator` marks a file that `write_page` may replace.
    """
    files = resources.files("flowdit.reporting") / "template"
    style = (files / "report.css").read_text(encoding="utf-8")
    script = (files / "report.js").read_text(encoding="utf-8")
    template = string.Template((files / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        generator=f"{generator} {flowdit.__version__}",
        title=escaped(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        body=body,
        data=json_for_script(data),
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def page_head(title: str, kind: str, links: Sequence[Html]) -> Html:
    """The title, when the page was made, and links to its sections."""
    made = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return tag("header", tag("h1", title), tag("p", f"{kind} of {made}", class_="muted"), tag("nav", *links))


def page_foot(command: str) -> Html:
    return tag("footer", f"Made by {command}, flowdit {flowdit.__version__}. This file loads nothing else.")


def chart_grid(figures: Sequence[Html]) -> Html:
    """Charts beside one another, as many as the screen has room for."""
    return tag("div", *figures, class_="charts") if figures else Html("")


def figure_of(number: int, chart: Chart, *, has_legend: bool) -> Html:
    """Chart `number` of the page's data."""
    entries = []
    for line in chart.series if has_legend else ():
        style = f"line c{line.colour} d{line.dash} f{round(line.fade * 10)}"
        swatch = tag("svg", tag("line", class_=style, x1=1, x2=21, y1=4, y2=4), class_="swatch", viewBox="0 0 22 8")
        entries.append(tag("span", swatch, tag("span", line.name), class_="entry"))
    return tag(
        "figure",
        tag("figcaption", tag("div", tag("h3", chart.title), note(chart.note) if chart.note else None)),
        tag("div", draw(chart), class_="plot"),
        tag("div", *entries, class_="legend"),
        class_="chart card",
        data_chart=number,
    )


def check_replaceable(out: Path, generator: str, what: str) -> None:
    """Raise `FieldError` if there is a file that is not `what` (such as "a report"), a page of this generator."""
    if out.is_dir():
        raise FieldError("out", f"must be a file, {out} is a folder")
    if not out.exists():
        return
    try:
        with out.open("rb") as file:
            start = file.read(2000)
    except OSError as problem:
        raise FieldError("out", f"{out} cannot be read: {reason(problem)}") from None
    if f'name="generator" content="{generator}'.encode() not in start:
        raise FieldError("out", f"{out} exists and is not {what}: give another name")


def write_page(out: Path, page: str) -> None:
    """Write a page, whole or not at all. Raises `FieldError` if it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}.unfinished")
        unfinished.write_text(page, encoding="utf-8", errors="replace")
        os.replace(unfinished, out)
    except OSError as problem:
        raise FieldError("out", f"{out} cannot be written: {reason(problem)}") from None
