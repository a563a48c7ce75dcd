"""Which images of a source are used: filters by what the first pass finds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from flowdit.data.preparation.scan import UnitScan
from flowdit.fields import is_finite_number, require


@dataclass
class FilterConfig:
    """Which images are used. An image that a filter leaves out is not an unreadable one.

    Attributes:
        min_side: pixels that the shorter side must have.
        max_aspect: largest ratio of the longer to the shorter side; null: any.
        min_caption_length: characters that the longest caption of an image must have.
        max_caption_length: characters that it may have; null: any number.
        min_columns: smallest value of columns with numbers, such as `{aesthetic:5}`; an image without one is left out.
            null: none.
        duplicates: keep only the first of several images whose files have the same bytes.
    """

    min_side: int = 1
    max_aspect: float | None = None
    min_caption_length: int = 0
    max_caption_length: int | None = None
    min_columns: Any = None  # not a dict, whose keys Hydra would have to know
    duplicates: bool = False

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require("min_side", self.min_side, self.min_side >= 1, "must be at least 1")
        aspect, longest = self.max_aspect, self.max_caption_length
        require("max_aspect", aspect, aspect is None or aspect >= 1, "must be at least 1")
        require("min_caption_length", self.min_caption_length, self.min_caption_length >= 0, "must be at least 0")
        limits = self.min_columns
        are_limits = isinstance(limits or {}, Mapping) and all(
            is_finite_number(value) for value in (limits or {}).values()
        )
        require("min_columns", limits, are_limits, "must be null or numbers by column, such as {aesthetic:5}")
        rule = f"must be at least min_caption_length={self.min_caption_length}"
        require("max_caption_length", longest, longest is None or longest >= self.min_caption_length, rule)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are compared."""
        return tuple(sorted(self.min_columns or {}))

    def keep(self, scan: UnitScan, left_out: dict[str, int]) -> Bool[np.ndarray, " n"]:
        """Which rows are used, before duplicates; the others are counted by the name of the filter."""
        kept = np.ones(len(scan.rows), bool)
        for name, passed in self._passed(scan):
            left_out[name] = left_out.get(name, 0) + int((kept & ~passed).sum())
            kept &= passed
        return kept

    def _passed(self, scan: UnitScan) -> Iterator[tuple[str, Bool[np.ndarray, " n"]]]:
        yield "min_side", scan.sizes.min(1, initial=2**31 - 1) >= self.min_side
        if self.max_aspect is not None:
            yield "max_aspect", scan.sizes.max(1, initial=0) <= self.max_aspect * scan.sizes.min(1, initial=2**31 - 1)
        yield "min_caption_length", scan.lengths >= self.min_caption_length
        if self.max_caption_length is not None:
            yield "max_caption_length", scan.lengths <= self.max_caption_length
        for i, name in enumerate(self.columns):
            yield f"min_columns.{name}", scan.columns[:, i] >= self.min_columns[name]  # not of NaN
