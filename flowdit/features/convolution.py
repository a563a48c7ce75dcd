"""Convolutions of frozen networks on batches, (n, height, width, channels), with the batch norm folded into them.

Written for CPUs too: there EfficientNet takes 5 times as long with XLA's own depthwise convolution as with a sum of
shifted products (`python -m benchmarks features`).
"""

import functools
from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Padding = Literal["SAME", "VALID"]
"""`SAME` is TensorFlow's: an odd number of zeros has one more at the end."""


class Convolution(eqx.Module):
    """A convolution with bias."""

    weight: Float[Array, "rows columns in out"]
    bias: Float[Array, " out"]
    stride: int = eqx.field(static=True, default=1)
    padding: Padding = eqx.field(static=True, default="SAME")

    def __call__(self, x: Float[Array, "n height width in"]) -> Float[Array, "n new_height new_width out"]:
        if self.weight.shape[:2] == (1, 1):
            y = (x.reshape(-1, x.shape[-1]) @ self.weight[0, 0]).reshape(*x.shape[:-1], -1)
        else:
            strides, axes = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, self.weight, strides, self.padding, dimension_numbers=axes)
        return y + self.bias[None, None, None]


class DepthwiseConvolution(eqx.Module):
    """A convolution of each channel by itself, with bias; padded as `SAME`."""

    weight: Float[Array, "side side channels"]
    bias: Float[Array, " channels"]
    stride: int = eqx.field(static=True, default=1)

    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n _ _ channels"]:
        weight = self.weight[:, :, None, None, None]
        shifted = windows(x, len(weight), self.stride)
        return sum(
            (piece * weight[row, column] for (row, column), piece in shifted.items()), self.bias[None, None, None]
        )


def windows(
    x: Float[Array, "n height width channels"],
    side: int,
    stride: int = 1,
    padding: Padding = "SAME",
    fill: float = 0.0,
) -> dict[tuple[int, int], Float[Array, "n _ _ channels"]]:
    """The pixels that a window of `side` sees at each of its places, by row and column; padded with `fill`."""
    if padding == "SAME":
        edges = [_padding(size, side, stride) for size in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *edges, (0, 0)), constant_values=fill)
    ends = tuple(size - side + 1 for size in x.shape[1:3])
    return {
        (row, column): x[:, row : row + ends[0] : stride, column : column + ends[1] : stride]
        for row in range(side)
        for column in range(side)
    }


def _padding(size: int, side: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + side - size, 0)
    return total // 2, total - total // 2


def max_pool(
    x: Float[Array, "n height width channels"], stride: int, padding: Padding
) -> Float[Array, "n _ _ channels"]:
    """The largest value of each 3x3 window."""
    return functools.reduce(jnp.maximum, windows(x, 3, stride, padding, -jnp.inf).values())


def average_pool(x: Float[Array, "n height width channels"]) -> Float[Array, "n height width channels"]:
    """The average over each 3x3 window; pixels outside the image do not count."""
    count = functools.reduce(jnp.add, windows(jnp.ones((1, *x.shape[1:3], 1)), 3).values())
    return functools.reduce(jnp.add, windows(x, 3).values()) / count


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values clipped to [0, 6]."""
    return jnp.clip(x, 0, 6)


def fold(
    weight: Float[np.ndarray, "out in rows columns"], norm: Mapping[str, np.ndarray], eps: float
) -> tuple[Float[np.ndarray, "rows columns in out"], Float[np.ndarray, " out"]]:
    """Weight and bias of a convolution that includes the batch norm after it, computed in float64.

    Args:
        weight: of the convolution, in PyTorch's layout.
        norm: `weight`, `bias`, `running_mean` and `running_var` of the norm, (out,).
        eps: added to the variance.
    """
    scale = norm["weight"].astype(np.float64) / np.sqrt(norm["running_var"].astype(np.float64) + eps)
    folded = weight.astype(np.float64).transpose(2, 3, 1, 0) * scale
    return folded.astype(np.float32), (norm["bias"] - norm["running_mean"] * scale).astype(np.float32)
