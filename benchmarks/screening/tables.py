"""The results of a screening as JSON, as a Markdown table, and as a chart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.screening.jobs import Run, write_json
from benchmarks.screening.plan import BASELINE, Plan
from benchmarks.screening.results import Mean, Outcome, Row, rows
from benchmarks.timing import table
from flowdit.reporting.figure import COLOURS, figure
from flowdit.reporting.series import Chart, Series

SHOWN = 0.35
"""Validation losses above this share of their range, and above those at the end, are not drawn: those of the first steps
would fill the chart."""
NONE = "no finite validation loss"


def write(out: Path, plan: Plan, outcomes: Sequence[Outcome], failed: Mapping[Run, str]) -> str:
    """Write `results.json`, `results.md` and `results.svg`; returns the Markdown.

    The finals have other seeds and a table of their own: those of the screening chose the finalists, whose losses with
    them are too low.
    """
    if not any(one.run.option == BASELINE for one in outcomes):
        return "\n".join(f"- failed: {run}: {problem}" for run, problem in failed.items())
    found = {
        "screening": rows([one for one in outcomes if not plan.is_final(one.run.seed)]),
        "finals": rows([one for one in outcomes if plan.is_final(one.run.seed)]),
    }
    write_json(out / "results.json", _plain(_content(plan, outcomes, found, failed)))
    page = _page(plan, outcomes, found, failed)
    (out / "results.md").write_text(page + "\n", encoding="utf-8")
    (out / "results.svg").write_text(figure(_charts(plan, outcomes)), encoding="utf-8")
    return page


def _content(
    plan: Plan, outcomes: Sequence[Outcome], found: Mapping[str, Sequence[Row]], failed: Mapping[Run, str]
) -> dict[str, Any]:
    runs = [
        {
            "option": one.run.option,
            "seed": one.run.seed,
            "overrides": plan.overrides(one.run.option),
            "replaced": plan.replaced(one.run.option),
            "steps": one.steps,
            "steps_per_second": {"timed": one.rate, "in the run": one.measured},
            "lowest": one.lowest,
            "validation": {"steps": one.validation.steps.tolist(), "losses": one.validation.values.tolist()},
            "scores": one.scores,
        }
        for one in outcomes
    ]
    problems = [{"option": run.option, "seed": run.seed, "problem": problem} for run, problem in failed.items()]
    return {**found, "runs": runs, "failed": problems}


def _plain(value: Any) -> Any:
    """Named tuples as objects, and null for what is not finite."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _page(
    plan: Plan, outcomes: Sequence[Outcome], found: Mapping[str, Sequence[Row]], failed: Mapping[Run, str]
) -> str:
    tables = [f"## {title.capitalize()}\n\n{_table(part)}\n" for title, part in found.items() if part]
    budget = f"{plan.budget.steps} steps" if plan.budget.steps else f"{plan.budget.minutes:g} minutes of training"
    options = dict.fromkeys(one.run.option for one in outcomes)
    replaced = {option: plan.replaced(option) for option in options}
    notes = [
        f"Stage {plan.stage}, {budget} a run; `{plan.loss}`. Differences, steps and minutes to the baseline's lowest, and the "
        "share of its minutes compare each seed with the baseline of that seed. Steps are interpolated between "
        "validations.",
        "Baseline: `" + " ".join(plan.baseline) + "`",
        *(f"{name}: `{' '.join(overrides)}`" for name, overrides in plan.options.items()),
        *(
            f"{name}: without {', '.join(left)}, as a better option sets the same"
            for name, left in replaced.items()
            if left
        ),
        "Minutes are steps over steps/s, without compilation and evaluations; steps/s are of short runs before, each right "
        "after one of the baseline. Their error is that of all seeds of an option, and no part of the intervals."
        if plan.budget.minutes
        else "Minutes are steps over the steps/s in the run.",
        "Several seeds: mean ± 95 % interval (Student's t). Scores of one seed: value ± standard error.",
        *(f"{one.run}: {NONE}" for one in outcomes if one.lowest is None),
        *(f"Failed: {run}: {problem}" for run, problem in failed.items()),
    ]
    return "\n".join([*tables, *(f"- {note}" for note in notes)])


