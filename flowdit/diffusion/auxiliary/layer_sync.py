"""Alignment of early blocks with late ones (LayerSync, Haghighi et al. 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from flowdit.diffusion.auxiliary.base import AuxiliaryLoss, View, default_block
from flowdit.diffusion.auxiliary.tokens import one_minus_cosine
from flowdit.fields import require
from flowdit.models.config import ModelConfig


@dataclasses.dataclass
class LayerSync(AuxiliaryLoss):
    """One minus the cosine of the tokens after an early and a late block, which gets no gradient. No parameters.

    Published with weight 0.2; 0.1 to 0.7 work for B.

    Attributes:
        depth: the early block, which is trained to agree (1: the first); null: block 8 of 24 or more, else 0.3 of the depth.
        teacher_depth: the late block; null: block 18 of 24, 16 of 28 or more, else 0.65 of the depth.
    """

    depth: int | None = None
    teacher_depth: int | None = None

    name = "layer_sync"

    def for_model(self, model: ModelConfig) -> LayerSync:
        early, late = self.depth, self.teacher_depth
        if early is None:
            early = default_block(model.depth, {24: 8, 28: 8}, 0.3)
        if late is None:
            # Not before block 2, as the early block of a network of two is the first.
            late = max(2, default_block(model.depth, {24: 18, 28: 16}, 0.65))
        return dataclasses.replace(self, depth=early, teacher_depth=late)

    def check(self) -> None:
        super().check()
        early, late = self.depths()
        require("teacher_depth", late, early < late, f"must be after block depth={early}")

    def depths(self) -> tuple[int, int]:
        assert self.depth is not None and self.teacher_depth is not None
        return self.depth, self.teacher_depth

    def __call__(self, parameters: Any, view: View) -> Float[Array, ""]:
        early, late = (view.hidden[depth] for depth in self.depths())
        return one_minus_cosine(early, jax.lax.stop_gradient(late))
