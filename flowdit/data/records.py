"""Records: the bytes of one training example. The only file that knows them; `data.schema` has the rules of the fields.

A record is a pickled flat dict of numpy arrays and plain Python values. Data files are untrusted, so they are read by
an unpickler that accepts nine names (those that numpy 1 and numpy 2 write for an array) and replaces each by a
stand-in: no import happens, no numpy constructor is reachable, and nothing in a file can run code. `data.opcodes` says
what it may see at all, so that no file makes it take memory or time beyond measure.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flowdit.data.opcodes import check_opcodes


class RecordError(ValueError):
    """A record that cannot be decoded or breaks a rule of its schema."""


def encode(record: Mapping[str, Any], protocol: int = 5) -> bytes:
    """The bytes of one record; pickle protocol 5 is the fastest to read."""
    return pickle.dumps(dict(record), protocol)


def decode(data: bytes) -> dict[str, Any]:
    """The record in `data`: a dict of numpy arrays (possibly read-only) and plain Python values.

    Raises `RecordError` for any invalid bytes: truncated, not a record, or a pickle with anything but plain data and
    numpy arrays of booleans, integers or floats. Time and memory are bounded by the length of `data`. Arrays within
    lists are not supported and stay stand-ins.
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
    except Exception as error:  # hostile bytes can raise any error, including MemoryError and RecursionError
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
    """Stand-in for `numpy.dtype`, whose `__setstate__` accepts flags and sizes that do not fit the type."""

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
    """Stand-in for an array until the record is complete: items of a real array could be set, at any cost in memory.

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
    """Stand-in for `_codecs.encode`, used for bytes by protocols below 3; limited to the length of the record.

    Without a limit the memo could copy one long string many times.
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
    """A shortened string in quotes; for anything else the type, as its `repr` may be unbounded."""
    return f"{value[:40]!r}" if isinstance(value, str) else f"of type {type(value).__name__}"


class _Callable:
    """A callable that a pickle cannot modify: the BUILD opcode sets attributes on objects without `__setstate__`."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object):
        raise pickle.UnpicklingError("changing a constructor is refused")


_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only an argument of _reconstruct, so a string is enough
    ("numpy", "dtype"): _Callable(_Dtype),
}
for _core in ("numpy.core", "numpy._core"):  # names in numpy 1 and numpy 2
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
