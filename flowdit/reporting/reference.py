"""Reference curves: the figures of a run by step in a CSV file, thinned, with what they are of in its first lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from flowdit.reporting.metrics import LARGEST, LONGEST_NAME, MOST_FIGURES, Curve, Metrics
from flowdit.storage import reason

SUFFIX = ".csv"
ENTRIES = 400
"""Rows of training figures at most; each is the mean since the row before."""
EVALUATIONS = 100
"""Rows of figures of evaluations at most."""
LARGEST_FILE = 2**24
MOST_ROWS = 10**5
MOST_POINTS = 2**20
"""Cells with a figure that are read at most; files written here have at most 200,000."""
LONGEST_LINE = 2**17
MOST_FACTS = 100
LONGEST_FACT = 1000
LAST = "train/learning_rate"
"""A figure that is not a mean: that of a row is the last one."""
LEFT_OUT = (
    *("train/images_per_second", "train/steps_per_second", "train/tflops_per_second", "train/mfu"),
    *("train/total_flops", "train/skipped_steps", "train/skipped_in_row", "train/first_step_seconds"),
)
"""Figures of the machine, and those that follow from others."""
KEPT = ("train/", "validation/", "scores/")


class Reference(NamedTuple):
    """The curves of a file, and its facts by name: `preset`, `commit`, `command`, `batch size`, `hardware`."""

    facts: dict[str, str]
    metrics: Metrics


def as_csv(metrics: Metrics, facts: dict[str, str]) -> str:
    """The losses, gradient norm, learning rate and scores of a run as CSV, with `# name: value` lines before."""
    curves = {n: c for n, c in metrics.curves.items() if n.startswith(KEPT) and n not in LEFT_OUT}
    columns: dict[str, dict[int, float]] = {"hours": {}}
    for name, curve in curves.items():
        thin = _binned(curve, name) if name.startswith("train/") else _spaced(curve)
        columns[name] = dict(zip(thin.steps.tolist(), thin.values.tolist(), strict=True))
    steps = sorted({step for column in columns.values() for step in column})
    if len(metrics.clock.steps):
        hours = np.interp(steps, metrics.clock.steps, metrics.clock.values)
        columns["hours"] = dict(zip(steps, hours.tolist(), strict=True))
    lines = [f"# {name}: {' '.join(value.split())}" for name, value in facts.items()]
    lines.append(",".join(["step", *columns]))
    for step in steps:
        cells = (f"{column[step]:.5g}" if step in column else "" for column in columns.values())
        lines.append(",".join([str(step), *cells]))
    return "\n".join(lines) + "\n"


def _binned(curve: Curve, name: str) -> Curve:
    """Means of consecutive entries, weighted by their steps, so that each is still the mean since the one before."""
    weights = np.diff(curve.steps, prepend=0).astype(np.float64)
    parts = np.array_split(np.arange(len(curve.steps)), min(ENTRIES, len(curve.steps)))
    mean = lambda part: np.average(curve.values[part], weights=np.maximum(weights[part], 1))
    values = [curve.values[part[-1]] if name == LAST else mean(part) for part in parts]
    return Curve(np.array([curve.steps[part[-1]] for part in parts]), np.array(values))


def _spaced(curve: Curve) -> Curve:
    """Evenly spaced points, with the first and the last."""
    count = len(curve.steps)
    chosen = np.unique(np.linspace(0, count - 1, min(count, EVALUATIONS)).round().astype(int))
    return Curve(curve.steps[chosen], curve.values[chosen])


def read_reference(file: epath.Path) -> Reference:
    """Read a file. Raises `ValueError` naming it if it cannot be read, is too large or has no curves."""
    try:
        if file.stat().length > LARGEST_FILE:
            raise ValueError(f"{file}: must have at most {LARGEST_FILE} bytes")
        text = file.read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"{file}: cannot be read: {reason(problem)}") from problem
    except UnicodeDecodeError:
        raise ValueError(f"{file}: must be text") from None
    try:
        facts, start = _facts(text)
        rows = csv.reader(_lines(text[start:]), strict=True)
        curves = _curves(next(rows, []), rows)
    except (csv.Error, ValueError) as problem:
        raise ValueError(f"{file}: must be a table of figures by step: {problem}") from None
    clock = curves.pop("hours", Curve(np.zeros(0, np.int64), np.zeros(0)))
    if not curves:
        raise ValueError(f"{file}: must be a table of figures by step: it has none")
    return Reference(facts, Metrics(curves, [], clock, 0))


def _facts(text: str) -> tuple[dict[str, str], int]:
    """The facts of the first lines, and where the text after them starts. Raises `ValueError` for too many."""
    facts: dict[str, str] = {}
    start = 0
    while text.startswith("#", start):
        if len(facts) == MOST_FACTS:
            raise ValueError(f"must have at most {MOST_FACTS} lines with facts (#), each with another name")
        end = text.find("\n", start) + 1 or len(text)
        name, _, value = text[start + 1 : end].partition(":")
        if (name := name.strip()[:LONGEST_NAME]) in facts:
            raise ValueError(f"must have facts (#) with different names, got {name[:40]!r} twice")
        facts[name] = value.strip()[:LONGEST_FACT]
        start = end
    return facts, start


def _lines(text: str) -> Iterator[str]:
    """The lines of a table. Raises `ValueError` for one that is too long."""
    for number, line in enumerate(io.StringIO(text)):
        if len(line) > LONGEST_LINE:
            raise ValueError(f"row {number} has more than {LONGEST_LINE} characters")
        yield line


def _curves(head: Sequence[str], rows: Iterator[list[str]]) -> dict[str, Curve]:
    """The columns; an empty cell is no point. Raises `ValueError` for a cell or a row that is wrong."""
    if not head or head[0] != "step" or len(set(head)) < len(head):
        raise ValueError("the first column must be step, and names must be different")
    if len(head) > MOST_FIGURES or max(map(len, head)) > LONGEST_NAME:
        raise ValueError(f"must have at most {MOST_FIGURES} columns, with names of at most {LONGEST_NAME} characters")
    points: dict[str, dict[int, float]] = {name: {} for name in head[1:]}
    count = 0
    for number, row in enumerate(rows):
        if number >= MOST_ROWS or len(row) != len(head):
            raise ValueError(f"row {number + 1} has {len(row)} cells, or is one of more than {MOST_ROWS}")
        step = int(row[0]) if row[0].isascii() and row[0].isdigit() and len(row[0]) < 16 else -1
        if step < 0:
            raise ValueError(f"step must be a number of at least 0, got {row[0][:20]!r}")
        count += sum(map(bool, row)) - 1
        if count > MOST_POINTS:
            raise ValueError(f"must have at most {MOST_POINTS} figures")
        for name, cell in zip(head[1:], row[1:], strict=True):
            if cell:
                points[name][step] = _figure(cell)
    return {
        name: Curve(np.array(sorted(of), np.int64), np.array([of[step] for step in sorted(of)], np.float64))
        for name, of in points.items()
        if of
    }


def _figure(cell: str) -> float:
    """A number; NaN if it is not finite or too large to calculate with."""
    value = float(cell[:40])
    return value if abs(value) <= LARGEST else float("nan")
