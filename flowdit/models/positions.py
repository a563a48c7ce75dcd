"""2-D positions of latent patches: a fixed sin-cos table added to the tokens, or rotary angles for queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

POSITIONS = ("sincos", "rope")


class Positions(NamedTuple):
    """The positions of tokens in a grid of patches. Nothing is learned, so the grid may have any size.

    A token's coordinate along an axis is its number over `interpolation_scale`. With `base`, a grid of any size spans the
    range of `base` patches: the coordinate is also divided by (patches along the axis / base), as in PixArt-alpha.
    """

    kind: str = "sincos"
    interpolation_scale: float = 1.0
    base: int | None = None

    def table(self, dim: int, height: int, width: int) -> Float[np.ndarray, "tokens dim"]:
        """The sin-cos table of a grid of height x width patches; the width fills the first half (DiT, MAE)."""
        rows, columns = self._coordinates(height, width)
        return np.concatenate([_features(columns, dim), _features(rows, dim)], axis=1).astype(np.float32)

    def angles(self, head_dim: int, height: int, width: int) -> Float[np.ndarray, "tokens half"]:
        """Rotary angles in radians, (tokens, head_dim / 2); the width fills the first half.

        Each half is that of RoPE (Su et al. 2021) on `head_dim / 2` channels, as in diffusers' `get_2d_rotary_pos_embed`.
        """
        rows, columns = self._coordinates(height, width)
        parts = [coordinate[:, None] * _frequencies(head_dim // 4)[None] for coordinate in (columns, rows)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _coordinates(
        self, height: int, width: int
    ) -> tuple[Float[np.ndarray, " tokens"], Float[np.ndarray, " tokens"]]:
        """Row and column of each token, in row-major order."""
        axes = [
            np.arange(count) / (count / (self.base or count)) / self.interpolation_scale for count in (height, width)
        ]
        rows, columns = np.meshgrid(*axes, indexing="ij")
        return rows.ravel(), columns.ravel()


def _frequencies(count: int) -> Float[np.ndarray, " count"]:
    return 1 / 10_000 ** (np.arange(count) / count)


def _features(coordinates: Float[np.ndarray, " tokens"], dim: int) -> Float[np.ndarray, "tokens half"]:
    """Sines, then cosines, of `dim / 4` frequencies."""
    angles = coordinates[:, None] * _frequencies(dim // 4)[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def rotate(
    x: Float[Array, "tokens heads dim"], angles: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads dim"]:
    """Rotate channel i together with channel i + dim / 2 by the angles of their token (RoPE), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
