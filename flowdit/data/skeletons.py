"""Fast decoding of records that pickle wrote from a flat dict of arrays, numbers and texts, as all of a data set are.

Such records differ only in the bytes of their values. A skeleton is what is left: the bytes between the values. It is
never taken from a file. If `records.decode`, the slow path, has read a record, then a dict of the same names, types and
shapes is pickled here, once with other values for each field: the bytes that change are where the value of that field
is, and all others are the skeleton. It is kept if the record has it too.

Why this is safe: a record is read by a skeleton only if all bytes outside of the values are equal to it, so the record
is, byte for byte, what Python's pickle writes for those values. Unpickling is the inverse of that, whoever wrote the
file, and nothing in the values can change it: opcodes, dtypes, shapes and the lengths of arrays are in the skeleton. The
only lengths in a record that count are those of texts, and a wrong one moves all bytes behind it, which are then not
equal. Whatever does not match goes to the slow path, which refuses what is not plain data.
"""

import contextlib
import functools
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flowdit.data.records import decode, encode

MAX_SKELETONS = 512
"""Of one data set; the features of a text cache have one for each number of tokens."""
MAX_ATTEMPTS = 1024
"""Records of a data set for which a skeleton is made; further ones without a skeleton only take the slow path."""
MAX_BYTES = 4096
"""Of a skeleton, so that all together have at most 2 MiB. One of two arrays and two captions has 450."""
MAX_FIELDS = 32
"""Of a record with a skeleton: each costs another pickle to make it."""

_PROTO, _GLOBAL = b"\x80", b"c"  # opcodes

Read = Callable[[bytes, int], tuple[Any, int]]
"""The value that starts at a position of a record, and its end. Raises an error if the record is too short."""


class SkeletonDecoder:
    """Decodes the records of one data set like `records.decode`, five times as fast. Threads may share it.

    Arrays may be read-only and unaligned views of a record's bytes.
    """

    def __init__(self):
        self._by_length: dict[int, list[Skeleton]] = {}
        self._with_texts: list[Skeleton] = []
        self._attempts = self._count = 0  # may be slightly too low with several threads

    def decode(self, data: bytes) -> dict[str, Any]:
        """The record in `data`. Raises `RecordError` like `records.decode`."""
        for skeletons in (self._by_length.get(len(data), ()), self._with_texts):
            for skeleton in skeletons:
                if (record := skeleton.read(data)) is not None:
                    return record
        record = decode(data)
        if self._attempts < MAX_ATTEMPTS and self._count < MAX_SKELETONS:
            self._attempts += 1
            self._learn(data, record)
        return record

    def _learn(self, data: bytes, record: Mapping[str, Any]) -> None:
        if (skeleton := skeleton_of(data, record)) is None:
            return
        self._count += 1
        has_text = any(type(value) is str for value in record.values())
        (self._with_texts if has_text else self._by_length.setdefault(len(data), [])).append(skeleton)


class Part(NamedTuple):
    """The bytes in front of a value, the value's field (None: not a field's), and how to read it."""

    before: bytes
    name: str | None
    read: Read


class Skeleton:
    """The bytes of a record around its values; `constants` are all names in order, with the values that never vary."""

    def __init__(self, parts: Sequence[Part], end: bytes, constants: Mapping[str, Any]):
        self._parts, self._end = parts, end
        self._constants = dict(constants)

    def read(self, data: bytes) -> dict[str, Any] | None:
        """The record in `data`, or None if it has another skeleton or values that the slow path may refuse."""
        record, position = self._constants.copy(), 0
        try:
            for before, name, read in self._parts:
                if not data.startswith(before, position):
                    return None
                value, position = read(data, position + len(before))
                if name is not None:
                    record[name] = value
        except (IndexError, TypeError, ValueError, struct.error):  # too short, or a text that is not UTF-8
            return None
        return record if data[position:] == self._end else None


def skeleton_of(data: bytes, record: Mapping[str, Any]) -> Skeleton | None:
    """The skeleton of `data`, from which `record` was decoded, or None if it is not one that pickle writes."""
    if data[:1] != _PROTO or not 3 <= data[1] <= 5 or len(record) > MAX_FIELDS:
        return None
    if any("numpy" in name for name in record):  # would be renamed with numpy's own names
        return None
    with contextlib.suppress(_Unsuitable):
        kinds = {name: _kind(value, data[1]) for name, value in record.items() if not _is_constant(value)}
        for write in (encode, _encode_like_numpy1):
            skeleton = _pickled_skeleton(record, kinds, functools.partial(write, protocol=data[1]))
            if skeleton.read(data) is not None:
                return skeleton
    return None


class _Unsuitable(Exception):
    """A record that has no skeleton."""


def _pickled_skeleton(
    record: Mapping[str, Any], kinds: Mapping[str, "_Kind"], write: Callable[[Any], bytes]
) -> Skeleton:
    sample = {name: kinds[name].filled(_FILLS[0]) if name in kinds else value for name, value in record.items()}
    data = write(sample)
    holes: list[_Hole] = []
    for name, kind in kinds.items():
        other = write({**sample, name: kind.filled(_FILLS[1])})
        start = _changed(data, other, kind.size)
        holes.append(_Hole(start - kind.prefix, start + kind.size, name, kind.read))
    texts = [hole.start for hole in holes if hole.name and kinds[hole.name].prefix]
    for start, stop in _frames(data):
        if any(start < text < stop for text in texts):  # else its length does not vary
            if stop < len(data):
                raise _Unsuitable
            holes.append(_Hole(start - 8, start, None, _read_length_of_rest))
    parts, end = [], 0
    for start, stop, name, read in sorted(holes):
        parts.append(Part(data[end:start], name, read))
        end = stop
    if sum(len(part.before) for part in parts) + len(data) - end > MAX_BYTES:
        raise _Unsuitable
    return Skeleton(parts, data[end:], {name: None if name in kinds else value for name, value in record.items()})


