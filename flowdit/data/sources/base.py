"""What `prepare` reads images from: a source, divided into units that are read on their own."""

import types
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from flowdit.data.manifest import Split
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing

Value = str | int | float | bool | None
"""A value of a column that is kept with a record."""
NO_COLUMNS: Mapping[str, Value] = types.MappingProxyType({})
MAX_FILE_BYTES = 2**28
"""Larger files are no images for a model: they are left out, and never read."""


class Row(NamedTuple):
    """An image with what is known about it. `key` is its name within the source, and unique there.

    `image` has the bytes of a file, or pixels. `captions` are a short and a long one, either of which may be empty.
    """

    key: str
    image: bytes | UInt8[np.ndarray, "height width 3"]
    label: str | None = None
    captions: tuple[str, str] | None = None
    columns: Mapping[str, Value] = NO_COLUMNS


class Unit(NamedTuple):
    """A part of a source that is read on its own and becomes one shard of each split.

    `split` is None if the rows belong to both, by `is_held_out`. `part` is for the source that made the unit. A unit can
    be pickled.
    """

    name: str
    split: Split | None
    part: Any

    def file(self, split: Split) -> str:
        """The name of its shard of `split`: `train-00012-of-01000.array_record`."""
        return f"{split}-{self.name}.array_record"


@runtime_checkable
class Source(Protocol):
    """Images in a fixed order. A source can be pickled.

    `class_names` are the classes in the order of their numbers, () without labels, and None if they are the sorted
    labels of all rows. `key` identifies the contents: a source with another one is refused by a run that goes on.
    `listing` names its files, so that an error can say which ones changed.
    """

    name: str
    class_names: tuple[str, ...] | None
    has_captions: bool
    license: str
    attribution: str
    key: str
    listing: Listing | None

    def units(self) -> Sequence[Unit]:
        """The units, in a fixed order."""
        ...

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        """The rows of a unit with their numbers, in ascending order; only those numbered in `rows`, if given.

        Memory is bounded by a few rows. Raises `ValueError` with one line for a file that cannot be read.
        """
        ...


def is_held_out(key: str, fraction: float) -> bool:
    """Whether an image belongs to the validation split. It depends on its name only, and not on other images."""
    return zlib.crc32(key.encode(errors="surrogateescape")) < fraction * 2**32


def in_class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels, sorted: whole numbers by value if there is nothing else, and text by its letters."""
    names = sorted(set(labels))
    are_numbers = all(name.isascii() and name.isdigit() and len(name) < 20 for name in names)
    return tuple(sorted(names, key=int)) if are_numbers else tuple(names)
