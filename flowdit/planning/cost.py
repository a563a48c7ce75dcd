"""What a compiled program costs: estimated cycles, collectives and calls without an estimate, loops multiplied in."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import NamedTuple

from flowdit.planning.program import Instruction, Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
REDUCE_SCATTER = "all-reduce-scatter"
"""The TPU compiler's name of fused computations that reduce and scatter."""
BOOKKEEPING = frozenset(
    {"AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "GatherScatterIndicesBitpacked"}
    | {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "xla.sdy.FuncResultSharding"}
)
"""Custom calls that take no time of their own."""


class Collective(NamedTuple):
    """A collective operation: bytes of its whole array (the larger of input and output), and the devices in a group.

    `groups` is the text that says which devices exchange with each other.
    """

    kind: str
    bytes: int
    groups: str


@dataclasses.dataclass
class Cost:
    """The cost of a computation, each loop as often as it runs.

    Of a conditional the branch with the most cycles counts; with the cheapest branches, `cycles` would be smaller by
    `conditional_cycles`. `kernels` counts custom calls, which have no estimate, and `kernel_flops` what they say of
    their operations.
    `unknown_loops` counts loops whose length the text does not say; their bodies count once.
    """

    cycles: int = 0
    conditional_cycles: int = 0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    kernel_flops: int = 0
    unknown_loops: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        self.cycles += times * other.cycles
        self.conditional_cycles += times * other.conditional_cycles
        self.kernel_flops += times * other.kernel_flops
        self.unknown_loops += other.unknown_loops
        self.collectives.update({key: times * count for key, count in other.collectives.items()})
        self.kernels.update({key: times * count for key, count in other.kernels.items()})


def program_cost(text: str) -> Cost:
    """The cost of a compiled program, from `compiled.as_text()`. Raises `ValueError` if it is not the text of one."""
    program = Program(text)
    return _Walk(program).cost(program.entry)


class _Walk:
    """Adds up instructions of the entry or of a loop's body.

    The TPU compiler spreads a collective over several fusions, to compute meanwhile. They are a chain, and count once.
    """

    def __init__(self, program: Program):
        self.program = program
        self.chains: set[str] = set()

    def cost(self, computation: str) -> Cost:
        total = Cost()
        for instruction in self.program.computations[computation].values():
            total.add(self._one(computation, instruction))
        return total

    def _one(self, computation: str, instruction: Instruction) -> Cost:
        operation = instruction.operation
        if operation == "while":
            return self._loop(computation, instruction)
        if operation == "conditional":
            return self._conditional(instruction)
        total = Cost(cycles=instruction.cycles or 0)
        if operation == "fusion":
            for called in instruction.called:
                total.collectives += self._fused_collectives(called)
        elif operation in ("call", "async-start"):
            for called in instruction.called:
                total.add(self.cost(called))
        elif operation == "custom-call":
            total.add(_kernel(instruction))
        elif found := self._collective(computation, instruction):
            total.collectives[found] += 1
        return total

    def _conditional(self, instruction: Instruction) -> Cost:
        branches = [_Walk(self.program).cost(branch) for branch in instruction.called]
        dearest = max(branches, key=lambda cost: cost.cycles)
        dearest.conditional_cycles = dearest.cycles - min(cost.cycles - cost.conditional_cycles for cost in branches)
        return dearest

    def _loop(self, computation: str, loop: Instruction) -> Cost:
        trips, total = self.program.trip_count(computation, loop), Cost()
        if trips is None:
            total.unknown_loops += 1
        for part in ("body", "condition"):
            if name := loop.attribute(part):
                total.add(_Walk(self.program).cost(name), 1 if trips is None else trips)
        return total

    def _fused_collectives(self, computation: str) -> Counter[Collective]:
        found: Counter[Collective] = Counter()
        for instruction in self.program.computations.get(computation, {}).values():
            if instruction.operation == "fusion":
                for called in instruction.called:
                    found += self._fused_collectives(called)
            elif collective := self._collective(computation, instruction):
                found[collective] += 1
        return found

    def _collective(self, computation: str, instruction: Instruction) -> Collective | None:
        operation = instruction.operation.removesuffix("-start")
        if operation not in COLLECTIVES:
            return None
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain and chain[1] in self.chains:
            return None
        if chain:
            self.chains.add(chain[1])
        table = self.program.computations[computation]
        given = sum(table[name].bytes for name in instruction.operands if name in table)
        made = instruction.bytes
        if operation != instruction.operation and made > given:  # the result of a start lists its operands too
            made -= given
        if operation == "collective-permute":
            made = given  # its start also returns flags
        kind = "reduce-scatter" if operation == "all-reduce" and computation.startswith(REDUCE_SCATTER) else operation
        groups = re.search(
            r"(?:replica_groups|source_target_pairs)=(.*?)(?:, [a-z_]+=(?!\()|$)", instruction.attributes
        )
        return Collective(kind, max(given, made), groups[1].rstrip(",") if groups else "")


def _kernel(instruction: Instruction) -> Cost:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    target = found[1] if found else "unnamed"
    if target in BOOKKEEPING:
        return Cost()
    flops = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
    return Cost(kernels=Counter([target]), kernel_flops=int(flops[1]) if flops else 0)
