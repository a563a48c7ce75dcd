"""Layers shared by the transformers. Each sees one example, (tokens, dim) or (dim,); callers `vmap` over the batch.

Parameters may be float32 or bfloat16; norms are computed in float32 and returned in the dtype of their input.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flowdit.models import fast
from flowdit.models.attention import attend, is_fast
from flowdit.models.observe import observe_logits
from flowdit.models.positions import rotate
from flowdit.sharding import ParameterSpec

Axes = tuple[str | None, str | None]
"""Logical axes of a weight's inputs and outputs (`sharding.LOGICAL_AXES`); None is never sharded."""


class Linear(eqx.Module):
    """`x @ weight + bias` on the last axis.

    `axes` are the logical axes of the weight. `parts` is the number of projections that are fused along its outputs.
    Acts on the whole (tokens, dim) matrix: a matrix-vector layer under two vmaps is 1.2-1.4x slower on CPU.
    """

    weight: Float[Array, "in out"]
    bias: Float[Array, " out"]
    axes: Axes = eqx.field(static=True, default=(None, None))
    parts: int = eqx.field(static=True, default=1)

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        y = x @ self.weight
        return y + self.bias.reshape((1,) * (y.ndim - 1) + (-1,))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"weight": ParameterSpec(self.axes, parts=self.parts, decay=True)}


