"""The first pass over a source: what has to be known of all images before one is encoded.

Each unit becomes a file of arrays, `scan/<unit>.npz`, written whole, so that a later run goes on. Only headers of images
are decoded. A million images take about 70 MB.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from flowdit.data.images import ImageError, image_size
from flowdit.data.manifest import PART_RULE, Split, check_part
from flowdit.data.origin import HELD_OUT
from flowdit.data.preparation.threads import read_ahead
from flowdit.data.rejected import Rejected
from flowdit.data.sources.base import Row, Source, Unit, is_held_out
from flowdit.fields import FieldError, shown

FOLDER = "scan"
AHEAD = 32
"""Images that are read ahead."""
HASH_BYTES = 16


def content_hash(row: Row) -> bytes:
    """16 bytes that identify the image: BLAKE2b of the bytes of its file, or of its pixels."""
    data = row.image if isinstance(row.image, bytes) else row.image.tobytes()
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def weight(numbered: tuple[int, Row | Rejected]) -> int:
    """The bytes of the image of a numbered row."""
    _, row = numbered
    return len(row.image) if isinstance(row, Row) and isinstance(row.image, bytes) else 0


def key_hash(row: Row) -> bytes:
    """16 bytes that identify the key."""
    return hashlib.blake2b(row.key.encode(errors="surrogateescape"), digest_size=HASH_BYTES).digest()


def shown_key(key: str) -> str:
    """A key as it is stored and printed: bytes of a name that are not UTF-8 are escaped."""
    return key.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class UnitScan:
    """What is known of the rows of a unit whose images may be readable, in their order; and the other rows.

    `labels` are numbers of `label_names`, -1 without; `lengths` is the number of characters of the longest caption;
    `columns` has the values that filters compare, NaN for what is no number. `parts` are those of the validation split
    by name, if the source keeps the column `HELD_OUT`.
    """

    rows: Int[np.ndarray, " n"]
    keys: UInt64[np.ndarray, "n 2"]
    contents: UInt64[np.ndarray, "n 2"]
    sizes: Int[np.ndarray, "n 2"]
    lengths: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    columns: Float[np.ndarray, "n columns"]
    held_out: Bool[np.ndarray, " n"]
    label_names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    rejected: tuple[tuple[int, Rejected], ...] = ()

    @property
    def num_rows(self) -> int:
        """All rows, those that are rejected among them."""
        return len(self.rows) + len(self.rejected)

    def until(self, count: int) -> "UnitScan":
        """The scan of the first `count` rows, those that are rejected among them."""
        numbers = sorted([*self.rows.tolist(), *(number for number, _ in self.rejected)])
        if len(numbers) <= count:
            return self
        end = numbers[count]
        arrays = {name: getattr(self, name)[self.rows < end] for name in ARRAYS}
        rejected = tuple(entry for entry in self.rejected if entry[0] < end)
        return dataclasses.replace(self, **arrays, rejected=rejected)


ARRAYS = ("rows", "keys", "contents", "sizes", "lengths", "labels", "columns", "held_out")


def scan_file(folder: Path, unit: Unit) -> Path:
    return folder / FOLDER / f"{unit.split or 'both'}-{unit.name}.npz"


def read_scan(folder: Path, unit: Unit, identity: str) -> UnitScan | None:
    """The scan of a unit, or None if there is none of this `identity`."""
    path = scan_file(folder, unit)
    try:
        with np.load(path, allow_pickle=False) as stored:
            notes = json.loads(stored["notes"].tobytes())
            if notes["identity"] != identity:
                return None
            rejected = tuple((number, Rejected(file, reason)) for number, file, reason in notes["rejected"])
            arrays = {name: stored[name] for name in ARRAYS}
            labels, parts = tuple(notes["labels"]), tuple(notes["parts"])
            return UnitScan(**arrays, label_names=labels, parts=parts, rejected=rejected)
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # none, or half of one
        return None


class Scanner(NamedTuple):
    """Makes the function that scans a unit and writes its file, unless it is there.

    `columns` are those that filters compare. `limits` are the rows that are read at most of all units that are training
    images, validation images, or both.
    """

    source: Source
    folder: Path
    identity: str
    columns: tuple[str, ...]
    held_out_fraction: float
    max_pixels: int
    limits: Mapping[Split | None, int]

    def __call__(self) -> Callable[[tuple[int, Unit]], tuple[int, int]]:
        """The function of a numbered unit. It returns the number, and how many rows the unit has."""
        return self._scan

    def _scan(self, numbered: tuple[int, Unit]) -> tuple[int, int]:
        number, unit = numbered
        if (known := read_scan(self.folder, unit, self.identity)) is not None:
            return number, known.num_rows
        rows = itertools.islice(self.source.read(unit), self.limits.get(unit.split))
        found = list(read_ahead(functools.partial(self._look, unit), rows, AHEAD, weight))
        entries = [entry for entry in found if isinstance(entry, _Entry)]
        rejected = [entry for entry in found if not isinstance(entry, _Entry)]
        names = {label: None for entry in entries if (label := entry.label) is not None}
        numbers = {label: i for i, label in enumerate(names)} | {None: -1}
        arrays = {
            "rows": np.array([entry.row for entry in entries], np.int64),
            "keys": np.frombuffer(b"".join(entry.key for entry in entries), np.uint64).reshape(-1, 2),
            "contents": np.frombuffer(b"".join(entry.content for entry in entries), np.uint64).reshape(-1, 2),
            "sizes": np.array([entry.size for entry in entries], np.int32).reshape(-1, 2),
            "lengths": np.array([entry.length for entry in entries], np.int32),
            "labels": np.array([numbers[entry.label] for entry in entries], np.int32),
            "columns": np.array([entry.columns for entry in entries], np.float64).reshape(
                len(entries), len(self.columns)
            ),
            "held_out": np.array([entry.held_out for entry in entries], bool),
        }
        notes = {
            "identity": self.identity,
            "labels": list(names),
            "parts": sorted({entry.part for entry in entries if entry.part}),
            "rejected": [(row, image.file, image.reason) for row, image in rejected],
        }
        notes_array = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        write_arrays(scan_file(self.folder, unit), notes=notes_array, **arrays)
        return number, len(found)

    def _look(self, unit: Unit, numbered: tuple[int, Row | Rejected]) -> "_Entry | tuple[int, Rejected]":
        """Raises `ValueError` for an image of the validation split without the name of a part, if there are parts."""
        number, row = numbered
        if isinstance(row, Rejected):
            return number, row
        try:
            size = image_size(row.image, self.max_pixels)
        except ImageError as error:
            return number, Rejected(shown_key(row.key), str(error))
        held_out = is_held_out(row.key, self.held_out_fraction) if unit.split is None else unit.split == "validation"
        has_part = held_out and HELD_OUT in getattr(self.source, "kept_columns", ())
        return _Entry(
            row=number,
            key=key_hash(row),
            content=content_hash(row),
            size=size,
            length=max(map(len, row.captions or ("",))),
            label=row.label,
            columns=[_number(row.columns.get(name)) for name in self.columns],
            held_out=held_out,
            part=_part(row) if has_part else "",
        )


class _Entry(NamedTuple):
    row: int
    key: bytes
    content: bytes
    size: tuple[int, int]
    length: int
    label: str | None
    columns: list[float]
    held_out: bool
    part: str


def _part(row: Row) -> str:
    name = row.columns.get(HELD_OUT)
    try:
        check_part(name)
    except FieldError:
        reason = f"{HELD_OUT} of {shown_key(row.key)} {PART_RULE}, got {shown(name)}"
        raise ValueError(f"source: {reason}") from None
    return str(name)


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name to `path`, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_scans(
    folder: Path, units: Sequence[Unit], identity: str, limits: Mapping[Split | None, int]
) -> Iterator[UnitScan]:
    """The scans of units in order, one in memory at a time, of each kind up to `limits` rows."""
    left = dict(limits)
    for unit in units:
        scan = read_scan(folder, unit, identity)
        if scan is None:
            raise ValueError(f"out: {folder} was claimed by another run: give another folder")
        if unit.split in left:
            scan = scan.until(left[unit.split])
            left[unit.split] -= scan.num_rows
        yield scan
