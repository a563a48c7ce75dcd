"""How a network is run on the devices that a program is compiled for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdit.models.attention import NO_KERNELS, AttentionShape, Kernels, choose_kernels, use_kernels
from flowdit.sharding import on_mesh


class Compute(NamedTuple):
    """How a network is run: the dtype that its parameters are cast to, and the attention kernels of the target."""

    dtype: str = "float32"
    kernels: Kernels = NO_KERNELS

    def cast(self, tree: Any) -> Any:
        """Floating-point arrays of `tree` in `dtype`."""

        def cast_leaf(x):
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(cast_leaf, tree)

    def on(self, mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, about to be jitted, traced with these kernels and with `mesh` known to every `gather` in it."""

        @functools.wraps(function)
        def with_kernels(*arguments: Any) -> Any:
            with use_kernels(self.kernels):
                return function(*arguments)

        return on_mesh(mesh, with_kernels)


FLOAT32 = Compute()
"""Float32 and XLA's kernels, which every device has."""


def choose_compute(mesh: Mesh | None, dtype: str, shapes: Iterable[AttentionShape]) -> Compute:
    """`dtype`, with the kernels that suit the devices of `mesh`, or the first device where that is None.

    The devices need not be there: a mesh may be of a topology to compile for. Call it outside of any trace.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Compute(dtype, choose_kernels(device.platform, dtype, shapes))
