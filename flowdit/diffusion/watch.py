"""Watching a solve of the ODE: its progress, and states on the path from noise to image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox.internal as eqxi
import jax
from jaxtyping import Array, Float


class Watch(NamedTuple):
    """What to see of a solve besides its result, which it does not change.

    Attributes:
        frames: states of the path, evenly spaced in flow time from the noise to the result; 0: none, else at least 2.
        progress: called on the host after each step with the fraction of the flow time that the slowest image has
            passed. The calls are asynchronous: `jax.effects_barrier` waits for them.
    """

    frames: int = 0
    progress: Callable[[float], None] | None = None


UNWATCHED = Watch()


class Meter(diffrax.AbstractProgressMeter):
    """Passes the progress of a solve to `tell`."""

    tell: Callable[[float], None]

    def init(self) -> None:
        return None

    def step(self, state: None, progress: Any) -> None:
        slowest: Float[Array, ""] = -eqxi.unvmap_max(-progress)  # one call for a batch with adaptive steps
        jax.debug.callback(lambda fraction: self.tell(float(fraction)), slowest)

    def close(self, state: None) -> None:
        return None
