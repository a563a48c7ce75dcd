"""Records: the bytes of one training example, and the rules that its fields obey. The only file that knows the bytes.

A record is a pickled flat dict of numpy arrays and plain Python values. Data files are untrusted, so they are read by an
unpickler that knows nine names (the ones numpy 1 and numpy 2 write for an array) and gives each a stand-in of ours: no
import happens, no numpy constructor is reachable, and nothing in a file can run code.
"""

import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class RecordError(ValueError):
    """A record that cannot be decoded or that breaks a rule of its schema."""


def encode(record: Mapping[str, Any]) -> bytes:
    """The bytes of one record (pickle protocol 5, the fastest to read)."""
    return pickle.dumps(dict(record), protocol=5)


def decode(data: bytes) -> dict[str, Any]:
    """The record in `data`: a dict of numpy arrays (possibly read-only) and plain Python values.

    Raises `RecordError` whatever is wrong with the bytes: truncated, foreign, or a pickle that asks for anything but a
    numpy array of booleans, integers or floats.
    """
    try:
        record = _Unpickler(io.BytesIO(data)).load()
        if isinstance(record, dict):
            return {str(name): value.array() if isinstance(value, _Array) else value for name, value in record.items()}
    except Exception as error:  # hostile bytes can raise anything, MemoryError and RecursionError included
        raise RecordError(f"not a readable record: {type(error).__name__}: {_one_line(error)}") from error
    raise RecordError(f"not a record: must be a dict, got {type(record).__name__}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no details"


class _Dtype:
    """Stands in for `numpy.dtype`, whose own `__setstate__` accepts flags and sizes that do not fit the type."""

    def __init__(self, code: object, align: object = False, copy: object = False):
        if not (isinstance(code, str) and re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", code)):
            raise pickle.UnpicklingError(f"dtype {code!r} is refused: only booleans, integers and floats are read")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]):
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a dtype with fields is refused")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for an array that pickle builds in two steps (protocols below 5): first empty, then its state."""

    def __init__(self, kind: object, shape: object, code: object):
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]):
        self.state = state

    def array(self) -> np.ndarray:
        assert self.state is not None
        _, shape, dtype, fortran, data = self.state
        return _frombuffer(data, dtype, shape, "F" if fortran else "C")


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    array = np.frombuffer(buffer, dtype.value)
    return array.reshape(shape, order=order) if axis_order is None else array.reshape(shape).transpose(axis_order)


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, dtype.value).reshape(())[()]


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, with which protocols below 3 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is refused")
    return text.encode("latin1")


class _Callable:
    """What a pickle may call and cannot alter: the BUILD opcode sets attributes on whatever has no `__setstate__`."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object):
        raise pickle.UnpicklingError("changing a constructor is refused")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct, so a word is enough
    ("numpy", "dtype"): _Callable(_Dtype),
    ("_codecs", "encode"): _Callable(_latin1),
}
for _core in ("numpy.core", "numpy._core"):  # the names of numpy 1 and of numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Callable(_Array)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Callable(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Callable(_frombuffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is refused: a record holds only data") from None


@runtime_checkable
class Field(Protocol):
    """The rules of one field. Both checks raise `RecordError`, whose message says rule and value."""

    def check(self, value: Any) -> None:
        """Type, shape and range of one record's value."""
        ...

    def stack(self, values: Sequence[Any]) -> np.ndarray:
        """The batch of values that passed `check`."""
        ...

    def check_numbers(self, array: Any) -> None:
        """What is cheap to check on a whole batch and dear record by record; `array` is one value or a batch."""
        ...


@dataclass(frozen=True)
class ArrayField:
    """A float16 or float32 array of a fixed shape, all finite and at least `minimum`; batches are float32."""

    shape: tuple[int, ...]
    minimum: float = -np.inf

    def check(self, value: Any) -> None:
        if not isinstance(value, np.ndarray) or value.dtype.name not in ("float16", "float32"):
            raise RecordError(f"must be a float16 or float32 array, got {_kind(value)}")
        if value.shape != self.shape:
            raise RecordError(f"must have shape {self.shape}, got {value.shape}")

    def stack(self, values: Sequence[np.ndarray]) -> np.ndarray:
        batch = np.empty((len(values), *self.shape), np.float32)
        for row, value in enumerate(values):
            batch[row] = value
        return batch

    def check_numbers(self, array: Any) -> None:
        if not np.isfinite(array).all():
            raise RecordError(f"must be finite, got {int(np.sum(~np.isfinite(array)))} NaN or infinite values")
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


class CaptionField:
    """A text, possibly empty; batches are arrays of `str` objects."""

    def check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise RecordError(f"must be a string, got {_kind(value)}")
        if not value.isascii() and not _is_unicode(value):
            raise RecordError(f"must be valid Unicode, got {value[:100]!r}")

    def stack(self, values: Sequence[str]) -> np.ndarray:
        return np.array(values, object)

    def check_numbers(self, array: Any) -> None:
        """A caption has no numbers."""


def _is_unicode(text: str) -> bool:
    """Whether it could be written to a file: a pickle can hold halves of surrogate pairs, at which tokenizers fail."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


@dataclass(frozen=True)
class Schema:
    """What every record of a data set must hold. Fields that it does not name are ignored."""

    fields: Mapping[str, Field]

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises `RecordError("field: rule, value")` for the first field that is missing or breaks a rule."""
        for name, field in self.fields.items():
            if name not in record:
                raise RecordError(f"{name}: is missing, the record has {sorted(record)}")
            _named(name, field.check, record[name])

    def stack(self, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The batch of records that passed `check`."""
        return {name: field.stack([record[name] for record in records]) for name, field in self.fields.items()}

    def check_numbers(self, record_or_batch: Mapping[str, Any]) -> None:
        """Raises `RecordError` for NaN, infinities and the like, in one record or in a whole batch."""
        for name, field in self.fields.items():
            _named(name, field.check_numbers, record_or_batch[name])


def _named(name: str, check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from None


def stage1_schema(latent_shape: tuple[int, int, int], num_classes: int, has_latent_std: bool = False) -> Schema:
    """Class-conditional records: `latent` (channels, height, width) and `label`, perhaps `latent_std`."""
    fields: dict[str, Field] = {"latent": ArrayField(tuple(latent_shape)), "label": LabelField(num_classes)}
    return Schema(fields | _std_field(latent_shape, has_latent_std))


def stage2_schema(latent_shape: tuple[int, int, int], has_latent_std: bool = False) -> Schema:
    """Text-conditional records: `latent` (channels, height, width), `short_caption`, `long_caption`, perhaps `latent_std`."""
    fields: dict[str, Field] = {"latent": ArrayField(tuple(latent_shape))}
    fields |= {"short_caption": CaptionField(), "long_caption": CaptionField()}
    return Schema(fields | _std_field(latent_shape, has_latent_std))


def _std_field(latent_shape: tuple[int, int, int], has_latent_std: bool) -> dict[str, Field]:
    return {"latent_std": ArrayField(tuple(latent_shape), minimum=0.0)} if has_latent_std else {}
