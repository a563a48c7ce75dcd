"""The records of a split by data set and bucket: of one data set, or of several that are mixed (`data.mix`)."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float64

from flowdit.data.captions import TextReader
from flowdit.data.feature_cache import FeatureMaps
from flowdit.data.loader import Batch, DataFolder, Source, open_split
from flowdit.data.manifest import MAX_BUCKETS, Bucket, Manifest
from flowdit.data.record_files import BadRecords
from flowdit.data.schedule import Rows
from flowdit.fields import FieldError, require


class Part(NamedTuple):
    """One data set of a run: its settings, and its manifest."""

    folder: DataFolder
    manifest: Manifest


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The records of a split: a source for each bucket of each data set, None where there are no records.

    `sources` has a row for each data set and a column for each bucket, `shapes` the buckets' latent shapes. Records are
    also numbered through, one bucket after the other, and within a bucket one data set after the other.
    """

    sources: tuple[tuple[Source | None, ...], ...]
    shapes: tuple[tuple[int, int, int] | None, ...] = (None,)
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, data: Source | Mixture) -> Mixture:
        """A single source as a mixture."""
        return data if isinstance(data, Mixture) else cls(((data,),))

    @functools.cached_property
    def counts(self) -> list[list[int]]:
        """The records of each bucket of each data set."""
        return [[0 if source is None else len(source) for source in row] for row in self.sources]

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The records up to the end of each bucket of each data set, one bucket after the other."""
        return list(itertools.accumulate(count for column in zip(*self.counts, strict=True) for count in column))

    def __len__(self) -> int:
        return self._ends[-1]

    def find(self, index: int) -> tuple[int, int, int]:
        """Bucket, data set, and number within them of a record that is numbered through."""
        cell = bisect.bisect_right(self._ends, index)
        return *divmod(cell, len(self.sources)), index - (self._ends[cell - 1] if cell else 0)

    def rows_of(self, indices: Iterable[int]) -> list[tuple[Rows, list[int]]]:
        """Records that are numbered through, and their places in `indices`, by bucket."""
        found: dict[int, tuple[Rows, list[int]]] = {}
        for place, index in enumerate(indices):
            bucket, data_set, record = self.find(index)
            rows, places = found.setdefault(bucket, (Rows(bucket, [], []), []))
            rows.data_sets.append(data_set)
            rows.records.append(record)
            places.append(place)
        return list(found.values())

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read, decode and check records that are numbered through. Raises `RecordError` like `Source.read`."""
        return [self.source(bucket, data_set).read([i])[0] for bucket, data_set, i in map(self.find, indices)]

    def read_batch(self, rows: Rows, draws: Float64[np.ndarray, " n"]) -> Batch:
        """The records of rows of a bucket stacked, as by `Source.read_batch`."""
        batch: Batch = {}
        for source, places, records in self._by_source(rows):
            part = source.read_batch(records, draws[places])
            if len(places) == len(rows.records):
                return part
            for name, values in part.items():
                whole = batch.setdefault(name, np.empty((len(rows.records), *values.shape[1:]), values.dtype))
                whole[places] = values
        return batch

    def places(self, rows: Rows, draws: Float64[np.ndarray, " n"]) -> list[tuple[os.PathLike[str], int]]:
        """File, and number within it, of the records that `read_batch` returns."""
        found: dict[int, tuple[os.PathLike[str], int]] = {}
        for source, places, records in self._by_source(rows):
            found |= dict(zip(places, source.places(records, draws[places]), strict=True))
        return [found[place] for place in range(len(found))]

    @property
    def data_sets(self) -> dict[int, Source]:
        """A source of each data set that has records, by its number: for what its buckets share."""
        first = (next((source for source in row if source is not None), None) for row in self.sources)
        return {d: source for d, source in enumerate(first) if source is not None}

    @property
    def bad_records(self) -> list[BadRecords]:
        """The bad records of each data set."""
        return [next(source.bad_records for source in row if source is not None) for row in self.sources if any(row)]

    def source(self, bucket: int, data_set: int) -> Source:
        """The records of a bucket of a data set, which has some."""
        source = self.sources[data_set][bucket]
        assert source is not None
        return source

    def _by_source(self, rows: Rows) -> list[tuple[Source, list[int], list[int]]]:
        """The source, places in the batch and records of the rows of each data set."""
        found = []
        for data_set in sorted(set(rows.data_sets)):
            places = [place for place, of in enumerate(rows.data_sets) if of == data_set]
            found.append((self.source(rows.bucket, data_set), places, [rows.records[place] for place in places]))
        return found


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The opened, verified data of a run; `validation` is None without that split."""

    manifest: Manifest
    train: Mixture
    validation: Mixture | None


class Opened(NamedTuple):
    """The folder of the shards of a data set, and the readers of its captions and maps in the split that is opened."""

    folder: epath.PathLike
    text: TextReader | None
    maps: FeatureMaps | None


Opener = Callable[[Part], Opened]


def open_mixture(parts: Sequence[Part], manifest: Manifest, split: str, opener: Opener, **options: Any) -> Mixture:
    """Open a split of all data sets, with `options` of `open_source`. `manifest` is that of the mixture (`mixed`)."""
    shapes = manifest.bucket_shapes
    rows = []
    for part in parts:
        by_shape: dict[Any, Source] = {}
        if part.manifest.num_records(split):
            folder, text, maps = opener(part)
            by_shape = open_split(folder, part.manifest, split, text=text, maps=maps, **options)
        rows.append(tuple(by_shape.get(shape) for shape in shapes))
    return Mixture(tuple(rows), shapes, tuple(part.folder.weight for part in parts))


SAME = ("latent_dtype", "image_size", "has_latent_std")
"""Fields in which the data sets of a mixture must agree, besides the VAE."""


def mixed(parts: Sequence[Part], needed: Sequence[str] = ()) -> Manifest:
    """The manifest of a mixture: the shards of all data sets, and the buckets of any. That of a single data set is its
    own.

    Mean and deviation are those of the weighted records. Raises `FieldError` naming both folders if two data sets
    differ in what the network sees, or in a field in `needed`, such as the classes that are conditioned on.
    """
    first = parts[0].manifest
    for i, part in enumerate(parts[1:]):
        _require_same(f"mix[{i}].path", parts[0], part, needed)
        known = {other.manifest.id: other.folder.path for other in parts[: i + 1]}
        is_new = part.manifest.id not in known
        rule = f"must be another data set than {known.get(part.manifest.id)}, which has the same records"
        require(f"mix[{i}].path", part.folder.path, is_new, rule)
    if len(parts) == 1:
        return first
    manifests = [part.manifest for part in parts]
    shapes = list(dict.fromkeys(shape for manifest in manifests for shape in manifest.bucket_shapes))
    rule = f"must have at most {MAX_BUCKETS} buckets together with data.path"
    require("mix", len(shapes), len(shapes) <= MAX_BUCKETS, rule)
    is_bucketed = len(shapes) > 1 or any(manifest.buckets for manifest in manifests)
    stride = first.vae.stride
    shards = []
    for i, manifest in enumerate(manifests):
        for shard in manifest.shards:
            counts = dict(zip(manifest.bucket_shapes, shard.buckets or [shard.records], strict=True))
            buckets = tuple(counts.get(shape, 0) for shape in shapes) if is_bucketed else ()
            shards.append(dataclasses.replace(shard, file=f"{i}.{shard.file}", buckets=buckets))
    weights = np.array([part.folder.weight for part in parts]) / sum(part.folder.weight for part in parts)
    means, deviations = (
        np.array([getattr(manifest, name) for manifest in manifests]) for name in ("channel_mean", "channel_std")
    )
    mean = weights @ means
    variance = weights @ (deviations**2 + means**2) - mean**2
    return dataclasses.replace(
        first,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(np.sqrt(np.maximum(variance, 0)).tolist()),
        class_names=first.class_names if len({manifest.class_names for manifest in manifests}) == 1 else (),
        has_captions=all(manifest.has_captions for manifest in manifests),
        buckets=tuple(Bucket(height * stride, width * stride) for _, height, width in shapes) if is_bucketed else (),
        shards=tuple(shards),
        validation_parts=(),
        license="; ".join(dict.fromkeys(manifest.license for manifest in manifests)),
        attribution="; ".join(dict.fromkeys(manifest.attribution for manifest in manifests)),
    )


def _require_same(field: str, one: Part, other: Part, needed: Sequence[str]) -> None:
    def differ(name: str, ours: Any, theirs: Any) -> FieldError:
        where = f"must have {name} {ours} as {one.folder.path} has, {other.folder.path} has {theirs}"
        return FieldError(field, where)

    ours, theirs = one.manifest, other.manifest
    for name in ("fingerprint", "shift", "scale", "stride"):
        if (a := getattr(ours.vae, name)) != (b := getattr(theirs.vae, name)):
            raise differ(f"the VAE's {name}", a, b)
    if (a := ours.latent_shape[0]) != (b := theirs.latent_shape[0]):
        raise differ("channels of latents:", a, b)
    for name in (*SAME, *needed):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            shown = [len(value) if isinstance(value, tuple) else value for value in (a, b)]
            label = "the same class names:" if name == "class_names" else name
            raise differ(label, *shown)
