"""Representation alignment with cached features of another network: REPA and iREPA.

Sources: Yu et al. 2024 (REPA, arXiv:2410.06940) and Singh et al. 2025 (iREPA, arXiv:2512.10794).
"""

from __future__ import annotations

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flowdit.data.schema import FeatureMapField, Field
from flowdit.diffusion.auxiliary.base import AuxiliaryLoss, DataShapes, View, default_block
from flowdit.diffusion.auxiliary.tokens import one_minus_cosine, token_grid
from flowdit.fields import require, require_choice
from flowdit.fsdp import gather
from flowdit.models.config import ModelConfig
from flowdit.models.layers import Linear, xavier_linear
from flowdit.sharding import ParameterSpec

PROJECTORS = ("mlp", "convolution")
SIDE = 3
"""Of the convolution's kernel."""


@dataclasses.dataclass
class Repa(AuxiliaryLoss):
    """One minus the cosine between projected tokens of a block and the features of the clean image at the same place.

    The features are those of `data.feature_cache`. Published as REPA with weight 0.5, as iREPA with weight 1,
    `projector=convolution` and `spatial_norm=1`.

    Attributes:
        depth: the block (1: the first); null: block 8 of 24 or more, else a third of the depth (4 of 12).
        projector: from tokens to features: `mlp` (three layers with SiLU) or `convolution` (3x3, over the grid of tokens).
        width: hidden channels of the MLP.
        spatial_norm: share of the mean over positions that is subtracted from each channel of the features, before it is
            divided by its standard deviation over positions; in [0, 1]. null: features as they are.
    """

    depth: int | None = None
    projector: str = "mlp"
    width: int = 2048
    spatial_norm: float | None = None

    name = "repa"

    def for_model(self, model: ModelConfig) -> Repa:
        depth = default_block(model.depth, {24: 8, 28: 8}, 1 / 3) if self.depth is None else self.depth
        return dataclasses.replace(self, depth=depth)

    def check(self) -> None:
        super().check()
        require_choice("projector", self.projector, PROJECTORS)
        require("width", self.width, self.width >= 1, "must be at least 1")
        share = self.spatial_norm
        require("spatial_norm", share, share is None or 0 <= share <= 1, "must be null or in [0, 1]")

    def fields(self) -> dict[str, Field]:
        return {"feature_map": FeatureMapField()}

    def depths(self) -> tuple[int]:
        assert self.depth is not None
        return (self.depth,)

    def init(self, model: ModelConfig, shapes: DataShapes, *, key: PRNGKeyArray) -> MlpProjector | ConvolutionProjector:
        assert shapes.feature_map is not None
        out_dim = shapes.feature_map[-1]
        if self.projector == "convolution":
            return ConvolutionProjector(model.hidden_dim, out_dim, key=key)
        return MlpProjector(model.hidden_dim, self.width, out_dim, key=key)

    def __call__(self, parameters: MlpProjector | ConvolutionProjector, view: View) -> Float[Array, ""]:
        (depth,) = self.depths()
        tokens = view.hidden[depth]
        grid = token_grid(len(tokens), view.x_0.shape)
        student = gather(parameters)(tokens, grid)
        teacher = resized(view.example["feature_map"].astype(jnp.float32), grid)
        if self.spatial_norm is not None:
            teacher = normalised(teacher, self.spatial_norm)
        return one_minus_cosine(student, teacher)


def resized(features: Float[Array, "rows columns width"], grid: tuple[int, int]) -> Float[Array, "tokens width"]:
    """The features at the places of the tokens, by linear interpolation, with antialiasing towards fewer."""
    shape = (*grid, features.shape[-1])
    if features.shape != shape:
        features = jax.image.resize(features, shape, "linear", precision=jax.lax.Precision.HIGHEST)
    return features.reshape(-1, shape[-1])


def normalised(features: Float[Array, "tokens width"], share: float, eps: float = 1e-6) -> Float[Array, "tokens width"]:
    """`share` of each channel's mean over positions is subtracted; the rest is divided by its standard deviation there."""
    centred = features - share * features.mean(0, keepdims=True)
    return centred / (features.std(0, keepdims=True) + eps)


class MlpProjector(eqx.Module):
    """Three linear layers with SiLU between them, on each token."""

    layers: tuple[Linear, Linear, Linear]

    def __init__(self, in_dim: int, width: int, out_dim: int, *, key: PRNGKeyArray):
        first, second, third = jax.random.split(key, 3)
        self.layers = (
            xavier_linear(in_dim, width, key=first, axes=("embed", None)),
            xavier_linear(width, width, key=second, axes=("embed", None)),
            xavier_linear(width, out_dim, key=third, axes=("embed", None)),
        )

    def __call__(self, tokens: Float[Array, "tokens in"], grid: tuple[int, int]) -> Float[Array, "tokens out"]:
        for layer in self.layers[:-1]:
            tokens = jax.nn.silu(layer(tokens))
        return self.layers[-1](tokens)


class ConvolutionProjector(eqx.Module):
    """A 3x3 convolution over the grid of tokens, zero-padded."""

    weight: Float[Array, "3 3 in out"]
    bias: Float[Array, " out"]

    def __init__(self, in_dim: int, out_dim: int, *, key: PRNGKeyArray):
        limit = math.sqrt(6 / (SIDE**2 * (in_dim + out_dim)))  # Xavier
        self.weight = jax.random.uniform(key, (SIDE, SIDE, in_dim, out_dim), minval=-limit, maxval=limit)
        self.bias = jnp.zeros(out_dim)

    def __call__(self, tokens: Float[Array, "tokens in"], grid: tuple[int, int]) -> Float[Array, "tokens out"]:
        rows, columns = grid
        padded = jnp.pad(tokens.reshape(*grid, -1), ((1, 1), (1, 1), (0, 0)))
        places = [padded[i : i + rows, j : j + columns] for i in range(SIDE) for j in range(SIDE)]
        # One matrix product: on CPUs XLA's convolution, differentiated, makes a training step five times as long.
        around = jnp.concatenate(places, -1).reshape(len(tokens), -1)
        return around @ self.weight.reshape(-1, self.weight.shape[-1]) + self.bias[None]

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"weight": ParameterSpec((None, None, "embed", None), decay=True)}
