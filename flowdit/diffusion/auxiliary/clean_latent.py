"""The clean latent as teacher of an early block (SRA 2, Wang et al. 2026)."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flowdit.diffusion.auxiliary.base import AuxiliaryLoss, DataShapes, View, default_block
from flowdit.diffusion.auxiliary.tokens import token_grid
from flowdit.fields import require
from flowdit.models.config import ModelConfig
from flowdit.models.layers import Linear, patchify, xavier_linear

LAYERS = 5


@dataclasses.dataclass
class CleanLatent(AuxiliaryLoss):
    """Smooth L1 error of the patches of the clean latent, which an MLP of five layers predicts from the tokens of a block.

    Published with weight 1. A late block is worse than none: block 8 of 12, say.

    Attributes:
        depth: the block (1: the first); null: block 8 of 24 or more, else a sixth of the depth (2 of 12).
        beta: error up to which it is squared, above which it is absolute.
    """

    depth: int | None = None
    beta: float = 0.05

    name = "clean_latent"

    def for_model(self, model: ModelConfig) -> CleanLatent:
        depth = default_block(model.depth, {24: 8, 28: 8}, 1 / 6) if self.depth is None else self.depth
        return dataclasses.replace(self, depth=depth)

    def check(self) -> None:
        super().check()
        require("beta", self.beta, 0 < self.beta < math.inf, "must be positive and finite")

    def depths(self) -> tuple[int]:
        assert self.depth is not None
        return (self.depth,)

    def init(self, model: ModelConfig, shapes: DataShapes, *, key: PRNGKeyArray) -> list[Linear]:
        widths = [model.hidden_dim] * LAYERS + [shapes.latent[0] * model.patch_size**2]
        keys = jax.random.split(key, LAYERS)
        return [xavier_linear(*pair, key=key) for key, pair in zip(keys, itertools.pairwise(widths), strict=True)]

    def __call__(self, parameters: list[Linear], view: View) -> Float[Array, ""]:
        (depth,) = self.depths()
        x = view.hidden[depth].astype(parameters[0].weight.dtype)
        for linear in parameters[:-1]:
            x = jax.nn.silu(linear(x))
        predicted = parameters[-1](x).astype(jnp.float32)
        rows, _ = token_grid(len(x), view.x_0.shape)
        patches = patchify(view.x_0, view.x_0.shape[1] // rows)
        error = jnp.abs(predicted - patches)
        return jnp.where(error < self.beta, jnp.square(error) / (2 * self.beta), error - self.beta / 2).mean()
