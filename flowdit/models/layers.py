"""Layers shared by the transformers. Each sees one example, (tokens, dim) or (dim,); callers `vmap` over the batch.

Parameters may be float32 or bfloat16; norms are computed in float32 and returned in the dtype of their input.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flowdit.models.attention import attend


class Linear(eqx.Module):
    """`x @ weight + bias` on the last axis.

    Acts on the whole (tokens, dim) matrix: a matrix-vector layer under two vmaps is 1.2-1.4x slower on CPU.
    """

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"]

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        y = x @ self.weight
        return y + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))


def xavier_linear(in_dim: int, out_dim: int, *, key: PRNGKeyArray) -> Linear:
    """Xavier-uniform weight and zero bias (the DiT initialisation)."""
    limit = float(np.sqrt(6 / (in_dim + out_dim)))
    return Linear(jax.random.uniform(key, (in_dim, out_dim), minval=-limit, maxval=limit), jnp.zeros(out_dim))


def normal_linear(in_dim: int, out_dim: int, *, key: PRNGKeyArray) -> Linear:
    """Normal(0, 0.02) weight and zero bias (the time MLP of DiT; the t block and the caption MLP of PixArt)."""
    return Linear(0.02 * jax.random.normal(key, (in_dim, out_dim)), jnp.zeros(out_dim))


def zero_linear(in_dim: int, out_dim: int) -> Linear:
    """All zeros: adaLN-Zero outputs and the final projection start as the identity and as no velocity."""
    return Linear(jnp.zeros((in_dim, out_dim)), jnp.zeros(out_dim))


def layer_norm(x: Float[Array, "tokens dim"], eps: float = 1e-6) -> Float[Array, "tokens dim"]:
    """LayerNorm without affine parameters."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class RMSNorm(eqx.Module):
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019), on the last axis."""

    scale: Float[Array, " dim"]
    eps: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "*lead dim"]) -> Float[Array, "*lead dim"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        scale = self.scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * scale).astype(x.dtype)


def modulate(
    x: Float[Array, "tokens dim"], shift: Float[Array, " dim"], scale: Float[Array, " dim"]
) -> Float[Array, "tokens dim"]:
    """adaLN modulation, `x * (1 + scale) + shift` (DiT, equation in section 3.2)."""
    return x * (1 + scale[None]) + shift[None]


class SelfAttention(eqx.Module):
    """Multi-head self-attention with optional Q/K RMSNorm (Henry et al. 2020; the cure for NaN in long bf16 runs)."""

    qkv: Linear
    out: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    num_heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        query, key, value = jnp.split(self.qkv(x).reshape(x.shape[0], 3 * self.num_heads, -1), 3, axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return self.out(attend(query, key, value).reshape(x.shape))


class CrossAttention(eqx.Module):
    """Multi-head attention from image tokens to text tokens of the same width, with optional Q/K RMSNorm.

    `mask` is True at the text tokens to attend to. Without any, all are attended to: the result stays finite.
    """

    query: Linear
    key_value: Linear
    out: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    num_heads: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "tokens dim"], text: Float[Array, "text_tokens dim"], mask: Bool[Array, " text_tokens"]
    ) -> Float[Array, "tokens dim"]:
        query = self.query(x).reshape(x.shape[0], self.num_heads, -1)
        key, value = jnp.split(self.key_value(text).reshape(text.shape[0], 2 * self.num_heads, -1), 2, axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return self.out(attend(query, key, value, mask).reshape(x.shape))


def self_attention(dim: int, num_heads: int, qk_norm: bool, *, key: PRNGKeyArray) -> SelfAttention:
    """Attention over `dim` channels in `num_heads` heads, Xavier-initialised."""
    qkv_key, out_key = jax.random.split(key)
    norms = _head_norms(dim // num_heads, qk_norm)
    qkv = _fused_xavier(dim, 3, key=qkv_key)
    return SelfAttention(qkv, xavier_linear(dim, dim, key=out_key), *norms, num_heads)


def cross_attention(dim: int, num_heads: int, qk_norm: bool, *, key: PRNGKeyArray) -> CrossAttention:
    """Xavier-initialised but for the zero output projection: the text starts without a say (PixArt-alpha)."""
    query_key, key_value_key = jax.random.split(key)
    query, key_value = xavier_linear(dim, dim, key=query_key), _fused_xavier(dim, 2, key=key_value_key)
    norms = _head_norms(dim // num_heads, qk_norm)
    return CrossAttention(query, key_value, zero_linear(dim, dim), *norms, num_heads)


def _head_norms(head_dim: int, qk_norm: bool) -> tuple[RMSNorm, RMSNorm] | tuple[None, None]:
    return (RMSNorm(jnp.ones(head_dim)), RMSNorm(jnp.ones(head_dim))) if qk_norm else (None, None)


def _fused_xavier(dim: int, count: int, *, key: PRNGKeyArray) -> Linear:
    """`count` square projections side by side: Xavier over the fused matrix, of larger fan-out, would be too small."""
    projections = [xavier_linear(dim, dim, key=k) for k in jax.random.split(key, count)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *projections)


class MLP(eqx.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    up: Linear
    down: Linear

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def mlp(dim: int, hidden_dim: int, *, key: PRNGKeyArray) -> MLP:
    """`dim -> hidden_dim -> dim`, Xavier-initialised."""
    up_key, down_key = jax.random.split(key)
    return MLP(xavier_linear(dim, hidden_dim, key=up_key), xavier_linear(hidden_dim, dim, key=down_key))


class TimeEmbedding(eqx.Module):
    """Flow time in [0, 1] -> (dim,): sinusoidal features of 1000 t through Linear, SiLU, Linear.

    With `scale` 1 it embeds other numbers, such as the height of an image in pixels.
    """

    up: Linear
    down: Linear
    freq_shift: float = eqx.field(static=True, default=0.0)
    scale: float = eqx.field(static=True, default=1000.0)

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " dim"]:
        features = sinusoidal_features(self.scale * t, self.up.weight.shape[0], self.freq_shift)
        return self.down(jax.nn.silu(self.up(features.astype(self.up.weight.dtype))))


def time_embedding(
    dim: int, *, freq_shift: float = 0.0, scale: float = 1000.0, key: PRNGKeyArray, num_features: int = 256
) -> TimeEmbedding:
    """Normal(0, 0.02)-initialised embedding of the flow time (`scale` 1: of any number)."""
    up_key, down_key = jax.random.split(key)
    up, down = normal_linear(num_features, dim, key=up_key), normal_linear(dim, dim, key=down_key)
    return TimeEmbedding(up, down, freq_shift, scale)


def sinusoidal_features(
    position: Float[Array, ""], num_features: int, freq_shift: float = 0.0, max_period: float = 10_000.0
) -> Float[Array, " num_features"]:
    """Cosines, then sines, of `position` at geometrically spaced frequencies (DiT `timestep_embedding`).

    `freq_shift` is diffusers' `downscale_freq_shift`: 0 in the original, 1 in its DiT class.
    """
    half = num_features // 2
    # Rounded to float32 where the references round: angles up to 1000 rad magnify a difference in the last bit.
    exponents = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angles = position * jnp.asarray(np.exp(exponents.astype(np.float64)).astype(np.float32))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def sincos_positions(
    dim: int, height: int, width: int, interpolation_scale: float = 1.0
) -> Float[np.ndarray, "tokens dim"]:
    """Fixed 2-D sin-cos table in row-major token order; the width coordinate fills the first half (DiT, MAE).

    Coordinates are token numbers over `interpolation_scale` (PixArt-alpha), as in diffusers for a grid of the base size.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    frequencies = 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4))

    def features(coordinate: np.ndarray) -> np.ndarray:
        angles = coordinate.reshape(-1, 1) / interpolation_scale * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([features(columns), features(rows)], axis=1).astype(np.float32)


def patchify(x: Float[Array, "channels height width"], patch_size: int) -> Float[Array, "tokens patch"]:
    """Cut into row-major patches; a patch is flattened as (row, column, channel)."""
    channels, height, width = x.shape
    x = x.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.transpose(1, 3, 2, 4, 0).reshape(-1, patch_size * patch_size * channels)


def unpatchify(
    tokens: Float[Array, "tokens patch"], patch_size: int, latent_shape: tuple[int, int, int]
) -> Float[Array, "channels height width"]:
    """Inverse of `patchify` for a latent of `latent_shape`."""
    channels, height, width = latent_shape
    x = tokens.reshape(height // patch_size, width // patch_size, patch_size, patch_size, channels)
    return x.transpose(4, 0, 2, 1, 3).reshape(latent_shape)
