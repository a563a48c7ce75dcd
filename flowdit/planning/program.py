"""The text of a compiled program (HLO) as computations of instructions, and how often its loops run."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_OPERATION = re.compile(r"\s*([\w-]+)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


class Instruction(NamedTuple):
    """One instruction. `arguments` is what stands between its parentheses, `attributes` the rest of its line."""

    name: str
    operation: str
    shape: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def bytes(self) -> int:
        """Size of its result, without the padding of tiles."""
        return shape_bytes(self.shape)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute that is a name or number: of `body=%loop`, `loop`."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return found and found[1]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, but not those that only say how to combine two numbers."""
        listed = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes)
        single = re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.-]+)", self.attributes)
        if self.operation == "call":
            single += re.findall(r"to_apply=%?([\w.-]+)", self.attributes)
        return [name.strip().lstrip("%") for names in listed for name in names.split(",")] + single

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, if it made one."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else None


class Program:
    """The computations of a compiled program, by name; `entry` is the one that runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        # The attributes of a Pallas kernel span lines.
        for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif line and not line[0].isspace():
                current = None
            elif current is not None and (instruction := _parse(line)):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text of the compiled program has no entry computation: its format is not known")

    def root(self, computation: str) -> Instruction:
        return next(each for each in self.computations[computation].values() if each.is_root)

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` in `computation` runs; None if the text does not say."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = loop.attribute("condition"), loop.attribute("body")
        test = self._comparison(condition) if condition and body else None
        if test is None or body is None:
            return None
        direction, sides = test
        values = [self._start(computation, loop, side) if isinstance(side, _Carried) else side for side in sides]
        steps = [self._step(body, side) if isinstance(side, _Carried) else 0 for side in sides]
        if None in values or None in steps:
            return None
        return _trips(direction, values, steps)  # type: ignore[arg-type]

    def _comparison(self, condition: str) -> tuple[str, list[int | _Carried | None]] | None:
        """Direction and both sides of the comparison that ends a loop."""
        test = self._origin(_Value(condition, self.root(condition).name))
        compare = self._instruction(test)
        if compare is None or compare.operation != "compare" or (direction := compare.attribute("direction")) is None:
            return None
        sides = [self._origin(test._replace(name=operand)) for operand in compare.operands]
        return direction, [self._carried(side) or self._integer(side) for side in sides]

    def _start(self, computation: str, loop: Instruction, carried: _Carried) -> int | None:
        """The first value of a carried number."""
        initial = self._origin(_Value(computation, loop.operands[0]))
        found = self._instruction(initial)
        if found is None or found.operation != "tuple":
            return None
        return self._integer(self._origin(initial._replace(name=found.operands[carried.index])))

    def _step(self, body: str, carried: _Carried) -> int | None:
        """What the body adds to a carried number; None if it does something else."""
        result = self._origin(_Value(body, self.root(body).name))
        found = self._instruction(result)
        if found is None or found.operation != "tuple":
            return None
        new = self._origin(result._replace(name=found.operands[carried.index]))
        if self._carried(new) == carried:
            return 0
        added = self._instruction(new)
        if added is None or added.operation != "add":
            return None
        one, other = (self._origin(new._replace(name=operand)) for operand in added.operands)
        if self._carried(other) == carried:
            one, other = other, one
        return self._integer(other) if self._carried(one) == carried else None

    def _origin(self, value: _Value) -> _Value:
        """Where a value is computed: through copies and tuples, into fusions and out of their parameters."""
        while found := self._instruction(value):
            if found.operation in _SAME_VALUE and found.operands:
                value = value._replace(name=found.operands[0])
            elif found.operation == "parameter" and value.given:
                value = value.given[int(found.arguments)]
            elif found.operation == "fusion" and (called := found.attribute("calls")) in self.computations:
                given = tuple(value._replace(name=operand) for operand in found.operands)
                value = _Value(called, self.root(called).name, given)
            elif found.operation == "get-tuple-element":
                whole = self._origin(value._replace(name=found.operands[0]))
                made = self._instruction(whole)
                if made is None or made.operation != "tuple":
                    return value
                value = whole._replace(name=made.operands[_index(found)])
            else:
                return value
        return value

    def _instruction(self, value: _Value) -> Instruction | None:
        return self.computations[value.computation].get(value.name)

    def _integer(self, value: _Value) -> int | None:
        """The value of an integer constant."""
        found = self._instruction(value)
        is_integer = found is not None and found.operation == "constant" and re.match(r"[su]\d+\[\]", found.shape)
        return int(found.arguments) if found is not None and is_integer else None

    def _carried(self, value: _Value) -> _Carried | None:
        """The carried number that a value is, unchanged, in the body or the condition of a loop."""
        found = self._instruction(value)
        if found is None or found.operation != "get-tuple-element":
            return None
        whole = self._instruction(self._origin(value._replace(name=found.operands[0])))
        return _Carried(_index(found)) if whole is not None and whole.operation == "parameter" else None


class _Value(NamedTuple):
    """An instruction by its computation and name; in a fusion `given` are the values of the parameters."""

    computation: str
    name: str
    given: tuple[_Value, ...] = ()


class _Carried(NamedTuple):
    """A number that a loop carries from one iteration to the next, by its place in the tuple."""

    index: int


def _index(element: Instruction) -> int:
    return int(element.attribute("index") or 0)


def _trips(direction: str, values: list[int], steps: list[int]) -> int | None:
    """How often a comparison holds of two numbers that change by `steps`; None if it does not say, or always holds."""
    distance, pace = values[1] - values[0], steps[0] - steps[1]
    if direction in ("GT", "GE") or (direction == "NE" and pace < 0):
        distance, pace = -distance, -pace
    if pace <= 0 or direction == "EQ" or (direction == "NE" and (distance < 0 or distance % pace)):
        return None
    return max(math.ceil((distance + (direction in ("LE", "GE"))) / pace), 0)


def _parse(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest) if rest.startswith("(") else len(rest.partition(" ")[0])
    operation = _OPERATION.match(rest[end:])
    if operation is None:
        return None
    opening = end + operation.end() - 1
    closing = opening + _closing(rest[opening:])
    return Instruction(
        name=start[2],
        operation=operation[1],
        shape=rest[:end],
        arguments=rest[opening + 1 : closing - 1],
        attributes=rest[closing:],
        is_root=bool(start[1]),
    )


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, such as `(f32[2,3]{1,0}, pred[])`."""
    return sum(_array_bytes(dtype, axes) for dtype, axes in _SHAPE.findall(shape))


@functools.cache
def _array_bytes(dtype: str, axes: str) -> int:
    width = re.match(r"[a-z]+(\d+)", dtype)
    bits = _BITS.get(dtype, int(width[1]) if width else 0)
    return math.ceil(math.prod(int(axis) for axis in axes.split(",") if axis) * bits / 8)
