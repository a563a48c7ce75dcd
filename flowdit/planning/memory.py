"""What fills the memory of a device."""

from __future__ import annotations

import math
from typing import Any

import jax

from flowdit.planning.compilation import Step


def bytes_on_device(tree: Any) -> int:
    """Bytes of a device's part of arrays, or of `ShapeDtypeStruct`s with their shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_of_state(step: Step) -> dict[str, int]:
    """Bytes of a device that are taken before a step begins, by part."""
    state = step.state
    return {
        "parameters": bytes_on_device(state.parameters),
        "optimizer": bytes_on_device(state.opt_state),
        "EMA": bytes_on_device((state.ema, state.averages)),
        "batch": bytes_on_device(step.batch),
    }


def memory_of_step(step: Step, peak: int) -> dict[str, int]:
    """The peak of a compiled step, by part."""
    parts = memory_of_state(step)
    return parts | {"activations and temporaries": max(peak - sum(parts.values()), 0)}
