"""The page of a report: one HTML file that loads nothing, from this machine or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowdit.reporting import sections
from flowdit.reporting.charts import curve_charts, sweep_charts, time_charts
from flowdit.reporting.html import Html, folded, joined, note, section, tag
from flowdit.reporting.metrics import thinned
from flowdit.reporting.reading import RunRecord
from flowdit.reporting.results import Results
from flowdit.reporting.series import Chart
from flowdit.reporting.shell import chart_grid, figure_of, page_foot, page_head, whole_page

GENERATOR = "flowdit report"
"""In every report, which a later one may replace."""


def make_page(runs: Sequence[RunRecord], results: Sequence[Results], title: str | None, grids: int) -> str:
    """The whole file. Text from files is escaped, and the page's own policy forbids any request and other scripts."""
    title = title or " and ".join(run.name for run in runs)
    drawn: list[Chart] = []

    def figure(chart: Chart) -> Html:
        drawn.append(chart)
        return figure_of(len(drawn) - 1, chart, has_legend=len(chart.series) > 1 or len(runs) > 1)

    figures: dict[str, list[Html]] = {}
    for chart in (*curve_charts(runs), *time_charts(runs)):
        figures.setdefault(chart.section, []).append(figure(chart))
    scores = [chart_grid(figures.pop("scores", []))]
    for each in results:
        owner = tag("h3", runs[each.run].name) if each.run is not None and len(runs) > 1 else None
        scores.append(tag("div", owner, *sections.score_tables(each), class_="card"))
        scores.append(chart_grid([figure(chart) for chart in sweep_charts(each)]))
    body = _body(runs, title, grids, figures, scores)
    data = {"runs": [_run_data(run) for run in runs], "charts": [each.as_json() for each in drawn]}
    return whole_page(f"{title}: training report", body, data, GENERATOR)


def _run_data(run: RunRecord) -> dict[str, Any]:
    """What the script needs to draw by images and by hours, and to mark resumes."""
    clock = thinned(run.metrics.clock)
    return {
        "name": run.name,
        "batch": run.batch_size,
        "steps": clock.steps.tolist(),
        "hours": [round(hours, 6) for hours in clock.values.tolist()],
        "resumes": [one.first_step for one in run.metrics.sessions[1:]],
    }


def _body(
    runs: Sequence[RunRecord], title: str, grids: int, figures: dict[str, list[Html]], scores: list[Html]
) -> Html:
    of = lambda name: chart_grid(figures.get(name, []))
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
    return joined(
        [
            page_head(title, "Report", links),
            tag("main", sections.cards(runs), *parts),
            page_foot("python -m flowdit.report"),
        ]
    )


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
