"""Between the passes: which images are used, their classes, and the bucket of each.

Scans are read one at a time and hashes are compared in parts, so that memory grows by one byte for an image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from flowdit.data.manifest import MAX_PARTS, Bucket, Split
from flowdit.data.origin import HELD_OUT
from flowdit.data.preparation.buckets import merged, nearest
from flowdit.data.preparation.duplicates import HashTable, Repeats
from flowdit.data.preparation.filters import FilterConfig
from flowdit.data.preparation.scan import FOLDER, UnitScan, read_scans, scan_file, shown_key, write_arrays
from flowdit.data.rejected import Rejected
from flowdit.data.sources.base import Row, Source, Unit, in_class_order
from flowdit.fields import shown

MAX_CLASSES = 2**16


@dataclass(frozen=True)
class Scans:
    """The finished first pass: the files of `units` in `folder`, of which the first rows count, up to `limits`."""

    source: Source
    units: Sequence[Unit]
    folder: Path
    identity: str
    limits: Mapping[Split | None, int]

    def __iter__(self) -> Iterator[UnitScan]:
        return read_scans(self.folder, self.units, self.identity, self.limits)


class Selection(NamedTuple):
    """The images that are used.

    `num_images` are all, and `left_out` those left out by each filter. `counts` are the images of each unit that are
    used, `num_train` those of them in the training split. `bucket_of` has for the buckets in the units' files their
    numbers in `buckets`.
    """

    class_names: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    bucket_of: tuple[int, ...]
    counts: list[int]
    num_train: int
    num_images: int
    left_out: dict[str, int]
    rejected: list[Rejected]

    def check(self, held_out_fraction: float) -> None:
        """Raise `ValueError` if filters or the fraction leave no image to train on."""
        if self.left_out and not sum(self.counts):
            raise ValueError(f"filter: no image is left of {self.num_images}: {self.left_out_by_filters}")
        if sum(self.counts) and not self.num_train:
            raise ValueError(f"held_out_fraction: {held_out_fraction} leaves no image to train on")

    @property
    def left_out_by_filters(self) -> str:
        """The images that each filter left out: "12 by min_side, 3 by duplicates"."""
        return ", ".join(f"{count} by {name}" for name, count in self.left_out.items())


class Chosen(NamedTuple):
    """The rows of a unit that are used, in ascending order, and the bucket and content hash of each."""

    rows: Int[np.ndarray, " n"]
    buckets: Int[np.ndarray, " n"]
    contents: UInt64[np.ndarray, "n 2"]


def chosen_file(folder: Path, unit: Unit) -> Path:
    return scan_file(folder, unit).with_suffix(".chosen.npz")


def read_chosen(folder: Path, unit: Unit) -> Chosen:
    with np.load(chosen_file(folder, unit), allow_pickle=False) as stored:
        return Chosen(stored["rows"], stored["buckets"], stored["contents"])


def select(scans: Scans, filters: FilterConfig, buckets: Sequence[Bucket], min_bucket_records: int) -> Selection:
    """Choose the images, and write a file for each unit.

    Raises `ValueError` with one line for two images with one key, images without a label among others with one, too
    many classes or parts of the validation split, and a column to compare that no image has.
    """
    survey = _survey(scans, filters)
    if filters.duplicates:
        survey.left_out["duplicates"] = int(survey.kept.sum())
        for repeats in _repeats(scans, survey.kept, "contents"):
            survey.kept[repeats.positions] = False
        survey.left_out["duplicates"] -= int(survey.kept.sum())
    counts, train_images = _write_chosen(scans, survey.kept, buckets)
    into = merged(buckets, train_images, min_bucket_records)
    used = sorted({int(into[i]) for i, images in enumerate(train_images) if images}) if buckets else []
    bucket_of = tuple(used.index(i) if i in used else 0 for i in into.tolist())
    final = tuple(buckets[i] for i in used)
    return Selection(
        class_names=survey.class_names,
        buckets=final,
        bucket_of=bucket_of,
        counts=counts,
        num_train=sum(train_images),
        num_images=survey.num_images,
        left_out={name: count for name, count in survey.left_out.items() if count},
        rejected=survey.rejected,
    )


class _Survey(NamedTuple):
    kept: Bool[np.ndarray, " rows"]
    class_names: tuple[str, ...]
    num_images: int
    left_out: dict[str, int]
    rejected: list[Rejected]


def _survey(scans: Scans, filters: FilterConfig) -> _Survey:
    kept: list[np.ndarray] = [np.zeros(0, bool)]
    left_out: dict[str, int] = {}
    labels: set[str] = set()
    parts: set[str] = set()
    rejected: list[Rejected] = []
    unlabelled: tuple[Unit, int] | None = None
    has_values = np.zeros(len(filters.columns), bool)
    for unit, scan in zip(scans.units, scans, strict=True):
        kept.append(filters.keep(scan, left_out))
        rejected += (image for _, image in scan.rejected)
        used = scan.labels[kept[-1]]
        labels.update(scan.label_names[number] for number in np.unique(used[used >= 0]).tolist())
        has_values |= np.isfinite(scan.columns).any(0)
        if unlabelled is None and (used < 0).any():
            unlabelled = unit, int(scan.rows[kept[-1]][np.argmax(used < 0)])
        if len(labels) > MAX_CLASSES:
            raise ValueError(f"label_column: must have at most {MAX_CLASSES} different labels, as {shown(min(labels))}")
        parts.update(scan.parts)
        if len(parts) > MAX_PARTS:
            raise ValueError(f"source: must have at most {MAX_PARTS} parts of the validation split ({HELD_OUT})")
    mask = np.concatenate(kept)
    for name, found in zip(filters.columns, has_values, strict=True):
        if not found and len(mask):
            raise ValueError(f"filter.min_columns: no image has a number in column {name!r}")
    class_names = _class_names(scans, labels)
    if class_names and unlabelled is not None:
        raise ValueError(f"source: {_name(scans, *unlabelled)} has no label, as others have")
    _check_keys(scans, len(mask))
    return _Survey(mask, class_names, len(mask) + len(rejected), left_out, rejected)


def _class_names(scans: Scans, labels: set[str]) -> tuple[str, ...]:
    known = scans.source.class_names
    if known is None:
        return in_class_order(labels)
    if known and (others := sorted(labels - set(known))):
        raise ValueError(f"source: an image has the label {shown(others[0])}, which is no class of {scans.source.name}")
    return tuple(known)


def _check_keys(scans: Scans, num_rows: int) -> None:
    for repeats in _repeats(scans, np.ones(num_rows, bool), "keys"):
        if len(repeats.positions):
            i = int(np.argmin(repeats.positions))
            unit, row = _place(scans, int(repeats.firsts[i]))
            other, other_row = _place(scans, int(repeats.positions[i]))
            where = f"image {row} of unit {unit.name} and image {other_row} of unit {other.name}"
            raise ValueError(f"source: images must have different names, {where} are both {_name(scans, unit, row)}")


def _repeats(scans: Scans, kept: Bool[np.ndarray, " rows"], hashes: str) -> Iterator[Repeats]:
    """The kept rows with the hash of an earlier one."""
    folder = scans.folder / FOLDER
    with HashTable(folder, len(kept)) as table:
        start = 0
        for scan in scans:
            rows = np.flatnonzero(kept[start : start + len(scan.rows)])
            table.add(getattr(scan, hashes)[rows], start + rows)
            start += len(scan.rows)
        yield from table.repeats()


def _place(scans: Scans, position: int) -> tuple[Unit, int]:
    """Unit and row of a position among all scanned rows."""
    for unit, scan in zip(scans.units, scans, strict=True):
        if position < len(scan.rows):
            return unit, int(scan.rows[position])
        position -= len(scan.rows)
    raise IndexError(position)


def _name(scans: Scans, unit: Unit, row: int) -> str:
    for _, found in scans.source.read(unit, [row]):
        return repr(shown_key(found.key if isinstance(found, Row) else found.file))
    return f"row {row} of unit {unit.name}"


def _write_chosen(
    scans: Scans, kept: Bool[np.ndarray, " rows"], buckets: Sequence[Bucket]
) -> tuple[list[int], list[int]]:
    """Write the files of the units. The images of each unit, and the training images of each bucket."""
    counts: list[int] = []
    train = np.zeros(max(len(buckets), 1), int)
    start = 0
    for unit, scan in zip(scans.units, scans, strict=True):
        mask = kept[start : start + len(scan.rows)]
        start += len(scan.rows)
        found = nearest(scan.sizes[mask], buckets)
        train += np.bincount(found[~scan.held_out[mask]], minlength=len(train))
        chosen = Chosen(scan.rows[mask], found.astype(np.int16), scan.contents[mask])
        write_arrays(chosen_file(scans.folder, unit), **chosen._asdict())
        counts.append(int(mask.sum()))
    return counts, train.tolist()
