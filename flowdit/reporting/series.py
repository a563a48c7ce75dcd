"""Charts and their lines, drawn by `svg`, and again by the page's script."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple


class Series(NamedTuple):
    """A line. `run` is the index of its run; `colour` and `dash` are numbers of the page's styles.

    `error` holds standard errors, `best` is the index of a point that is marked. With `fade`, from 0 (old) to 1 (new),
    the colour is weaker. `smooth` lines follow the page's smoothing. `bars` is the width of bars, along the axis, that
    are drawn instead of a line.
    """

    name: str
    run: int
    x: list[Any]
    y: list[Any]
    colour: int
    dash: int = 0
    error: list[float | None] | None = None
    fade: float = 1.0
    smooth: bool = False
    dots: bool = False
    best: int | None = None
    bars: float | None = None


class Chart(NamedTuple):
    """A chart. With `axis` "step" the page can also draw it by images or hours. `levels` are horizontal lines by name."""

    section: str
    title: str
    axis: str
    series: list[Series]
    note: str = ""
    levels: dict[str, float] = {}
    is_log: bool = False

    def as_json(self) -> dict[str, Any]:
        """For the page's script; None stands for values that are not finite."""
        series = [
            line._asdict()
            | {"x": _rounded(line.x), "y": _rounded(line.y), "error": line.error and _rounded(line.error)}
            for line in self.series
        ]
        return self._asdict() | {"series": series, "section": None}


def _rounded(values: Iterable[int | float | None]) -> list[int | float | None]:
    return [None if v is None or not math.isfinite(v) else v if v == int(v) else float(f"{v:.6g}") for v in values]
