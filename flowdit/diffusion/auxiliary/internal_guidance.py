"""The loss of the guidance head (Internal Guidance, Zhou et al. 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flowdit.diffusion.auxiliary.base import AuxiliaryLoss, View


@dataclasses.dataclass
class InternalGuidance(AuxiliaryLoss):
    """The velocity error of the guidance head after block `model.guidance_head`, which it needs.

    Published with weight 0.5 to 1, block 8 of 28 or 4 of 12. Sample with `internal_guidance`, such as 1.4. No parameters
    of its own: the head is a part of the network.
    """

    name = "internal_guidance"
    reads_weak = True

    def __call__(self, parameters: Any, view: View) -> Float[Array, ""]:
        assert view.weak is not None
        return jnp.square(view.weak - view.target).mean()
