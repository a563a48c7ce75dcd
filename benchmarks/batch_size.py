"""Steps and images to a loss by batch size, with the best learning rate of each: the critical batch size.

The runs are those of a sweep over `train.batch_size` and `optim.learning_rate`, each in a folder within the one given;
`docs/performance.md` has the command. After McCandlish et al. 2018 (arXiv 1812.06162), S steps of B images lead to a
loss with S = S_min (1 + B_crit / B): below B_crit a larger batch saves steps, above it it only costs images.

`python -m benchmarks batch_size FOLDER [target=LOSS] [loss=FIGURE]` writes `batch_size.md` and `batch_size.svg` there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.screening.results import first_step_below
from benchmarks.timing import table
from flowdit.reporting.figure import COLOURS, figure
from flowdit.reporting.reading import read_runs
from flowdit.reporting.series import Chart, Series

LOSS = "validation/loss"


class Trial(NamedTuple):
    """A run: batch size, peak learning rate, lowest loss, and steps to the target, None if it was not reached."""

    batch: int
    rate: float
    lowest: float
    steps: float | None


class Fit(NamedTuple):
    """The fewest steps, those with the largest batch, and the critical batch size."""

    fewest: float
    critical: float

    def steps(self, batch: float) -> float:
        return self.fewest * (1 + self.critical / batch)


def parsed(arguments: Sequence[str]) -> tuple[Path, str, float | None]:
    """Folder, figure and target, from the arguments. Raises `ValueError` for others."""
    settings = dict(argument.split("=", 1) for argument in arguments[1:] if "=" in argument)
    if not arguments or len(settings) < len(arguments) - 1 or set(settings) - {"target", "loss"}:
        raise ValueError(f"batch_size: must be a folder of runs, target=LOSS and loss=FIGURE, got {list(arguments)}")
    if not any(Path(arguments[0]).glob("*/metrics.jsonl")):
        raise ValueError(f"batch_size: must be a folder of run folders, got {arguments[0]!r}")
    target = float(settings["target"]) if "target" in settings else None
    return Path(arguments[0]), settings.get("loss", LOSS), target


check = parsed


def read_trials(folder: Path, loss: str, target: float | None) -> tuple[list[Trial], float]:
    """The runs, and the target: if none is given, the lowest loss that every batch size reaches.

    Raises `ValueError` for a run without a checkpoint or the loss.
    """
    first, *others = sorted(str(file.parent) for file in folder.glob("*/metrics.jsonl"))
    found = []
    for run in read_runs(first, others):
        curve = run.metrics.curve(loss)
        if run.meta is None or curve is None:
            raise ValueError(f"{run.folder}: must have a checkpoint, and {loss} in its metrics")
        found.append((run.meta.config, curve, float(np.nanmin(curve.values))))
    if target is None:
        lowest: dict[int, float] = {}
        for config, _, low in found:
            lowest[config.train.batch_size] = min(low, lowest.get(config.train.batch_size, math.inf))
        target = max(lowest.values())
    trials = [
        Trial(config.train.batch_size, config.optim.learning_rate, low, first_step_below(curve, target))
        for config, curve, low in found
    ]
    return sorted(trials), target


def best_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The trial with the fewest steps of each batch size that reaches the target."""
    best: dict[int, Trial] = {}
    for trial in trials:
        if trial.steps is not None and (trial.batch not in best or trial.steps < (best[trial.batch].steps or 0)):
            best[trial.batch] = trial
    return [best[batch] for batch in sorted(best)]


def fitted(best: Sequence[Trial]) -> Fit | None:
    """The least relative squares; None for fewer than three batch sizes, or if steps do not fall with the batch."""
    if len(best) < 3:
        return None
    steps = np.array([trial.steps for trial in best], np.float64)
    columns = np.stack([np.ones(len(best)), [1 / trial.batch for trial in best]], axis=1)
    (fewest, slope), *_ = np.linalg.lstsq(columns / steps[:, None], np.ones(len(best)))
    return Fit(float(fewest), float(slope / fewest)) if fewest > 0 and slope > 0 else None


def page(trials: Sequence[Trial], target: float, loss: str) -> str:
    """The table with its notes."""
    best, fit = best_trials(trials), fitted(best_trials(trials))
    rates = sorted({trial.rate for trial in trials})
    rows = []
    for batch in sorted({trial.batch for trial in trials}):
        own = {trial.rate: trial for trial in trials if trial.batch == batch}
        chosen = next((trial for trial in best if trial.batch == batch), None)
        steps = None if chosen is None else chosen.steps
        row = [f"{batch}", "–" if chosen is None else f"{chosen.rate:g}", _amount(steps)]
        row += [_amount(None if steps is None else steps * batch), "–" if fit is None else _amount(fit.steps(batch))]
        rows.append(row + [_amount(own[rate].steps) if rate in own else "–" for rate in rates])
    head = ["batch size", "best learning rate", "steps", "images", "steps by the fit"]
    head += [f"steps at {rate:g}" for rate in rates]
    notes = [f"Steps to {loss} {target:.4f}, interpolated between validations; one seed."]
    if fit is None:
        notes.append("No fit: it takes three batch sizes whose steps fall with the batch.")
    else:
        text = f"S = S_min (1 + B_crit / B) with S_min {fit.fewest:,.0f} steps and B_crit {fit.critical:,.0f} images."
        notes.append(text + (" B_crit lies outside of the batch sizes." if not _is_within(fit, best) else ""))
    if best and any(trial.rate in (rates[0], rates[-1]) for trial in best) and len(rates) > 1:
        notes.append("A best learning rate at an end of the sweep may not be the best one.")
    return "\n".join([table(head, rows), "", *(f"- {note}" for note in notes)])


def _is_within(fit: Fit, best: Sequence[Trial]) -> bool:
    return best[0].batch <= fit.critical <= best[-1].batch


def _amount(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"


def charts(trials: Sequence[Trial], target: float, loss: str) -> list[Chart]:
    """Steps, and images, by batch size; both axes are logarithms to base 2."""
    best, fit = best_trials(trials), fitted(best_trials(trials))
    lines: dict[str, list[tuple[int, float]]] = {}
    for trial in trials:
        if trial.steps is not None:
            lines.setdefault(f"learning rate {trial.rate:g}", []).append((trial.batch, trial.steps))
    lines["the best"] = [(trial.batch, trial.steps or 0) for trial in best]
    if fit is not None:
        lines["fit"] = [(trial.batch, fit.steps(trial.batch)) for trial in best]
    found = []
    for what, weight in (("steps", lambda batch: 1), ("images", lambda batch: batch)):
        series = [
            Series(
                name=name,
                run=0,
                x=[math.log2(batch) for batch, _ in points],
                y=[math.log2(max(steps, 1) * weight(batch)) for batch, steps in points],
                colour=i % len(COLOURS),
                dash=int(name == "fit"),
                fade=1.0 if name in ("the best", "fit") else 0.4,
                dots=name != "fit",
            )
            for i, (name, points) in enumerate(lines.items())
        ]
        found.append(Chart("batch", f"log2 of {what} to {loss} {target:.4g}", "log2 of the batch size", series))
    return found


def measure(*arguments: str) -> str:
    """The table of the runs in a folder, which is also written there with a chart."""
    folder, loss, target = parsed(arguments)
    trials, target = read_trials(folder, loss, target)
    text = page(trials, target, loss)
    (folder / "batch_size.md").write_text(text + "\n", encoding="utf-8")
    (folder / "batch_size.svg").write_text(figure(charts(trials, target, loss)), encoding="utf-8")
    return text
