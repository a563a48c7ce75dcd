"""Interleaved timing of contenders, and markdown tables of the results."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def shown(self) -> str:
        """Median with the range, in seconds, or in milliseconds below one second."""
        factor, unit = (1, "s") if self.median >= 1 else (1000, "ms")
        median, low, high = (factor * x for x in (self.median, min(self.seconds), max(self.seconds)))
        return f"{median:.3g} {unit} ({low:.3g} to {high:.3g})"

    def rate(self, amount: float) -> str:
        """`amount` per second, at the median and over the range."""
        median, low, high = (amount / x for x in (self.median, max(self.seconds), min(self.seconds)))
        digits = 0 if median >= 100 else 1
        return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"

    def ratio(self, other: "Timing") -> str:
        """This over `other`: the median of the ratios per round, as both runs of a round have similar load."""
        ratios = Timing([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])
        return f"{ratios.median:.2f} ({min(ratios.seconds):.2f} to {max(ratios.seconds):.2f})"


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall time (or time of another clock) of one call, which must not return before its work is done."""
    start = clock()
    function()
    return clock() - start


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run all contenders in turn, A B A B ..., so that a change in the machine's load affects all of them."""
    taken = [[seconds(function, clock) for function in contenders.values()] for _ in range(warmup + rounds)]
    return {name: Timing(column) for name, column in zip(contenders, zip(*taken[warmup:], strict=True), strict=True)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
