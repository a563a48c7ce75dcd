"""One pass over records of a data set: what the histograms, the tables and the outliers of the page are made of."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from flowdit.data.captions import CAPTIONS
from flowdit.data.manifest import Manifest, Shard
from flowdit.data.origin import columns_of, integers
from flowdit.data.progress import progress_bar
from flowdit.data.shard_check import Findings, Problem, ShardCheck
from flowdit.data.shards import Sidecar, Sums, channel_statistics, latent_sums
from flowdit.storage import is_remote

EDGES = np.linspace(-6, 6, 61)
"""Of the histogram of normalised latents; the outer bins also have what is beyond."""
MOST_VALUES = 1000
"""Different texts of a column that are counted; a column with more has texts of its own for each image."""


class Example(NamedTuple):
    """A record and where it is. `score` is its largest distance from the mean of a channel, in standard deviations."""

    score: float
    file: str
    number: int
    split: str
    record: Mapping[str, Any]


@dataclasses.dataclass
class Column:
    """The values of a kept column: counts of texts, and numbers."""

    texts: Counter[str] = dataclasses.field(default_factory=Counter)
    numbers: list[float] = dataclasses.field(default_factory=list)
    missing: int = 0
    others: int = 0

    def add(self, value: Any) -> None:
        """Count a value: a text, a number, true, false or none."""
        if value is None:
            self.missing += 1
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self.numbers.append(float(value))
        elif (text := str(value)) in self.texts or len(self.texts) < MOST_VALUES:
            self.texts[text] += 1
        else:
            self.others += 1


@dataclasses.dataclass
class Survey:
    """What was found in `records` of the data set.

    `sizes` are (height, width) of originals in pixels, `seen` the parts of their areas that the crops show, `lengths`
    those of captions in characters, by field. `values` counts normalised latents by `EDGES`; `sums` are of the raw ones
    of the train split. `places` are files and numbers of the records. `examples` are evenly spaced, `outliers` in descending order of their scores.
    """

    records: int = 0
    mirrored: int = 0
    places: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    seen: list[float] = dataclasses.field(default_factory=list)
    lengths: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    captions: Counter[str] = dataclasses.field(default_factory=Counter)
    labels: Counter[int] = dataclasses.field(default_factory=Counter)
    columns: dict[str, Column] = dataclasses.field(default_factory=dict)
    scores: list[float] = dataclasses.field(default_factory=list)
    sums: Sums = dataclasses.field(default_factory=dict)
    values: Int[np.ndarray, " bins"] = dataclasses.field(default_factory=lambda: np.zeros(len(EDGES) - 1, np.int64))
    examples: list[Example] = dataclasses.field(default_factory=list)
    outliers: list[Example] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def chosen_records(manifest: Manifest, most: int, *, whole_shards: bool) -> list[tuple[Shard, Sequence[int]]]:
    """At most `most` records, evenly spaced: their shards, and their numbers in them; or all those of some shards."""
    shards = manifest.shards
    total = sum(shard.records for shard in shards)
    if whole_shards and total > most:
        wanted = max(1, len(shards) * most // total)
        return [
            (shards[i * len(shards) // wanted], range(shards[i * len(shards) // wanted].records)) for i in range(wanted)
        ]
    count = min(total, most)
    indices = np.arange(count) * total // count
    ends = np.cumsum([shard.records for shard in shards])
    parts = np.split(indices, np.searchsorted(indices, ends[:-1]))
    firsts = ends - [shard.records for shard in shards]
    chosen = zip(shards, parts, firsts, strict=True)
    return [(shard, (part - first).tolist()) for shard, part, first in chosen if len(part)]


class Surveyor:
    """Reads records and adds them up."""

    def __init__(self, manifest: Manifest, num_examples: int, num_outliers: int):
        self.survey = Survey()
        self._manifest, self._num_outliers = manifest, num_outliers
        self._num_examples = num_examples
        self._mean = np.array(manifest.channel_mean)[:, None, None]
        self._std = np.maximum(np.array(manifest.channel_std), 1e-12)[:, None, None]
        self._worst: list[tuple[float, int, Example]] = []

    def read(self, folder: epath.Path, most: int, scratch: Path) -> Survey:
        """The survey of at most about `most` records of the data set in `folder`."""
        check, findings = ShardCheck(folder, self._manifest, scratch), Findings()
        chosen = chosen_records(self._manifest, most, whole_shards=is_remote(folder))
        total = sum(len(numbers) for _, numbers in chosen)
        spacing, position = max(total / max(self._num_examples, 1), 1.0), 0
        with progress_bar("reading", "records", total, total) as progress:
            for shard, numbers in chosen:
                for number, record in check.sample(shard, numbers, findings):
                    example = Example(self._score(record), shard.file, number, shard.split, record)
                    self._add(example)
                    if self._num_examples and position >= len(self.survey.examples) * spacing:
                        self.survey.examples.append(example)
                    position += 1
                    progress.update()
        self.survey.problems = findings.problems
        self.survey.outliers = [example for _, _, example in sorted(self._worst, key=lambda item: -item[0])]
        return self.survey

    def _score(self, record: Mapping[str, Any]) -> float:
        return float(np.abs((record["latent"].astype(np.float32) - self._mean) / self._std).max())

    def _add(self, example: Example) -> None:
        survey, record = self.survey, example.record
        survey.records += 1
        survey.places.append((example.file, example.number))
        survey.mirrored += bool(record.get("mirrored"))
        survey.scores.append(example.score)
        self._add_origin(record)
        if "label" in record:
            survey.labels[int(record["label"])] += 1
        if self._manifest.has_captions:
            for name in CAPTIONS:
                survey.lengths.setdefault(name, []).append(len(record[name]))
            survey.captions[record[CAPTIONS[0]].strip() or record[CAPTIONS[1]].strip()] += not record.get("mirrored")
        if example.split == "train":
            for name, part in latent_sums(record).items():
                survey.sums[name] = survey.sums.get(name, 0) + part
        vae = self._manifest.vae
        normal = (record["latent"].astype(np.float32) - vae.shift) * vae.scale
        bins = np.clip((normal - EDGES[0]) * ((len(EDGES) - 1) / (EDGES[-1] - EDGES[0])), 0, len(EDGES) - 2)
        survey.values += np.bincount(bins.astype(np.int64).ravel(), minlength=len(EDGES) - 1)
        heapq.heappush(self._worst, (example.score, survey.records, example))
        if len(self._worst) > self._num_outliers:
            heapq.heappop(self._worst)

    def _add_origin(self, record: Mapping[str, Any]) -> None:
        survey = self.survey
        if "image_size" in record:
            height, width = size_of(record)
            survey.sizes.append((height, width))
            if "crop" in record:
                _, _, crop_height, crop_width = integers(record["crop"], 4)
                survey.seen.append(crop_height * crop_width / (height * width))
        for name, value in columns_of(record).items():
            survey.columns.setdefault(name, Column()).add(value)


def size_of(record: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a record's original in pixels."""
    size = np.ravel(record["image_size"]).tolist()
    return size[0], size[-1]


def repeated_captions(survey: Survey, most: int) -> Iterator[tuple[str, int]]:
    """The captions that several records have, the most frequent first."""
    for caption, count in survey.captions.most_common(most):
        if count > 1 and caption:
            yield caption, count


def channel_values(survey: Survey) -> tuple[Float[np.ndarray, " channels"], ...] | None:
    """Mean and standard deviation of each channel over the records of the train split."""
    return channel_statistics([Sidecar(survey.records, 1, "", survey.sums)]) if survey.sums else None
