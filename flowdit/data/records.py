"""Records: the bytes of one training example, and the rules that its fields obey. The only file that knows the bytes.

A record is a pickled flat dict of numpy arrays and plain Python values. Data files are untrusted, so they are read by an
unpickler that knows nine names (the ones numpy 1 and numpy 2 write for an array) and gives each a stand-in of ours: no
import happens, no numpy constructor is reachable, and nothing in a file can run code. `data.opcodes` says what it may see
at all, so that no file makes it take memory or time beyond measure.
"""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flowdit.data.opcodes import check_opcodes


class RecordError(ValueError):
    """A record that cannot be decoded or that breaks a rule of its schema."""


def encode(record: Mapping[str, Any]) -> bytes:
    """The bytes of one record (pickle protocol 5, the fastest to read)."""
    return pickle.dumps(dict(record), protocol=5)


def decode(data: bytes) -> dict[str, Any]:
    """The record in `data`: a dict of numpy arrays (possibly read-only) and plain Python values.

    Raises `RecordError` whatever is wrong with the bytes: truncated, foreign, or a pickle that asks for anything but a
    numpy array of booleans, integers or floats. Time and memory grow with the length of `data`, whatever it declares.
    Arrays within lists are no part of a record and stay stand-ins.
    """
    try:
        check_opcodes(data)
        unpickler = _Unpickler(io.BytesIO(data))
        unpickler.length = len(data)
        record = unpickler.load()
        if isinstance(record, dict):
            return {
                _name(name): value.array() if isinstance(value, _Array) else value for name, value in record.items()
            }
    except Exception as error:  # hostile bytes can raise anything, MemoryError and RecursionError included
        raise RecordError(f"not a readable record: {type(error).__name__}: {_one_line(error)}") from error
    raise RecordError(f"not a record: must be a dict, got {type(record).__name__}")


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise pickle.UnpicklingError(f"a field whose name is {_shown(name)} is refused")
    return name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no details"


_DTYPES = {
    order + code: np.dtype(order + code)
    for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    for order in ("", "<", ">", "=", "|")
}


class _Dtype:
    """Stands in for `numpy.dtype`, whose own `__setstate__` accepts flags and sizes that do not fit the type."""

    def __init__(self, code: object, align: object = False, copy: object = False):
        if not (isinstance(code, str) and code in _DTYPES):
            raise pickle.UnpicklingError(
                f"dtype {_shown(code)} is refused: only booleans, integers and floats are read"
            )
        self.value = _DTYPES[code]

    def __setstate__(self, state: tuple[Any, ...]):
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a dtype with fields is refused")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands in for an array until the record is whole: the items of a real one could be set, at any cost in memory.

    Pickles below protocol 5 build it in two steps: first empty, then its state.
    """

    def __init__(self, buffer: Any, dtype: Any, shape: Any, order: Any = "C", axis_order: Any = None):
        self.parts = buffer, dtype, shape, order, axis_order

    def __setstate__(self, state: tuple[Any, ...]):
        _, shape, dtype, fortran, data = state
        self.parts = data, dtype, shape, "F" if fortran else "C", None

    def array(self) -> np.ndarray:
        buffer, dtype, shape, order, axis_order = self.parts
        array = np.frombuffer(buffer, dtype.value)
        return array.reshape(shape, order=order) if axis_order is None else array.reshape(shape).transpose(axis_order)


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, dtype.value).reshape(())[()]


class _Latin1:
    """Stands in for `_codecs.encode`, with which protocols below 3 write bytes, of which a record has at most its length.

    Without a limit the memo could have one long text copied again and again.
    """

    def __init__(self, room: int):
        self._room = room

    def __call__(self, text: str, encoding: object) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"codec {_shown(encoding)} is refused")
        self._room -= len(text)
        if self._room < 0:
            raise pickle.UnpicklingError("more bytes than the record has are refused")
        return text.encode("latin1")


def _shown(value: object) -> str:
    """A text in quotes, cut; of anything else the type, as it may be endless to print."""
    return f"{value[:40]!r}" if isinstance(value, str) else f"of type {type(value).__name__}"


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
}
for _core in ("numpy.core", "numpy._core"):  # the names of numpy 1 and of numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Callable(_Array)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Callable(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Callable(_Array)


class _Unpickler(pickle.Unpickler):
    length = 0
    latin1: _Callable | None = None

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            self.latin1 = self.latin1 or _Callable(_Latin1(self.length))
            return self.latin1
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


_FLOATS = {np.dtype(order + code): name for code, name in (("f2", "float16"), ("f4", "float32")) for order in "<>"}
"""Names by dtype, of either byte order: looking one up is faster than `dtype.name`."""


@dataclass(frozen=True)
class ArrayField:
    """A float16 or float32 array of a fixed shape, all finite and at least `minimum`; batches are float32.

    Where `dtype` is given, as the manifest of a data set gives it, it must be that of the two.
    """

    shape: tuple[int, ...]
    minimum: float = -np.inf
    dtype: str | None = None

    def check(self, value: Any) -> None:
        dtype = _FLOATS.get(value.dtype) if isinstance(value, np.ndarray) else None
        if dtype is None:
            raise RecordError(f"must be a float16 or float32 array, got {_kind(value)}")
        if dtype != (self.dtype or dtype):
            raise RecordError(f"must be a {self.dtype} array as latent_dtype of the manifest says, got {_kind(value)}")
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


LATENTS = ("latent", "latent_std")
"""The fields whose dtype the manifest of a data set says."""


@dataclass(frozen=True)
class Schema:
    """What every record of a data set must hold. Fields that it does not name are ignored."""

    fields: Mapping[str, Field]

    def of_dtype(self, dtype: str) -> "Schema":
        """The same with latents of `dtype` alone."""
        latents = {name: f for name, f in self.fields.items() if name in LATENTS and isinstance(f, ArrayField)}
        return Schema({**self.fields, **{name: replace(f, dtype=dtype) for name, f in latents.items()}})

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises `RecordError("field: rule, value")` for the first field that is missing or breaks a rule."""
        for name, field in self.fields.items():
            if name not in record:
                raise RecordError(f"{name}: is missing, the record has {str(sorted(record))[:200]}")
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


CAPTION_FIELDS: Mapping[str, Field] = {"short_caption": CaptionField(), "long_caption": CaptionField()}
"""Those of a text-conditional record; one or both may be empty."""


def record_schema(
    latent_shape: tuple[int, int, int], fields: Mapping[str, Field], has_latent_std: bool = False
) -> Schema:
    """Records of `latent` (channels, height, width), perhaps its `latent_std`, and the `fields` of a conditioning."""
    std: dict[str, Field] = {"latent_std": ArrayField(tuple(latent_shape), minimum=0.0)} if has_latent_std else {}
    return Schema({"latent": ArrayField(tuple(latent_shape)), **fields, **std})
