"""Checks the opcodes of a pickle before it is unpickled and anything is allocated.

Python's unpickler can be kept from calling functions, but it allocates whatever size a file declares: a memo index in a
file of 31 bytes takes 4 GB. And it hashes the keys of dicts, which takes exponential time for nested tuples. So a
record may only have the opcodes of plain data (protocols 2 to 5), in limited number, with valid sizes and indices.
(Interpreting the pickle here as well, without Python's unpickler, took 3 us more per record.)
"""

import pickletools

MAX_OPCODES = 10_000
"""A record of two arrays and two captions has 84, whatever their size. Keys with equal hashes take quadratic time."""
MAX_SHARED_TUPLES = 8
"""Maximum number of reused tuples. Each may double the time for hashing."""

_FIXED = {  # opcodes by the bytes of their argument
    0: "MARK NONE NEWTRUE NEWFALSE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE STACK_GLOBAL REDUCE BUILD",
    1: "BININT1",
    2: "BININT2",
    4: "BININT",
    8: "BINFLOAT",
}
_COUNTED = {  # by the size in bytes of their length prefix
    1: "LONG1 SHORT_BINUNICODE SHORT_BINBYTES",
    4: "BINUNICODE BINBYTES",
    8: "BINUNICODE8 BINBYTES8 BYTEARRAY8",
}


def _widths(names: dict[int, str]) -> dict[int, int]:
    codes = {info.name: ord(info.code) for info in pickletools.opcodes}
    return {codes[name]: width for width, several in names.items() for name in several.split()}


_COUNT_WIDTHS = _widths(_COUNTED)
_HEADER_WIDTHS = _widths({1: "PROTO", 8: "FRAME"})
_PUT_WIDTHS = _widths({1: "BINPUT", 4: "LONG_BINPUT"})
_GET_WIDTHS = _widths({1: "BINGET", 4: "LONG_BINGET"})
_MEMOIZE, _SHORT_BINUNICODE, _GLOBAL, _STOP = _widths({0: "MEMOIZE SHORT_BINUNICODE GLOBAL STOP"})
_LENGTHS = [0] * 256
for _code, _width in _widths(_FIXED).items():
    _LENGTHS[_code] = 1 + _width
# After these, the top of the stack, which may go into the memo, is not a tuple.
_NO_TUPLES = {*_COUNT_WIDTHS, _GLOBAL, *_widths({0: "STACK_GLOBAL REDUCE EMPTY_DICT EMPTY_LIST"})}


class OpcodeError(ValueError):
    """A pickle that is damaged, or has other opcodes than those of plain data."""


def check_opcodes(data: bytes) -> None:
    """Raise `OpcodeError` unless the unpickler's time and memory are bounded by the length of `data`."""
    try:
        _walk(data)
    except (IndexError, ValueError) as error:
        if isinstance(error, OpcodeError):
            raise
        raise OpcodeError("it is cut short or damaged") from None  # an opcode or its argument is missing


def _walk(data: bytes) -> None:
    """Frequent opcodes come first. A size beyond the end is detected when the next opcode is missing."""
    position = 0
    previous = 0
    shared = 0
    memo: list[int] = []  # the opcode that made each entry
    for _ in range(MAX_OPCODES):
        opcode = data[position]
        if opcode == _MEMOIZE:
            memo.append(previous)
            position += 1
            continue
        if length := _LENGTHS[opcode]:
            position += length
        elif opcode == _SHORT_BINUNICODE:
            position += 2 + data[position + 1]
        elif opcode in _COUNT_WIDTHS:
            width = _COUNT_WIDTHS[opcode]
            position += 1 + width + _argument(data, position, width)
        elif opcode in _HEADER_WIDTHS:
            position += 1 + _HEADER_WIDTHS[opcode]
            continue
        elif opcode in _GET_WIDTHS:
            width = _GET_WIDTHS[opcode]
            shared += memo[_argument(data, position, width)] not in _NO_TUPLES
            if shared > MAX_SHARED_TUPLES:
                raise OpcodeError(f"more than {MAX_SHARED_TUPLES} uses of tuples from elsewhere in it are refused")
            position += 1 + width
        elif opcode in _PUT_WIDTHS:
            width = _PUT_WIDTHS[opcode]
            if _argument(data, position, width) != len(memo):
                raise OpcodeError("a memo with gaps is refused")
            memo.append(previous)
            position += 1 + width
            continue
        elif opcode == _GLOBAL:
            position = data.index(b"\n", data.index(b"\n", position) + 1) + 1
        elif opcode == _STOP:
            return
        else:
            raise OpcodeError(f"opcode {bytes([opcode])!r} is refused: a record holds only data")
        previous = opcode
    raise OpcodeError(f"more than {MAX_OPCODES} opcodes are refused")


def _argument(data: bytes, position: int, width: int) -> int:
    """The unsigned integer of `width` bytes after the opcode at `position`."""
    return int.from_bytes(data[position + 1 : position + 1 + width], "little")
