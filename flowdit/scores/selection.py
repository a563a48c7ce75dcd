"""Which images of a reference are used: those with given values of kept columns, as in `where={style: noto}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flowdit.config import as_list
from flowdit.fields import FieldError, listed

MAX_NAMED = 20
"""Columns that an error lists."""


class Where:
    """A choice of images by their columns: `given` has a value for each, or a list of values; None: all images.

    Values are compared as they are written: 5 is also the text "5".
    """

    def __init__(self, given: Mapping[str, Any] | None = None):
        self.values = {
            name: sorted({str(one) for one in as_list(value) or []}) for name, value in (given or {}).items()
        }
        self._seen: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.values)

    def __str__(self) -> str:
        """' where {"style": ["noto"]}'; empty if all images are chosen. Part of the identity of a reference."""
        return f" where {json.dumps(self.values, sort_keys=True, ensure_ascii=False)}" if self else ""

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether an image with these columns is chosen."""
        self._seen.update(columns)
        return all(name in columns and str(columns[name]) in values for name, values in self.values.items())

    def check_found(self, count: int, reference: str) -> None:
        """Raise `FieldError` if `count`, the chosen images, is 0: because of a column that no image has, or of values."""
        if count or not self:
            return
        unknown = [name for name in self.values if name not in self._seen]
        if unknown:
            known = listed(sorted(self._seen), MAX_NAMED) or "none"
            raise FieldError("where", f"must name columns that {reference} keeps ({known}), got {listed(unknown)}")
        raise FieldError("where", f"must choose an image of {reference}, there is none{self}")
