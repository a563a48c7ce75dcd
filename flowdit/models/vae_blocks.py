"""The blocks of the `AutoencoderKL` family, acting on one example, (channels, height, width).

Attributes have the names of the diffusers state dict (`models/unets/unet_2d_blocks.py`), which is used to load them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NORM_EPS = 1e-6


# Weights are always read from a file, and the network is first built as shapes only, so any key works.
_ANY_SEED = 0


def conv(in_channels: int, out_channels: int, kernel_size: int = 3, **options: Any) -> eqx.nn.Conv2d:
    """A convolution that keeps the size by default."""
    options.setdefault("padding", kernel_size // 2)
    return eqx.nn.Conv2d(in_channels, out_channels, kernel_size, key=jax.random.key(_ANY_SEED), **options)


def norm(channels: int, groups: int) -> eqx.nn.GroupNorm:
    """A group norm; Equinox computes it in float32 for any parameter dtype."""
    return eqx.nn.GroupNorm(groups, channels, eps=NORM_EPS)


def _linear(channels: int) -> eqx.nn.Linear:
    return eqx.nn.Linear(channels, channels, key=jax.random.key(_ANY_SEED))


class ResnetBlock(eqx.Module):
    """Two normalised 3x3 convolutions with a skip connection, a 1x1 convolution if the width changes."""

    norm1: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    conv_shortcut: eqx.nn.Conv2d | None

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        self.norm1 = norm(in_channels, groups)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def __call__(self, x: Float[Array, "in_channels height width"]) -> Float[Array, "out_channels height width"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(eqx.Module):
    """Single-head self-attention over all positions, with a skip connection."""

    group_norm: eqx.nn.GroupNorm
    to_q: eqx.nn.Linear
    to_k: eqx.nn.Linear
    to_v: eqx.nn.Linear
    to_out: list[eqx.nn.Linear]

    def __init__(self, channels: int, groups: int):
        self.group_norm = norm(channels, groups)
        self.to_q = _linear(channels)
        self.to_k = _linear(channels)
        self.to_v = _linear(channels)
        self.to_out = [_linear(channels)]

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1).T
        # In float32 for any parameter dtype: XLA on CPU cannot run this product in bfloat16.
        q, k, v = (
            jax.vmap(project)(tokens)[:, None].astype(jnp.float32) for project in (self.to_q, self.to_k, self.to_v)
        )
        h = jax.nn.dot_product_attention(q, k, v)[:, 0].astype(x.dtype)
        return x + jax.vmap(self.to_out[0])(h).T.reshape(x.shape)


class Downsample(eqx.Module):
    """Halve height and width; padding only on the right and the bottom, as in the original training."""

    conv: eqx.nn.Conv2d

    def __init__(self, channels: int):
        self.conv = conv(channels, channels, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels _ _"]:
        return self.conv(x)


class Upsample(eqx.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    conv: eqx.nn.Conv2d

    def __init__(self, channels: int):
        self.conv = conv(channels, channels)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels _ _"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class DownBlock(eqx.Module):
    """Residual blocks at one resolution, then downsampling unless it is the last."""

    resnets: list[ResnetBlock]
    downsamplers: list[Downsample]

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, *, is_last: bool):
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups)
        self.downsamplers = [] if is_last else [Downsample(out_channels)]

    def __call__(self, x: Float[Array, "in_channels height width"]) -> Float[Array, "out_channels _ _"]:
        return chain([*self.resnets, *self.downsamplers], x)


class UpBlock(eqx.Module):
    """Residual blocks at one resolution, then upsampling unless it is the last."""

    resnets: list[ResnetBlock]
    upsamplers: list[Upsample]

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, *, is_last: bool):
        self.resnets = _resnets(in_channels, out_channels, num_layers, groups)
        self.upsamplers = [] if is_last else [Upsample(out_channels)]

    def __call__(self, x: Float[Array, "in_channels height width"]) -> Float[Array, "out_channels _ _"]:
        return chain([*self.resnets, *self.upsamplers], x)


class MidBlock(eqx.Module):
    """Two residual blocks at the lowest resolution, with attention between them if the network has it."""

    resnets: list[ResnetBlock]
    attentions: list[Attention]

    def __init__(self, channels: int, groups: int, *, has_attention: bool):
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = [Attention(channels, groups)] if has_attention else []

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        return chain([self.resnets[0], *self.attentions, self.resnets[1]], x)


def _resnets(in_channels: int, out_channels: int, count: int, groups: int) -> list[ResnetBlock]:
    return [ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)]


def chain(layers: Sequence[Callable[[Array], Array]], x: Array) -> Array:
    """Apply `layers` to `x` in order."""
    for layer in layers:
        x = layer(x)
    return x
