"""The scores of `flowdit.evaluate`, from its `scores.json`. Missing parts are left out, so that other versions are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from flowdit.fields import FieldError, about, shortened
from flowdit.json_input import InputError
from flowdit.reporting.metrics import number
from flowdit.reporting.reading import RunRecord, read_small_json
from flowdit.scores.metrics import METRICS, Score
from flowdit.scores.results import title
from flowdit.storage import connect, is_remote

logger = logging.getLogger(__name__)

FILE = "scores.json"
MOST_POINTS = 1_000


class Point(NamedTuple):
    """One point of a sweep: settings by name, mean evaluations of the network for an image, scores by space and metric."""

    settings: dict[str, Any]
    evaluations: float | None
    scores: dict[str, dict[str, Score]]


class Results(NamedTuple):
    """One file of scores. `facts` describes model, images and reference, `floors` has the scores of real images.

    `run` is the index of the run that it is of, None if that is unknown; `best` that of the best point.
    """

    source: str
    run: int | None
    facts: dict[str, str]
    identities: dict[str, str]
    floors: dict[str, dict[str, Score]]
    floor_counts: dict[str, int]
    points: list[Point]
    best: int | None
    best_metric: str | None

    def spaces(self) -> list[str]:
        """The feature spaces of any point."""
        return list(dict.fromkeys(space for point in self.points for space in point.scores))

    def metrics(self, space: str) -> list[str]:
        """The metrics in a space."""
        return list(dict.fromkeys(name for point in self.points for name in point.scores.get(space, {})))

    def description(self) -> str:
        """What was scored, against what."""
        words = {
            "images.count": "{} images",
            "checkpoint.step": "of step {}",
            "checkpoint.name": "of {}",
            "images.conditions": "({})",
            "reference.description": "against {}",
        }
        return " ".join(text.format(self.facts[key]) for key, text in words.items() if key in self.facts)

    def varied(self) -> list[str]:
        """The settings in which the points differ."""
        names = dict.fromkeys(name for point in self.points for name in point.settings)
        return [name for name in names if len({str(point.settings.get(name)) for point in self.points}) > 1]


def read_results(runs: Sequence[RunRecord], given: Sequence[str]) -> list[Results]:
    """The results in the run folders, then the given ones. Raises `FieldError` for a given one that cannot be read."""
    found: dict[str, Results] = {}
    for index, run in enumerate(runs):
        for file in run.results:
            try:
                found[str(file)] = _read(file, index, runs)
            except InputError as problem:
                logger.warning("%s", problem)
    for name in given:
        with about("scores"):
            path = connect(name)
            file = path / FILE if path.is_dir() else path
            if not file.exists():
                raise FieldError(
                    "scores", f"must be a {FILE} of flowdit.evaluate or its folder, got {name}: no such file"
                )
            found[str(file)] = _read(file, None, runs)
    return list(found.values())


def _read(file: epath.Path, run: int | None, runs: Sequence[RunRecord]) -> Results:
    content = read_small_json(file)
    points = [_point(entry) for entry in _list(_dict(content).get("points"))[:MOST_POINTS]]
    points = [point for point in points if point.scores]
    if not points:
        raise InputError(f"{file}: must be the scores of flowdit.evaluate, has no points with scores")
    spaces = {_text(name): _dict(entry) for name, entry in _dict(content.get("features")).items()}
    best = _dict(content.get("best"))
    index = best.get("point")
    checkpoint = _dict(content.get("checkpoint"))
    return Results(
        source=str(file),
        run=_run_of(checkpoint, runs) if run is None else run,
        facts=dict(_facts("checkpoint", checkpoint))
        | dict(_facts("images", _dict(content.get("images"))))
        | dict(_facts("reference", _dict(content.get("reference")))),
        identities={name: _text(entry.get("identity", "")) for name, entry in spaces.items()},
        floors={name: _values(entry.get("floor")) for name, entry in spaces.items()},
        floor_counts={
            name: entry["floor_count"] for name, entry in spaces.items() if isinstance(entry.get("floor_count"), int)
        },
        points=points,
        best=index if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(points) else None,
        best_metric=_text(best["metric"]) if isinstance(best.get("metric"), str) else None,
    )


def _run_of(checkpoint: dict[str, Any], runs: Sequence[RunRecord]) -> int | None:
    """The run in whose folder the checkpoint is."""
    name = checkpoint.get("name")
    if not isinstance(name, str):
        return None
    path = f"{_absolute(name)}/"
    matching = (index for index, run in enumerate(runs) if path.startswith(f"{_absolute(str(run.folder))}/"))
    return next(matching, None)


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def _facts(name: str, values: dict[str, Any], depth: int = 0) -> Iterable[tuple[str, str]]:
    """Nested values as `name.key: text`."""
    for key, value in list(values.items())[:40]:
        if isinstance(value, dict) and depth < 2:
            yield from _facts(f"{name}.{_text(key)}", value, depth + 1)
        elif value is not None:
            yield f"{name}.{_text(key)}", _text(value)


def _point(entry: Any) -> Point:
    entry = _dict(entry)
    scores = {_text(space): _values(values) for space, values in _dict(entry.get("scores")).items()}
    settings = {_text(name): _setting(value) for name, value in _dict(entry.get("settings")).items()}
    return Point(settings, number(entry.get("evaluations")), {space: found for space, found in scores.items() if found})


def _values(entry: Any) -> dict[str, Score]:
    found = {}
    for name, score in _dict(entry).items():
        value = number(_dict(score).get("value"))
        if value is not None:
            found[_text(name)] = Score(_text(name), value, number(_dict(score).get("error")))
    return found


def _setting(value: Any) -> Any:
    """A setting of a point: a number, None, text, or a list of these."""
    if isinstance(value, list):
        return [_setting(part) if not isinstance(part, list) else _text(part) for part in value[:8]]
    return value if value is None or number(value) is not None else _text(value)


def metric_title(name: str) -> str:
    """The name of a metric for people, of one that is not known its own."""
    return title(name) if name.partition("/")[0] in METRICS else name


def direction(name: str) -> str:
    """Which values of a metric are better, in words."""
    metric = METRICS.get(name.partition("/")[0])
    return "" if metric is None else "higher is better" if metric.higher_is_better else "lower is better"


def _text(value: Any) -> str:
    return shortened(str(value), 300)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
