"""What auxiliary losses share: the places of tokens in a latent, and the distance of tokens from others."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def token_grid(tokens: int, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the tokens of a latent (channels, height, width)."""
    _, height, width = latent_shape
    patch = math.isqrt(height * width // tokens)
    return height // patch, width // patch


def one_minus_cosine(a: Float[Array, "tokens width"], b: Float[Array, "tokens width"]) -> Float[Array, ""]:
    """The mean over tokens, in float32: half the squared distance of unit vectors, which no rounding makes negative."""
    return 0.5 * jnp.square(_unit(a) - _unit(b)).sum(-1).mean()


def _unit(x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
