"""Which columns of a source a row is made of, and the row that they make."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowdit.data.records import RecordError
from flowdit.data.rejected import Rejected
from flowdit.data.schema import CaptionField
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Value
from flowdit.data.sources.config import SourceConfig
from flowdit.fields import FieldError, listed, shown

LABELS = ("label", "cls")
CAPTIONS = ("short_caption", "caption", "text", "txt")
LONG_CAPTIONS = ("long_caption",)
MAX_TEXT_BYTES = 2**20
"""A longer caption, or file of captions for an image, is refused."""


@dataclass(frozen=True)
class Columns:
    """The columns of a source by their names; "" for one that it does not have.

    `numbers` are those that filters compare: a text that is a number becomes one.
    """

    label: str = ""
    caption: str = ""
    long_caption: str = ""
    key: str = ""
    kept: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()

    @classmethod
    def choose(cls, config: SourceConfig, numbers: Collection[str], there: Collection[str], where: str) -> "Columns":
        """Those of the settings, or those that have a usual name, out of the columns that are `there`.

        Raises `FieldError` that lists the columns for one that is missing; `where` is the file.
        """
        chosen = cls(
            label=choice("label_column", config.label_column, LABELS, there, where),
            caption=choice("caption_column", config.caption_column, CAPTIONS, there, where),
            long_caption=choice("long_caption_column", config.long_caption_column, LONG_CAPTIONS, there, where),
            key=choice("key_column", config.key_column, (), there, where),
            kept=tuple(choice("keep_columns", name, (), there, where) for name in config.keep_columns),
            numbers=tuple(choice("filter.min_columns", name, (), there, where) for name in numbers),
        )
        if chosen.long_caption and not chosen.caption:
            return dataclasses.replace(chosen, caption=chosen.long_caption, long_caption="")
        return chosen

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        names = (self.label, self.caption, self.long_caption, self.key, *self.kept, *self.numbers)
        return tuple(dict.fromkeys(filter(None, names)))

    def row(self, key: str, image: bytes | None, values: Mapping[str, Any]) -> Row | Rejected:
        """A row of the values of its columns, in which missing ones count as None.

        A row without an image or with a label or caption that is none is rejected.
        """
        try:
            key = self.key_of(key, values)
            if image is None:
                raise RecordError("has no image")
            if len(image) > MAX_FILE_BYTES:
                raise RecordError(too_large(len(image)))
            captions = None
            if self.caption:
                captions = (_caption(self.caption, values), _caption(self.long_caption, values))
            label = _label(self.label, values.get(self.label)) if self.label else None
            columns = {name: _value(values.get(name)) for name in self.kept}
            columns |= {name: _number(_value(values.get(name))) for name in self.numbers}
        except RecordError as problem:
            return Rejected(key, str(problem))
        return Row(key, image, label, captions, columns)

    def key_of(self, key: str, values: Mapping[str, Any]) -> str:
        """The value of the key's column, or else `key`. Raises `RecordError` if it is empty or no text or number."""
        if not self.key:
            return key
        value = values.get(self.key)
        if not isinstance(value, str | int) or isinstance(value, bool) or not str(value):
            raise RecordError(f"{self.key}: must be the name of an image, got {shown(value)}")
        if not is_key(str(value)):
            rule = f"must have up to {MAX_KEY} letters without control characters"
            raise RecordError(f"{self.key}: {rule}, got {shown(value)}")
        return str(value)


MAX_KEY = 1000


def is_key(text: str) -> bool:
    """Whether a text of a source may be a key: it is stored, and shown in messages."""
    return len(text) <= MAX_KEY and text.isprintable()


def choice(setting: str, name: str, usual: Sequence[str], there: Collection[str], where: str) -> str:
    """The column `name`, or the first usual one that is `there`, or "". Raises `FieldError` for a missing one."""
    if name and name not in there:
        raise FieldError(
            setting, f"must be a column of {where}, which has {listed(list(there), 20)}, got {shown(name)}"
        )
    return name or next((usual_name for usual_name in usual if usual_name in there), "")


def too_large(size: int) -> str:
    """The reason for which a file is left out."""
    return f"has {size} bytes, more than {MAX_FILE_BYTES}"


def _caption(column: str, values: Mapping[str, Any]) -> str:
    value = values.get(column) if column else None
    if value is None:
        return ""
    try:
        CaptionField().check(value)
        if len(value) > MAX_TEXT_BYTES:
            raise RecordError(f"must have up to {MAX_TEXT_BYTES} letters, got {len(value)}")
    except RecordError as problem:
        raise RecordError(f"{column}: {problem}") from None
    return str(value)


def _label(column: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_label = isinstance(value, str | int) and 0 < len(str(value).strip()) <= 1000
    if not is_label or not str(value).isprintable():
        raise RecordError(f"{column}: must be a label, text or a whole number, got {shown(value)}")
    return str(value).strip()


def _value(value: Any) -> Value:
    """A value as it is kept: lists and the like as JSON."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()[:MAX_TEXT_BYTES]
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    try:
        return json.dumps(value, default=str, ensure_ascii=False)[:MAX_TEXT_BYTES]
    except (ValueError, RecursionError):
        return shown(value)


def _number(value: Value) -> Value:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return value if isinstance(number, float) and not math.isfinite(number) else number
