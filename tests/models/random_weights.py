"""Random weights as after training: none is zero, and blocks differ. By NumPy, which needs no compilation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowdit.sharding import dotted_name


def randomised(build: Callable[..., Any], seed: int = 0) -> Any:
    """The model that `build(key=...)` would initialise, with normal(0.1) parameters; scales of norms are around 1."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1 if dotted_name(path).endswith("norm.scale") else 0
        return jnp.asarray(centre + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: build(key=jax.random.key(0))))
