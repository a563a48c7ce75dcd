"""What a report is made of: the files of a run folder, which may be damaged or of a run that is still training."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from flowdit.checkpoint.files import CheckpointError, list_steps, what_is_in
from flowdit.checkpoint.meta import RunMeta, newest_meta
from flowdit.errors import first_line
from flowdit.fields import FieldError, about, shortened
from flowdit.json_input import InputError, read_json
from flowdit.reporting.metrics import Metrics, read_metrics
from flowdit.reporting.reference import SUFFIX, read_reference
from flowdit.storage import connect, reason
from flowdit.tracking import METRICS

logger = logging.getLogger(__name__)

MOST_SKIPPED = 20
"""Explanations of skipped steps that are read at most."""

LARGEST_JSON = 2**26
"""Bytes of a file of scores, or of an explanation."""


class Explanation(NamedTuple):
    """Why a step was skipped: the first value that was not finite, in words."""

    step: int
    first: str


class RunRecord(NamedTuple):
    """A run as it is in its folder, or reference curves in a file.

    `meta` is that of the newest checkpoint, None without one. `grids` are the preview images by step, `results` the
    files of scores in the folder. `reference` has what is known of reference curves by name, None for a run.
    """

    name: str
    folder: epath.Path
    metrics: Metrics
    meta: RunMeta | None
    checkpoints: list[int]
    grids: dict[int, epath.Path]
    skipped: list[Explanation]
    results: list[epath.Path]
    reference: dict[str, str] | None = None

    @property
    def batch_size(self) -> int | None:
        """Images of a step, if that is known."""
        if self.meta is not None:
            return self.meta.config.train.batch_size
        given = (self.reference or {}).get("batch size", "")
        return int(given) if given.isascii() and given.isdigit() and 0 < len(given) < 10 else None

    @property
    def last_step(self) -> int:
        """The newest step with an entry."""
        return max((int(curve.steps[-1]) for curve in self.metrics.curves.values()), default=0)


def read_runs(run: str, compare: Sequence[str]) -> list[RunRecord]:
    """Read the run folders, and files of reference curves. Raises `FieldError` for what is neither, or has no figures."""
    given = [("run", run), *(("compare", folder) for folder in compare)]
    folders = {}
    for field, name in given:
        with about(field):
            folder = connect(name.rstrip("/") or name)
        if str(folder) in folders:
            raise FieldError("compare", f"must be other run folders, {folder} is given twice")
        folders[str(folder)] = (field, folder)
    names = short_names(list(folders))
    read = lambda folder: _read_reference if folder.suffix == SUFFIX and folder.is_file() else _read_run
    return [read(folder)(field, folder, name) for (field, folder), name in zip(folders.values(), names, strict=True)]


def short_names(folders: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as are needed to tell them apart."""
    parts = [folder.split("/") for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)


def _read_run(field: str, folder: epath.Path, name: str) -> RunRecord:
    if (folder / "meta").is_dir():
        raise FieldError(field, f"must be a run folder, {folder} is a checkpoint: give its parent")
    if not (folder / METRICS).exists():
        raise FieldError(field, f"must be a run folder with {METRICS}: {folder}: {what_is_in(folder)}")
    with about(field):
        metrics = read_metrics(folder / METRICS)
    if not metrics.curves:
        raise FieldError(field, f"{folder / METRICS} has no figures yet")
    if metrics.unreadable:
        logger.warning("%s: unreadable lines left out: %d", folder / METRICS, metrics.unreadable)
    checkpoints = list_steps(folder)
    return RunRecord(
        name=name if name not in (".", "..", "") else str(folder),
        folder=folder,
        metrics=metrics,
        meta=_meta(folder),
        checkpoints=checkpoints,
        grids=_grids(folder / "samples"),
        skipped=_skipped(folder / "skipped"),
        results=_results(folder),
    )


def _read_reference(field: str, file: epath.Path, name: str) -> RunRecord:
    with about(field):
        found = read_reference(file)
    return RunRecord(
        name=name,
        folder=file,
        metrics=found.metrics,
        meta=None,
        checkpoints=[],
        grids={},
        skipped=[],
        results=[],
        reference=found.facts,
    )


def _meta(folder: epath.Path) -> RunMeta | None:
    try:
        meta = newest_meta(folder)
    except (CheckpointError, OSError) as problem:
        logger.warning("%s: its checkpoints cannot be read: %s", folder, first_line(problem))
        return None
    if meta is None:
        logger.warning("%s has no intact checkpoint: configuration and data are unknown", folder)
    return meta


def _files(folder: epath.Path) -> list[epath.Path]:
    """The entries of a folder that may not exist."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as problem:
        logger.warning("%s cannot be read: %s", folder, reason(problem))
        return []


def _grids(folder: epath.Path) -> dict[int, epath.Path]:
    found = ((re.fullmatch(r"(\d{1,15})\.png", file.name), file) for file in _files(folder))
    return dict(sorted((int(name[1]), file) for name, file in found if name))


def _skipped(folder: epath.Path) -> list[Explanation]:
    found = []
    for file in _files(folder):
        if (name := re.fullmatch(r"(\d{1,15})\.json", file.name)) and len(found) < MOST_SKIPPED:
            try:
                found.append(Explanation(int(name[1]), _first_value(read_small_json(file))))
            except InputError as problem:
                logger.warning("%s", problem)
    return sorted(found)


def read_small_json(file: epath.Path) -> Any:
    """Read a JSON file. Raises `InputError` naming it if it cannot be read, is too large, or is not JSON."""
    try:
        size = file.stat().length
    except OSError as problem:
        raise InputError(f"{file}: cannot be read: {reason(problem)}") from problem
    if size > LARGEST_JSON:
        raise InputError(f"{file}: must have at most {LARGEST_JSON} bytes, has {size}")
    return read_json(file)


def _first_value(content: Any) -> str:
    first = content.get("first_not_finite") if isinstance(content, dict) else None
    if not isinstance(first, dict):
        return "the second pass was finite"
    words = [str(first[key]) for key in ("layer", "value") if isinstance(first.get(key), str)]
    return shortened(" ".join(words + ([f"({first['pass']} pass)"] if isinstance(first.get("pass"), str) else [])))


def _results(folder: epath.Path) -> list[epath.Path]:
    """`scores.json` in the run folder and in the folders directly in it."""
    places = [folder, *(path for path in _files(folder) if path.name not in ("samples", "skipped", "wandb", "profile"))]
    return [place / "scores.json" for place in places if (place / "scores.json").exists()]
