"""The layers of a block for compilers without a fused attention kernel, XLA for TPUs and CPUs: `model.kernels=fast`.

They compute what the layers of `models.layers` compute, from the same parameters, with fewer passes over memory. Their
gradients are written out, so that the backward pass reads what `models.remat` kept instead of computing it again.
Queries, keys and values are laid out as (heads, head_dim, tokens), in which a TPU multiplies without transposing. Each
function sees one example, as in `models.layers`. docs/performance.md has the figures of each difference.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from flowdit.models.observe import observe_logits
from flowdit.models.positions import rotate

if TYPE_CHECKING:
    from flowdit.models.layers import CrossAttention, Linear, RMSNorm, SelfAttention

LARGEST_EXPONENT = 40.0
"""Exponentials of logits are at most exp(40), so that their sums over any number of tokens are finite in float32."""
LARGEST_BOUND = 50.0
"""For logits in [-50, 50] the exponents are at least -50 - (50 - 40) = -60: exponentials, also times values and gradients
of 1e-11, are normal float32 numbers, which end at exp(-87)."""


def self_attention(
    layer: SelfAttention,
    x: Float[Array, "tokens dim"],
    angles: Float[Array, "tokens half"] | None,
    first_value: Float[Array, "tokens heads head_dim"] | None,
) -> tuple[Float[Array, "tokens dim"], Float[Array, "tokens heads head_dim"]]:
    """`layers.SelfAttention`: the output, and the value before any mixing."""
    query, key, value = _to_heads(layer.qkv, x, layer.num_heads)
    value = checkpoint_name(value, "qkv")
    query, key, bound = _prepare(query, key, layer.query_norm, layer.key_norm, name="qkv", angles=angles)
    first = value if first_value is None else first_value.transpose(1, 2, 0)
    observe_logits("self_attention_logit", *_as_observed(query, key))
    attended = attend(query, key, layer.mix(value, first), bound=bound, name="attended")
    return checkpoint_name(_from_heads(layer.out, attended), "attention_out"), value.transpose(2, 0, 1)


def cross_attention(
    layer: CrossAttention,
    x: Float[Array, "tokens dim"],
    text: Float[Array, "text_tokens dim"],
    mask: Bool[Array, " text_tokens"],
) -> Float[Array, "tokens dim"]:
    """`layers.CrossAttention`."""
    (query,) = _to_heads(layer.query, x, layer.num_heads)
    key, value = _to_heads(layer.key_value, text, layer.num_heads)
    value = checkpoint_name(value, "cross_qkv")
    query, key, bound = _prepare(query, key, layer.query_norm, layer.key_norm, name="cross_qkv")
    observe_logits("cross_attention_logit", *_as_observed(query, key), mask)
    attended = attend(query, key, value, mask, bound, name="cross_attended")
    return checkpoint_name(_from_heads(layer.out, attended), "cross_out")


def _to_heads(linear: Linear, x: Float[Array, "tokens dim"], heads: int) -> list[Float[Array, "heads head_dim tokens"]]:
    """A linear layer to the channels of all heads, for each of its parts a product of its own."""
    weight = linear.weight.reshape(x.shape[1], linear.parts, heads, -1)
    bias = linear.bias.reshape(linear.parts, heads, -1, 1)
    return [jnp.einsum("tc,chd->hdt", x, weight[:, part]) + bias[part] for part in range(linear.parts)]


def _from_heads(linear: Linear, x: Float[Array, "heads head_dim tokens"]) -> Float[Array, "tokens dim"]:
    """A linear layer from the channels of all heads."""
    heads, head_dim, _ = x.shape
    return jnp.einsum("hdt,hdc->tc", x, linear.weight.reshape(heads, head_dim, -1)) + linear.bias[None]


def _prepare(
    query: Float[Array, "heads head_dim tokens"],
    key: Float[Array, "heads head_dim key_tokens"],
    query_norm: RMSNorm | None,
    key_norm: RMSNorm | None,
    *,
    name: str,
    angles: Float[Array, "tokens half"] | None = None,
) -> tuple[Array, Array, Float[Array, ""] | None]:
    """Queries and keys whose products are the logits, and with Q/K norm a bound of the logits' absolute values.

    A normalised vector is no longer than the root of the head size, so the bound follows from the scales of both norms
    (Cauchy-Schwarz). Without rotary positions the scales are multiplied, and applied to the query alone.
    """
    head_dim = query.shape[1]
    rotated = lambda x: x if angles is None else rotate(x.transpose(2, 0, 1), angles).transpose(1, 2, 0)
    if query_norm is None or key_norm is None:
        query, key = checkpoint_name(query, name), checkpoint_name(key, name)
        return rotated(query) * jnp.asarray(head_dim**-0.5, query.dtype), rotated(key), None
    query_scale = query_norm.scale.astype(jnp.float32) * head_dim**-0.5
    key_scale = key_norm.scale.astype(jnp.float32)
    query, key = unit_rms(query, query_norm.eps, name), unit_rms(key, key_norm.eps, name)
    if angles is None:
        both = query_scale * key_scale
        return _scaled(query, both), key, jnp.abs(both).max() * head_dim
    bound = jnp.abs(query_scale).max() * jnp.abs(key_scale).max() * head_dim
    return rotated(_scaled(query, query_scale)), rotated(_scaled(key, key_scale)), bound


def _scaled(x: Float[Array, "heads head_dim tokens"], scale: Float[Array, " head_dim"]) -> Array:
    return (x.astype(jnp.float32) * scale[None, :, None]).astype(x.dtype)


def _as_observed(query: Array, key: Array) -> tuple[Array, Array]:
    """In the layout and scale of `observe_logits`."""
    return query.transpose(2, 0, 1) * jnp.asarray(query.shape[1] ** 0.5, query.dtype), key.transpose(2, 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def unit_rms(x: Float[Array, "heads head_dim tokens"], eps: float, name: str) -> Float[Array, "heads head_dim tokens"]:
    """RMS norm over the channels of a head, without a scale. What is kept is the result, under `name`."""
    return _unit_rms_forward(x, eps, name)[0]


def _unit_rms_forward(x: Array, eps: float, name: str) -> tuple[Array, tuple[Array, Array]]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x32).mean(1, keepdims=True) + eps)
    inverse = checkpoint_name(inverse, "statistics")
    unit = checkpoint_name((x32 * inverse).astype(x.dtype), name)
    return unit, (unit, inverse)


def _unit_rms_backward(eps: float, name: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    unit, inverse = kept
    unit32, gradient32 = unit.astype(jnp.float32), gradient.astype(jnp.float32)
    along = (gradient32 * unit32).mean(1, keepdims=True)
    return ((inverse * (gradient32 - unit32 * along)).astype(unit.dtype),)


unit_rms.defvjp(_unit_rms_forward, _unit_rms_backward)


def attend(
    query: Float[Array, "heads head_dim tokens"],
    key: Float[Array, "heads head_dim key_tokens"],
    value: Float[Array, "heads head_dim key_tokens"],
    mask: Bool[Array, " key_tokens"] | None = None,
    bound: Float[Array, ""] | None = None,
    *,
    name: str = "attended",
) -> Float[Array, "heads head_dim tokens"]:
    """Softmax attention with logits `query . key` to the keys where `mask` is True; to all keys if it is False everywhere.

    Softmax does not change if a number is subtracted from all logits of a row. Usually that is their maximum, which
    costs a pass over the logits. If no absolute logit exceeds `bound`, and it is at most `LARGEST_BOUND`, a number that
    follows from it serves as well. Above, exponentials of a whole row could underflow, and the maximum is taken. The
    result is kept under `name`.
    """
    mask = None if mask is None else mask | ~mask.any()
    shift = None
    if bound is not None:
        bound, of_query, of_key = (jax.lax.stop_gradient(x) for x in (bound, query, key))
        known = jnp.broadcast_to(jnp.maximum(bound - LARGEST_EXPONENT, 0), (query.shape[0], query.shape[2]))
        shift = jax.lax.cond(bound <= LARGEST_BOUND, lambda: known, lambda: _logits(of_query, of_key, mask).max(-1))
        shift = checkpoint_name(shift, "statistics")
    return _attend(name, query, key, value, mask, shift)


def _logits(query: Array, key: Array, mask: Array | None) -> Float[Array, "heads tokens key_tokens"]:
    logits = jnp.einsum("hdq,hdk->hqk", query, key, preferred_element_type=jnp.float32)
    return logits if mask is None else jnp.where(mask[None, None], logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(name: str, query: Array, key: Array, value: Array, mask: Array | None, shift: Array | None) -> Array:
    return _attend_forward(name, query, key, value, mask, shift)[0]


def _attend_forward(
    name: str, query: Array, key: Array, value: Array, mask: Array | None, shift: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    """The products with the values are divided by the sums of their rows, not the rows themselves: fewer divisions."""
    logits = _logits(query, key, mask)
    shift = logits.max(-1) if shift is None else shift
    exponentials = jnp.exp(logits - shift[..., None])
    total = checkpoint_name(exponentials.sum(-1), "statistics")
    weights = exponentials.astype(query.dtype)
    out = jnp.einsum("hqk,hdk->hdq", weights, value, preferred_element_type=jnp.float32) / total[:, None]
    out = checkpoint_name(out.astype(query.dtype), name)
    return out, (query, key, value, weights, total, out)


def _attend_backward(name: str, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, weights, total, out = kept
    gradient = (gradient.astype(jnp.float32) / total[:, None]).astype(query.dtype)
    of_value = jnp.einsum("hqk,hdq->hdk", weights, gradient)
    along = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(1)
    of_weights = jnp.einsum("hdq,hdk->hqk", gradient, value, preferred_element_type=jnp.float32)
    of_logits = (weights.astype(jnp.float32) * (of_weights - along[..., None])).astype(query.dtype)
    return (
        jnp.einsum("hqk,hdk->hdq", of_logits, key),
        jnp.einsum("hqk,hdq->hdk", of_logits, query),
        of_value,
        None,
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def modulated_norm(
    x: Float[Array, "tokens dim"],
    shift: Float[Array, " dim"],
    scale: Float[Array, " dim"],
    eps: float,
    is_centred: bool,
) -> Float[Array, "tokens dim"]:
    """LayerNorm, or RMS norm if not centred, and `layers.modulate` after it, in float32. What is kept is `x`."""
    return _modulated_norm_forward(x, shift, scale, eps, is_centred)[0]


def _modulated_norm_forward(
    x: Array, shift: Array, scale: Array, eps: float, is_centred: bool
) -> tuple[Array, tuple[Array, ...]]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True) if is_centred else jnp.zeros((x.shape[0], 1))
    if x.dtype == jnp.float32:
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    else:
        # Both sums in one pass. What the difference loses, for tokens far from zero, their own rounding lost before.
        variance = jnp.maximum(jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean), 0)
    mean = checkpoint_name(mean, "statistics")
    inverse = checkpoint_name(jax.lax.rsqrt(variance + eps), "statistics")
    out = (x32 - mean) * inverse * (1 + scale.astype(jnp.float32)[None]) + shift.astype(jnp.float32)[None]
    return out.astype(x.dtype), (x, scale, mean, inverse)


def _modulated_norm_backward(
    eps: float, is_centred: bool, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    x, scale, mean, inverse = kept
    gradient = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    of_shift, of_scale = gradient.sum(0), (gradient * normed).sum(0)
    gradient = gradient * (1 + scale.astype(jnp.float32)[None])
    offset = gradient.mean(-1, keepdims=True) if is_centred else jnp.zeros_like(mean)
    of_x = inverse * (gradient - offset - normed * (gradient * normed).mean(-1, keepdims=True))
    return of_x.astype(x.dtype), of_shift.astype(scale.dtype), of_scale.astype(scale.dtype)


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)
