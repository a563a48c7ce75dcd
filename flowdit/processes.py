"""Decisions of the first process for all, and values of all processes, by collectives over all devices."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdit.fields import shown


def from_first(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process only and return its result on all processes.

    The result must be JSON. An error is raised on all processes, on the others as `ValueError`.
    """
    if jax.process_count() == 1:
        return decide()
    answer, failure = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except Exception as problem:  # any error, as the others must not wait for an answer
            answer, failure = {"error": str(problem)}, problem
    answer = _broadcast(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(answer)
    # All processes need the same shape, which only the first one knows.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(_padded(content, size))).tobytes())


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order, on all processes. They must be JSON. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    content = json.dumps(value)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
    rows = np.asarray(multihost_utils.process_allgather(_padded(content, int(sizes.max()))))
    return [json.loads(row.tobytes()) for row in rows]


def _padded(content: str, size: int) -> np.ndarray:
    """ASCII text followed by spaces, `size` bytes or more: rounded up, as a collective is compiled for every shape."""
    rounded = max(1024, 1 << (size - 1).bit_length())
    return np.frombuffer(content.encode().ljust(rounded)[:rounded], np.uint8)


def require_equal(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the values are equal in all processes, for the first name that differs.

    They must be JSON. All processes must call it.
    """
    first, *others = gather(dict(values))
    for number, theirs in enumerate(others, start=1):
        for name in sorted(first.keys() | theirs.keys()):
            if (a := first.get(name)) != (b := theirs.get(name)):
                raise ValueError(
                    f"{name}: must be equal in all processes, got {shown(a)} in process 0 and {shown(b)} in process {number}"
                )


def totals(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by name, summed over all processes; a name may be missing in some. All processes must call it."""
    every = gather(dict(counts))
    return {name: sum(some.get(name, 0) for some in every) for name in dict.fromkeys(itertools.chain(*every))}


def own_share(sizes: Mapping[str, int]) -> list[str]:
    """The names that this process works on: each is given to one process, so that the sums of their sizes are similar.

    All processes must pass the same names and sizes.
    """
    shares: list[list[str]] = [[] for _ in range(jax.process_count())]
    sums = [0] * len(shares)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = sums.index(min(sums))
        shares[least].append(name)
        sums[least] += sizes[name]
    return shares[jax.process_index()]


def any_process(value: bool) -> bool:
    """Whether `value` is true on any process. All processes must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.bool_(value)).any())


def wait_for_all(name: str) -> None:
    """Wait until every process has reached the point called `name`."""
    multihost_utils.sync_global_devices(name)