def xavier_linear(in_dim: int, out_dim: int, *, key: PRNGKeyArray, axes: Axes = (None, None), parts: int = 1) -> Linear:
    """Xavier-uniform weight and zero bias (the DiT initialisation).

    Fused projections are initialised one by one: Xavier over the fused matrix, of larger fan-out, would be too small.
    """
    limit = float(np.sqrt(6 / (in_dim + out_dim // parts)))
    draw = lambda key: jax.random.uniform(key, (in_dim, out_dim // parts), minval=-limit, maxval=limit)
    keys = [key] if parts == 1 else jax.random.split(key, parts)
    return Linear(jnp.concatenate([draw(k) for k in keys], axis=-1), jnp.zeros(out_dim), axes, parts)


def normal_linear(in_dim: int, out_dim: int, *, key: PRNGKeyArray, axes: Axes = (None, None), parts: int = 1) -> Linear:
    """Normal(0, 0.02) weight and zero bias (the time MLP of DiT; the t block and the caption MLP of PixArt)."""
    return Linear(0.02 * jax.random.normal(key, (in_dim, out_dim)), jnp.zeros(out_dim), axes, parts)


def zero_linear(in_dim: int, out_dim: int, *, axes: Axes = (None, None), parts: int = 1) -> Linear:
    """All zeros: with zero adaLN outputs every block starts as the identity, with a zero final layer the velocity is 0."""
    return Linear(jnp.zeros((in_dim, out_dim)), jnp.zeros(out_dim), axes, parts)


class Norm(Protocol):
    """A norm over the last axis, without learned parameters: modulation follows it."""

    def __call__(self, x: Float[Array, "tokens dim"], eps: float = 1e-6) -> Float[Array, "tokens dim"]: ...


def layer_norm(x: Float[Array, "tokens dim"], eps: float = 1e-6) -> Float[Array, "tokens dim"]:
    """LayerNorm without affine parameters."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rms_norm(x: Float[Array, "*lead dim"], eps: float = 1e-6) -> Float[Array, "*lead dim"]:
    """Root-mean-square norm without a scale (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)


NORMS: dict[str, Norm] = {"layer": layer_norm, "rms": rms_norm}
"""Norms before attention, MLP and final layer, by `model.norm`."""


class RMSNorm(eqx.Module):
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019), on the last axis."""

    scale: Float[Array, " dim"]
    eps: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "*lead dim"]) -> Float[Array, "*lead dim"]:
        normed = rms_norm(x.astype(jnp.float32), self.eps)
        scale = self.scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * scale).astype(x.dtype)


def modulate(
    x: Float[Array, "tokens dim"], shift: Float[Array, " dim"], scale: Float[Array, " dim"]
) -> Float[Array, "tokens dim"]:
    """adaLN modulation, `x * (1 + scale) + shift` (DiT, equation in section 3.2)."""
    return x * (1 + scale[None]) + shift[None]


def norm_and_modulate(
    norm: str,
    x: Float[Array, "tokens dim"],
    shift: Float[Array, " dim"],
    scale: Float[Array, " dim"],
    eps: float = 1e-6,
) -> Float[Array, "tokens dim"]:
    """The norm of that name in `NORMS`, then `modulate`."""
    if is_fast():
        return fast.modulated_norm(x, shift, scale, eps, norm == "layer")
    return modulate(NORMS[norm](x, eps), shift, scale)


class SelfAttention(eqx.Module):
    """Multi-head self-attention with optional Q/K RMSNorm (Henry et al. 2020; prevents NaN in long bfloat16 runs).

    `value_mix`, where there is one, holds the two weights of the value residual (Zhou et al. 2024, ResFormer):
    value = value_mix[0] * first_value + value_mix[1] * value, with `first_value` that of the first block.
    """

    qkv: Linear
    out: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    value_mix: Float[Array, "2"] | None
    num_heads: int = eqx.field(static=True)

    @property
    def head_dim(self) -> int:
        return self.out.weight.shape[-2] // self.num_heads

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        angles: Float[Array, "tokens half"] | None = None,
        first_value: Float[Array, "tokens heads head_dim"] | None = None,
    ) -> tuple[Float[Array, "tokens dim"], Float[Array, "tokens heads head_dim"]]:
        """The output and the value before any mixing. `angles` are rotary positions of queries and keys."""
        if is_fast():
            return fast.self_attention(self, x, angles, first_value)
        qkv = checkpoint_name(self.qkv(x), "qkv")
        query, key, value = jnp.split(qkv.reshape(x.shape[0], 3 * self.num_heads, -1), 3, axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        observe_logits("self_attention_logit", query, key)
        mixed = self.mix(value, value if first_value is None else first_value)
        attended = checkpoint_name(attend(query, key, mixed).reshape(x.shape), "attended")
        return checkpoint_name(self.out(attended), "attention_out"), value

    def mix(self, value: Float[Array, "..."], first_value: Float[Array, "..."]) -> Float[Array, "..."]:
        """The values with those of the first block mixed in, if this attention does so."""
        if self.value_mix is None:
            return value
        of_first, of_own = self.value_mix
        return of_first * first_value + of_own * value


class CrossAttention(eqx.Module):
    """Multi-head attention from image tokens to text tokens of the same width, with optional Q/K RMSNorm.

    `mask` is True at the text tokens to attend to. Where it is False everywhere, all are attended to, so that the result
    stays finite.
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
        if is_fast():
            return fast.cross_attention(self, x, text, mask)
        query = checkpoint_name(self.query(x), "cross_qkv").reshape(x.shape[0], self.num_heads, -1)
        key_value = checkpoint_name(self.key_value(text), "cross_qkv")
        key, value = jnp.split(key_value.reshape(text.shape[0], 2 * self.num_heads, -1), 2, axis=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        observe_logits("cross_attention_logit", query, key, mask)
        attended = checkpoint_name(attend(query, key, value, mask).reshape(x.shape), "cross_attended")
        return checkpoint_name(self.out(attended), "cross_out")


def self_attention(
    dim: int, num_heads: int, qk_norm: bool, value_residual: bool = False, *, key: PRNGKeyArray
) -> SelfAttention:
    """Attention over `dim` channels in `num_heads` heads, Xavier-initialised; a value residual starts at 0.5 each."""
    qkv_key, out_key = jax.random.split(key)
    query_norm, key_norm = _head_norms(dim // num_heads, qk_norm)
    return SelfAttention(
        qkv=xavier_linear(dim, 3 * dim, key=qkv_key, axes=("embed", "heads"), parts=3),
        out=xavier_linear(dim, dim, key=out_key, axes=("heads", "embed")),
        query_norm=query_norm,
        key_norm=key_norm,
        value_mix=jnp.full(2, 0.5) if value_residual else None,
        num_heads=num_heads,
    )


def cross_attention(dim: int, num_heads: int, qk_norm: bool, *, key: PRNGKeyArray) -> CrossAttention:
    """Xavier-initialised except for the output projection, which is zero: at first the text has no effect (PixArt-alpha)."""
    query_key, key_value_key = jax.random.split(key)
    query_norm, key_norm = _head_norms(dim // num_heads, qk_norm)
    return CrossAttention(
        query=xavier_linear(dim, dim, key=query_key, axes=("embed", "heads")),
        key_value=xavier_linear(dim, 2 * dim, key=key_value_key, axes=("embed", "heads"), parts=2),
        out=zero_linear(dim, dim, axes=("heads", "embed")),
        query_norm=query_norm,
        key_norm=key_norm,
        num_heads=num_heads,
    )


def _head_norms(head_dim: int, qk_norm: bool) -> tuple[RMSNorm, RMSNorm] | tuple[None, None]:
    return (RMSNorm(jnp.ones(head_dim)), RMSNorm(jnp.ones(head_dim))) if qk_norm else (None, None)


class MLP(eqx.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    up: Linear
    down: Linear

    is_gated: ClassVar[bool] = False

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        up = checkpoint_name(self.up(x), "up")
        return checkpoint_name(self.down(jax.nn.gelu(up, approximate=True)), "down")


class SwiGLU(eqx.Module):
    """`down(silu(gate) * value)` with gate and value side by side in the outputs of `up` (Shazeer 2020)."""

    up: Linear
    down: Linear

    is_gated: ClassVar[bool] = True

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        gate, value = jnp.split(checkpoint_name(self.up(x), "up"), 2, axis=-1)
        return checkpoint_name(self.down(jax.nn.silu(gate) * value), "down")


MLPS: dict[str, type[MLP] | type[SwiGLU]] = {"gelu": MLP, "swiglu": SwiGLU}
"""MLPs of a block, by `model.mlp`."""


def mlp_hidden_dim(dim: int, ratio: float, kind: str) -> int:
    """Hidden width. Gated MLPs, whose `up` has two parts, have floor(2/3 x ratio x dim / 8) x 8: as many parameters."""
    return int(2 * ratio * dim / 24) * 8 if MLPS[kind].is_gated else int(dim * ratio)


def mlp(dim: int, ratio: float, kind: str = "gelu", *, key: PRNGKeyArray) -> MLP | SwiGLU:
    """The `dim -> hidden -> dim` network of a block, Xavier-initialised; `kind` is one of `MLPS`."""
    up_key, down_key = jax.random.split(key)
    hidden = mlp_hidden_dim(dim, ratio, kind)
    parts = 2 if MLPS[kind].is_gated else 1
    up = xavier_linear(dim, parts * hidden, key=up_key, axes=("embed", "mlp"), parts=parts)
    down = xavier_linear(hidden, dim, key=down_key, axes=("mlp", "embed"))
    return MLPS[kind](up, down)


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


def patchify(x: Float[Array, "channels height width"], patch_size: int) -> Float[Array, "tokens patch"]:
    """Cut into row-major patches; a patch is flattened as (row, column, channel)."""
    channels, height, width = x.shape
    x = x.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.transpose(1, 3, 2, 4, 0).reshape(-1, patch_size * patch_size * channels)


def unpatchify(
    tokens: Float[Array, "tokens patch"], patch_size: int, latent_shape: tuple[int, ...]
) -> Float[Array, "channels height width"]:
    """Inverse of `patchify` for a latent of `latent_shape`."""
    channels, height, width = latent_shape
    x = tokens.reshape(height // patch_size, width // patch_size, patch_size, patch_size, channels)
    return x.transpose(4, 0, 2, 1, 3).reshape(latent_shape)