def _table(found: Sequence[Row]) -> str:
    parts = list(found[0].scores)
    names = {part: list(dict.fromkeys(name for row in found for name in row.scores[part])) for part in parts}
    head = ["option", "seeds", "steps", "steps/s", "in the run", "lowest loss", "less the baseline's"]
    head += ["steps to the baseline's lowest", "minutes to it", "of its minutes"]
    head += [f"{name}, {part}" for part in parts for name in names[part]]
    lines = []
    for row in found:
        line = [row.option, ", ".join(map(str, row.seeds)), f"{row.steps:,}", shown(Mean(row.rate, None, 1), ".3g")]
        line += [shown(row.measured, ".3g"), shown(row.lowest, ".4f"), shown(row.difference, "+.4f")]
        line += [_reached(row, row.steps_to, ",.0f"), _reached(row, row.minutes_to, ".1f")]
        line.append(shown(row.share, ".0%") if row.share is not None and row.share.half is not None else "–")
        line += [_score(row, part, name) for part in parts for name in names[part]]
        lines.append(line)
    return table(head, lines)


def shown(mean: Mean | None, digits: str) -> str:
    """A mean, with its interval if there is one."""
    if mean is None or not math.isfinite(mean.value):
        return "–"
    return f"{mean.value:{digits}}" + (f" ± {mean.half:{digits.lstrip('+')}}" if mean.half is not None else "")


def _reached(row: Row, mean: Mean | None, digits: str) -> str:
    """A mean over all seeds; else how many have reached the loss."""
    if mean is not None or not row.compared:
        return shown(mean, digits)
    return f"{row.reached} of {row.compared} reached"


def _score(row: Row, part: str, name: str) -> str:
    if name not in row.scores[part]:
        return "–"
    mean, error = row.scores[part][name]
    if mean.half is None and error is not None:
        return f"{mean.value:.4f} ± {error:.4f}"
    return shown(mean, ".4f")


def _charts(plan: Plan, outcomes: Sequence[Outcome]) -> list[Chart]:
    """Validation loss over steps and over minutes: the colour tells the option, one more round of colours is dashed."""
    limit = _limit(outcomes)
    drawn = [one for one in outcomes if one.lowest is not None and one.lowest <= limit]
    options = list(dict.fromkeys(one.run.option for one in outcomes))
    lines: tuple[list[Series], list[Series]] = ([], [])
    for one in drawn:
        number = options.index(one.run.option)
        is_drawn = one.validation.values <= limit
        steps, losses = one.validation.steps[is_drawn], one.validation.values[is_drawn].tolist()
        is_first = one.run == next(other.run for other in drawn if other.run.option == one.run.option)
        colour, dash = number % len(COLOURS), min(number // len(COLOURS), 2)
        name = one.run.option if is_first else ""
        lines[0].append(Series(name, number, steps.tolist(), losses, colour, dash))
        lines[1].append(Series(name, number, [one.minutes(step) for step in steps], losses, colour, dash))
    base = [one.lowest for one in drawn if one.run.option == BASELINE and one.lowest is not None]
    levels = {"baseline's lowest": statistics.fmean(base)} if base else {}
    return [
        Chart("curves", f"{plan.loss} by {axis}", axis, series, levels=levels)
        for axis, series in zip(("steps", "minutes"), lines, strict=True)
    ]


def _limit(outcomes: Sequence[Outcome]) -> float:
    """The highest loss that is drawn. A run that ends above the baseline's first loss has diverged and is left out."""
    lowest = [one.lowest for one in outcomes if one.lowest is not None]
    base = [one.validation.values for one in outcomes if one.run.option == BASELINE and one.lowest is not None]
    if not base:
        return math.inf
    high = max(float(values[np.isfinite(values)][0]) for values in base)
    return max([min(lowest) + SHOWN * (high - min(lowest)), *(loss for loss in lowest if loss <= high)])
