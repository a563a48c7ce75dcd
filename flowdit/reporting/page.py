"""The page of a report: one HTML file that loads nothing, from this machine or another."""

from __future__ import annotations

import base64
import datetime
import hashlib
import string
from collections.abc import Sequence
from importlib import resources
from typing import Any

import flowdit
from flowdit.reporting import sections
from flowdit.reporting.charts import Chart, curve_charts, sweep_charts, time_charts
from flowdit.reporting.html import Html, escaped, joined, json_for_script, tag
from flowdit.reporting.metrics import thinned
from flowdit.reporting.reading import RunRecord
from flowdit.reporting.results import Results
from flowdit.reporting.sections import folded, note, section
from flowdit.reporting.svg import draw

GENERATOR = "flowdit report"
"""In every report, which a later one may replace."""


def make_page(runs: Sequence[RunRecord], results: Sequence[Results], title: str | None, grids: int) -> str:
    """The whole file. Text from files is escaped, and the page's own policy forbids any request and other scripts."""
    title = title or " and ".join(run.name for run in runs)
    drawn: list[Chart] = []

    def figure(chart: Chart) -> Html:
        drawn.append(chart)
        return _figure(len(drawn) - 1, chart, len(runs))

    figures: dict[str, list[Html]] = {}
    for chart in (*curve_charts(runs), *time_charts(runs)):
        figures.setdefault(chart.section, []).append(figure(chart))
    scores = [_grid(figures.pop("scores", []))]
    for each in results:
        owner = tag("h3", runs[each.run].name) if each.run is not None and len(runs) > 1 else None
        scores.append(tag("div", owner, *sections.score_tables(each), class_="card"))
        scores.append(_grid([figure(chart) for chart in sweep_charts(each)]))
    body = _body(runs, title, grids, figures, scores)
    files = resources.files("flowdit.reporting") / "template"
    style = (files / "report.css").read_text(encoding="utf-8")
    script = (files / "report.js").read_text(encoding="utf-8")
    template = string.Template((files / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        generator=f"{GENERATOR} {flowdit.__version__}",
        title=escaped(f"{title}: training report"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        body=body,
        data=json_for_script({"runs": [_run_data(run) for run in runs], "charts": [each.as_json() for each in drawn]}),
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _run_data(run: RunRecord) -> dict[str, Any]:
    """What the script needs to draw by images and by hours, and to mark resumes."""
    clock = thinned(run.metrics.clock)
    return {
        "name": run.name,
        "batch": None if run.meta is None else run.meta.config.train.batch_size,
        "steps": clock.steps.tolist(),
        "hours": [round(hours, 6) for hours in clock.values.tolist()],
        "resumes": [one.first_step for one in run.metrics.sessions[1:]],
    }


def _body(
    runs: Sequence[RunRecord], title: str, grids: int, figures: dict[str, list[Html]], scores: list[Html]
) -> Html:
    of = lambda name: _grid(figures.get(name, []))
    others = of("others")
    parts = [
        section("curves", "Curves", _tools(), of("curves"), _notes(runs)),
        section("samples", "Samples", sections.samples(runs, grids)),
        section("scores", "Scores", *scores),
        section("time", "Loss by flow time", of("time") and note("t = 0 is data, t = 1 is noise."), of("time")),
        section("parts", "Parts of the loss", of("parts")),
        section("others", "Other figures", others and folded("figures that are logged besides", others)),
        section("settings", "Settings", *sections.settings(runs)),
        section("sessions", "Sessions", *sections.sessions(runs)),
        section("machine", "Machine and versions", sections.machines(runs)),
        section("data", "Data and licence", *sections.data(runs)),
    ]
    names = ("curves", "samples", "scores", "time", "parts", "others", "settings", "sessions", "machine", "data")
    links = [
        tag("a", name.capitalize() if name != "time" else "By t", href=f"#{name}")
        for name, part in zip(names, parts, strict=True)
        if part
    ]
    made = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    head = tag("header", tag("h1", title), tag("p", f"Report of {made}", class_="muted"), tag("nav", *links))
    foot = tag(
        "footer", f"Made by python -m flowdit.report, flowdit {flowdit.__version__}. This file loads nothing else."
    )
    return joined([head, tag("main", sections.cards(runs), *parts), foot])


def _grid(figures: Sequence[Html]) -> Html:
    return tag("div", *figures, class_="charts") if figures else Html("")


def _tools() -> Html:
    """The controls of all charts, hidden until the page's script fills them."""
    smoothing = tag("label", "Smoothing", tag("input", type="range", min="0", max="100", value="0"))
    return tag(
        "div",
        tag("div", class_="group axes", role="group", aria_label="horizontal axis"),
        smoothing,
        tag("div", class_="group runs", role="group", aria_label="runs"),
        class_="tools",
        hidden=True,
    )


def _notes(runs: Sequence[RunRecord]) -> Html:
    text = "Training figures are means since the previous entry; validation uses the EMA weights."
    if any(len(run.metrics.sessions) > 1 for run in runs):
        text += " Dotted vertical lines are resumes; steps that were done again are shown as done the last time."
    return note(text)


def _figure(number: int, chart: Chart, num_runs: int) -> Html:
    entries = []
    if len(chart.series) > 1 or num_runs > 1:
        for line in chart.series:
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
