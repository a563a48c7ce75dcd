"""The rules that the fields of a record obey, and how values of many records become a batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flowdit.data.records import RecordError


@runtime_checkable
class Field(Protocol):
    """The rules of one field. Both checks raise `RecordError` with rule and value."""

    def check(self, value: Any) -> None:
        """Check type, shape and range of one record's value."""
        ...

    def stack(self, values: Sequence[Any]) -> np.ndarray:
        """Stack values that passed `check` to a batch."""
        ...

    def check_numbers(self, array: Any) -> None:
        """Checks that are cheap on a whole batch but expensive per record; `array` is one value or a batch."""
        ...


_FLOATS = {np.dtype(order + code): name for code, name in (("f2", "float16"), ("f4", "float32")) for order in "<>"}
"""Names by dtype, of either byte order; faster than `dtype.name`."""


@dataclass(frozen=True)
class ArrayField:
    """A float16 or float32 array of fixed shape, with finite values of at least `minimum`; batches are float32.

    If `dtype` is given, from the manifest of a data set, the array must have it.
    """

    shape: tuple[int, ...]
    minimum: float = -np.inf
    dtype: str | None = None

    def check(self, value: Any) -> None:
        dtype = _FLOATS.get(value.dtype) if isinstance(value, np.ndarray) else None
        if dtype is None:
            raise RecordError(f"must be a float16 or float32 array, got {_kind(value)}")
        if dtype != (self.dtype or dtype):
            raise RecordError(f"must be a {self.dtype} array as in latent_dtype of the manifest, got {_kind(value)}")
        if value.shape != self.shape:
            raise RecordError(f"must have shape {self.shape}, got {value.shape}")

    def stack(self, values: Sequence[np.ndarray]) -> np.ndarray:
        batch = np.empty((len(values), *self.shape), np.float32)
        for row, value in enumerate(values):
            batch[row] = value
        return batch

    def check_numbers(self, array: Any) -> None:
        _check_finite(array)
        if self.minimum > -np.inf and array.min() < self.minimum:
            raise RecordError(f"must be at least {self.minimum:g}, got {array.min():g}")


