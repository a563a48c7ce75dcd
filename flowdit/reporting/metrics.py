"""`metrics.jsonl` of a run as curves and sessions. The run may still be writing it."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flowdit.storage import reason

LONGEST_LINE = 2**20
LARGEST_FILE = 2**28
"""Bytes that are read at most; more is left out."""
MOST_FIGURES = 500
LONGEST_NAME = 120
LARGEST = 1e100
FIRST = "train/first_step_seconds"
"""Only the first entry of a process has it."""


class Curve(NamedTuple):
    """A figure by step, in order of the steps; NaN where it was not finite."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


class Session(NamedTuple):
    """What one process has trained: steps, Unix times of its start and last entry, and the steps that were done again.

    `began` and `ended` are None if the file has no times.
    """

    first_step: int
    last_step: int
    began: float | None
    ended: float | None
    repeated: int

    @property
    def hours(self) -> float:
        """Hours between start and last entry."""
        return 0.0 if self.began is None or self.ended is None else max(0.0, self.ended - self.began) / 3600


class Metrics(NamedTuple):
    """All figures of a run by name, its sessions, hours of training by step, and the number of unreadable lines."""

    curves: dict[str, Curve]
    sessions: list[Session]
    clock: Curve
    unreadable: int

    def curve(self, name: str) -> Curve | None:
        """A figure, None if it was never logged."""
        return self.curves.get(name)


class _Points:
    """Steps and values in the order of the file."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Drop the newest points from `step` on."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()

    def curve(self) -> Curve:
        """The points in order of their steps; of several for one step the newest."""
        steps, values = np.array(self.steps, np.int64), np.array(self.values, np.float64)
        _, newest = np.unique(steps[::-1], return_index=True)
        chosen = len(steps) - 1 - newest
        return Curve(steps[chosen], values[chosen])


class _Reader:
    """Collects entries. Steps that were done again after a resume from an earlier step replace those before."""

    def __init__(self) -> None:
        self.figures: dict[str, _Points] = {}
        self.clock = _Points()
        self.sessions: list[Session] = []
        self.hours_before = 0.0

    def add(self, entry: dict[str, Any]) -> None:
        step, time = entry["step"], number(entry.get("time"))
        if "train/loss" in entry:
            self._trained(step, time, number(entry.get(FIRST)))
        for name, value in entry.items():
            if name in ("step", "time", FIRST) or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name not in self.figures and len(self.figures) < MOST_FIGURES and len(name) <= LONGEST_NAME:
                self.figures[name] = _Points()
            if name in self.figures:
                self.figures[name].add(step, math.nan if (known := number(value)) is None else known)

    def _trained(self, step: int, time: float | None, first: float | None) -> None:
        last = self.sessions[-1].last_step if self.sessions else -1
        if not self.sessions or first is not None or step <= last:
            for points in (*self.figures.values(), self.clock):
                points.cut(step)
            self.hours_before += self.sessions[-1].hours if self.sessions else 0.0
            began = None if time is None else time - min(max(first or 0.0, 0.0), time)
            self.sessions.append(Session(step, step, began, time, max(0, last - step + 1)))
        self.sessions[-1] = self.sessions[-1]._replace(last_step=step, ended=time)
        if time is not None and self.sessions[-1].began is not None:
            self.clock.add(step, self.hours_before + self.sessions[-1].hours)


def read_metrics(file: epath.Path) -> Metrics:
    """Read the file, without lines that are damaged. Raises `ValueError` naming it if it cannot be read."""
    reader, unreadable = _Reader(), 0
    try:
        with file.open("rb") as stream:
            for line in _lines(stream):
                entry = _entry(line)
                if entry is None:
                    unreadable += 1
                else:
                    reader.add(entry)
    except OSError as problem:
        raise ValueError(f"{file}: cannot be read: {reason(problem)}") from problem
    curves = {name: points.curve() for name, points in reader.figures.items() if points.steps}
    return Metrics(curves, reader.sessions, reader.clock.curve(), unreadable)


def _lines(stream: Any) -> Iterator[bytes]:
    """The lines of a binary file up to `LARGEST_FILE`; one that is too long is cut, so that it is no JSON object."""
    left, rest = LARGEST_FILE, b""
    # Not by `readline`: files of object stores take no limit there.
    while left > 0 and (block := stream.read(min(left, LONGEST_LINE))):
        left -= len(block)
        *lines, rest = (rest + block).split(b"\n")
        yield from filter(bytes.strip, lines)
        rest = rest if len(rest) <= LONGEST_LINE else rest[:1]
    if rest.strip():
        yield rest


def _entry(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line with a valid `step`, else None."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53
    return entry if is_step else None


def number(value: Any) -> float | None:
    """A finite number as a float, else None. So that no sum or ratio overflows, its size is 0 or in [1e-100, 1e100]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value) if abs(value) * LARGEST >= 1 else 0.0


def thinned(curve: Curve, most: int = 1_000) -> Curve:
    """At most `most` points: of each of `most / 2` stretches the lowest and the highest, so that peaks stay visible."""
    if len(curve.steps) <= most:
        return curve
    kept: set[int] = {0, len(curve.steps) - 1}
    for part in np.array_split(np.arange(len(curve.steps)), most // 2 - 1):
        values = curve.values[part]
        if np.isfinite(values).any():
            kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
        else:
            kept.add(int(part[0]))
    chosen = sorted(kept)
    return Curve(curve.steps[chosen], curve.values[chosen])