class _Hole(NamedTuple):
    start: int
    stop: int
    name: str | None
    read: Read


def _frames(data: bytes) -> list[tuple[int, int]]:
    """Where the frames of a pickle start, behind their length, and stop. They say how much may be read at once."""
    positions = [position for opcode, _, position in pickletools.genops(data) if opcode.name == "FRAME"]
    starts = [position + 9 for position in positions if position is not None]
    return [(start, start + int.from_bytes(data[start - 8 : start], "little")) for start in starts]


def _encode_like_numpy1(record: Mapping[str, Any], protocol: int) -> bytes:
    """A pickle of `record` in which numpy's modules have the names of numpy 1."""
    data = encode(record, protocol)
    parts, end = [], 0
    for start, stop in _frames(data):
        frame = _renamed(data[start:stop])
        parts += [_renamed(data[end : start - 8]), struct.pack("<Q", len(frame)), frame]
        end = stop
    return b"".join([*parts, _renamed(data[end:])])


def _renamed(part: bytes) -> bytes:
    for module in (b"numeric", b"multiarray"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        part = part.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
        part = part.replace(_GLOBAL + new + b"\n", _GLOBAL + old + b"\n")
    return part


def _changed(first: bytes, second: bytes, size: int) -> int:
    """Where the only difference starts, which must be in `size` bytes in a row."""
    if len(first) == len(second):
        changed = np.flatnonzero(np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8))
        if len(changed) == size and changed[-1] - changed[0] == size - 1:
            return int(changed[0])
    raise _Unsuitable


_FILLS = (0x2A, 0x55)
"""Bytes of which values are made here. They differ, are ASCII, and integers of them have the same opcode."""


class _Kind(NamedTuple):
    """Values that have the same skeleton: how to make one of `size` equal bytes, and how to read one.

    `prefix` bytes in front are read with the value: the length of a text.
    """

    filled: Callable[[int], Any]
    size: int
    read: Read
    prefix: int = 0


def _is_constant(value: object) -> bool:
    """Whether the value is a part of the skeleton: its opcode is the value."""
    return value is None or isinstance(value, bool)


def _kind(value: object, protocol: int) -> _Kind:
    if isinstance(value, np.ndarray) and value.flags.c_contiguous and value.size:
        return _array_kind(value)
    if isinstance(value, np.integer | np.floating):
        return _scalar_kind(value.dtype)
    if type(value) is int and (width := _integer_width(value)):
        return _integer_kind(width)
    if type(value) is float:
        return _Kind(lambda fill: struct.unpack(">d", bytes([fill] * 8))[0], 8, _read_float)
    if type(value) is bytes and value:
        return _bytes_kind(len(value))
    if type(value) is str:
        is_short = protocol >= 4 and len(value.encode(errors="surrogatepass")) < 256
        return _text_kind(1 if is_short else 4)
    raise _Unsuitable


def _array_kind(array: np.ndarray) -> _Kind:
    shape, size = array.shape, array.nbytes
    dtype = np.dtype(array.dtype.str)
    buffer = bytearray if array.flags.writeable else bytes  # they have different opcodes in protocol 5

    def read(data: bytes, start: int) -> tuple[np.ndarray, int]:
        return np.ndarray(shape, dtype, data, start), start + size

    return _Kind(lambda fill: np.ndarray(shape, dtype, buffer([fill]) * size), size, read)


def _scalar_kind(dtype: np.dtype) -> _Kind:
    size = dtype.itemsize

    def read(data: bytes, start: int) -> tuple[Any, int]:
        return np.frombuffer(data, dtype, 1, start)[0], start + size

    return _Kind(lambda fill: np.frombuffer(bytes([fill] * size), dtype)[0], size, read)


def _integer_width(value: int) -> int:
    """Bytes in which pickle writes an integer; 0: neither of its three usual forms."""
    if 0 <= value < 2**16:
        return 1 if value < 2**8 else 2
    return 4 if -(2**31) <= value < 2**31 else 0


def _integer_kind(width: int) -> _Kind:
    def read(data: bytes, start: int) -> tuple[int, int]:
        stop = start + width
        return int.from_bytes(data[start:stop], "little", signed=width == 4), stop

    return _Kind(lambda fill: int.from_bytes(bytes([fill] * width), "little"), width, read)


def _bytes_kind(size: int) -> _Kind:
    def read(data: bytes, start: int) -> tuple[bytes, int]:
        return data[start : start + size], start + size

    return _Kind(lambda fill: bytes([fill] * size), size, read)


def _text_kind(prefix: int) -> _Kind:
    def read(data: bytes, start: int) -> tuple[str, int]:
        content = start + prefix
        stop = content + int.from_bytes(data[start:content], "little")
        return data[content:stop].decode("utf-8", "surrogatepass"), stop

    size = 2 if prefix == 1 else 256  # any length that has the prefix
    return _Kind(lambda fill: chr(fill) * size, size, read, prefix)


def _read_float(data: bytes, start: int) -> tuple[float, int]:
    return struct.unpack_from(">d", data, start)[0], start + 8


def _read_length_of_rest(data: bytes, start: int) -> tuple[None, int]:
    """The length of a frame that ends with the record."""
    stop = start + 8
    if int.from_bytes(data[start:stop], "little") != len(data) - stop:
        raise ValueError
    return None, stop