@dataclass(frozen=True)
class LabelField:
    """A class number; batches are int32."""

    num_classes: int

    def check(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise RecordError(f"must be an integer, got {_kind(value)}")
        if not 0 <= value < self.num_classes:
            raise RecordError(f"must be in [0, {self.num_classes}), got {value}")

    def stack(self, values: Sequence[Any]) -> np.ndarray:
        return np.array(values, np.int32)

    def check_numbers(self, array: Any) -> None:
        """Nothing is left to check."""


@dataclass(frozen=True)
class ChoiceField:
    """One of some texts; batches are int32, its number among them."""

    choices: tuple[str, ...]

    def check(self, value: Any) -> None:
        if not isinstance(value, str) or value not in self.choices:
            raise RecordError(f"must be one of {', '.join(self.choices)[:200]}, got {str(value)[:40]!r}")

    def stack(self, values: Sequence[Any]) -> np.ndarray:
        return np.array([self.choices.index(value) for value in values], np.int32)

    def check_numbers(self, array: Any) -> None:
        """Nothing is left to check."""


class CaptionField:
    """A string, possibly empty; batches are arrays of `str` objects."""

    def check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise RecordError(f"must be a string, got {_kind(value)}")
        if not value.isascii() and not _is_unicode(value):
            raise RecordError(f"must be valid Unicode, got {value[:100]!r}")

    def stack(self, values: Sequence[str]) -> np.ndarray:
        return np.array(values, object)

    def check_numbers(self, array: Any) -> None:
        """A caption has no numbers."""


@dataclass(frozen=True)
class SizeField:
    """Height and width of an image in pixels: two integers above 0, or one of a square; batches are int32 (n, 2).

    A record without the field has the size `default`.
    """

    default: tuple[int, int]

    def check(self, value: Any) -> None:
        if not all(isinstance(side, int | np.integer) and not isinstance(side, bool) for side in _sides(value)):
            raise RecordError(f"must be one or two integers, got {_kind(value)}")
        if len(_sides(value)) != 2 or not all(0 < side <= MAX_IMAGE_SIDE for side in _sides(value)):
            raise RecordError(f"must be one or two sides in [1, {MAX_IMAGE_SIDE}] pixels, got {str(value)[:40]}")

    def stack(self, values: Sequence[Any]) -> np.ndarray:
        return np.array([_sides(value) for value in values], np.int32).reshape(-1, 2)

    def check_numbers(self, array: Any) -> None:
        """Nothing is left to check."""


@dataclass(frozen=True)
class FeatureMapField:
    """A map of a feature cache, (rows, columns, width), float16 with finite values; batches are float16.

    It is not in the records of a data set but in those of the cache, whose `shape` is known once that is opened.
    """

    shape: tuple[int, int, int] | None = None

    def check(self, value: Any) -> None:
        if not isinstance(value, np.ndarray) or _FLOATS.get(value.dtype) != "float16":
            raise RecordError(f"must be a float16 array, got {_kind(value)}")
        if value.shape != self.shape:
            raise RecordError(f"must have shape {self.shape}, got {value.shape}")

    def stack(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(values, np.float16).reshape(-1, *(self.shape or ()))

    def check_numbers(self, array: Any) -> None:
        _check_finite(array)


def _check_finite(array: Any) -> None:
    if not np.isfinite(array).all():
        raise RecordError(f"must be finite, got {int(np.sum(~np.isfinite(array)))} NaN or infinite values")


MAX_IMAGE_SIDE = 2**20


def _sides(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.ravel()[:3].tolist() if value.dtype.kind in "iu" and value.ndim == 1 else [None]
    return list(value[:3]) if isinstance(value, list | tuple) else [value, value]


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded: a pickle can hold lone surrogates, on which tokenizers fail."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


LATENTS = ("latent", "latent_std")
"""The fields whose dtype is in the manifest of a data set."""


@dataclass(frozen=True)
class Schema:
    """What every record of a data set must hold. Fields that it does not name are ignored.

    A field that has a `default` may be missing.
    """

    fields: Mapping[str, Field]

    def of_dtype(self, dtype: str) -> "Schema":
        """The same schema, with latents restricted to `dtype`."""
        return self._with_latents(dtype=dtype)

    def of_shape(self, shape: tuple[int, int, int]) -> "Schema":
        """The same schema, for latents of this shape."""
        return self._with_latents(shape=shape)

    def _with_latents(self, **values: Any) -> "Schema":
        latents = {name: f for name, f in self.fields.items() if name in LATENTS and isinstance(f, ArrayField)}
        return Schema({**self.fields, **{name: replace(f, **values) for name, f in latents.items()}})

    @property
    def of_records(self) -> "Schema":
        """The same schema without what is not in the records."""
        fields = {name: f for name, f in self.fields.items() if not isinstance(f, FeatureMapField)}
        return Schema(fields)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise `RecordError("field: rule, value")` for the first field that is missing or breaks a rule."""
        for name, field in self.fields.items():
            if name not in record and hasattr(field, "default"):
                continue
            if name not in record:
                raise RecordError(f"{name}: is missing, the record has {str(sorted(record))[:200]}")
            _named(name, field.check, record[name])

    def stack(self, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Stack records that passed `check` to a batch."""
        return {name: field.stack(_column(records, name, field)) for name, field in self.fields.items()}

    def check_numbers(self, record_or_batch: Mapping[str, Any]) -> None:
        """Raise `RecordError` for NaN, infinities and values out of range, in one record or in a batch."""
        for name, field in self.fields.items():
            if name in record_or_batch:
                _named(name, field.check_numbers, record_or_batch[name])


def _column(records: Sequence[Mapping[str, Any]], name: str, field: Field) -> list[Any]:
    default = getattr(field, "default", None)
    return (
        [record[name] for record in records] if default is None else [record.get(name, default) for record in records]
    )


def _named(name: str, check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from None


CAPTION_FIELDS: Mapping[str, Field] = {"short_caption": CaptionField(), "long_caption": CaptionField()}
"""The fields of a text-conditional record; one or both may be empty."""


def record_schema(
    latent_shape: tuple[int, int, int], fields: Mapping[str, Field], has_latent_std: bool = False
) -> Schema:
    """The schema of `latent` (channels, height, width), optionally `latent_std`, and `fields`."""
    std: dict[str, Field] = {"latent_std": ArrayField(tuple(latent_shape), minimum=0.0)} if has_latent_std else {}
    return Schema({"latent": ArrayField(tuple(latent_shape)), **fields, **std})
