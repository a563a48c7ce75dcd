"""Compute dtype and attention kernels of a network."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowdit.fsdp import on_mesh
from flowdit.models.attention import (
    NO_KERNELS,
    AttentionShape,
    Kernels,
    choose_kernels,
    describe_kernels,
    use_fast_layers,
    use_kernels,
)

logger = logging.getLogger(__name__)


class Compute(NamedTuple):
    """How a network is run: the dtype to which its parameters are cast, attention kernels, and layers (`models.fast`)."""

    dtype: str = "float32"
    kernels: Kernels = NO_KERNELS
    is_fast: bool = False

    def cast(self, tree: Any) -> Any:
        """Cast the floating-point arrays of `tree` to `dtype`."""

        def cast_leaf(x):
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(cast_leaf, tree)

    def on(self, mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function`, before jit, to be traced with these kernels and layers, and with `mesh` set for `gather`."""

        @functools.wraps(function)
        def with_kernels(*arguments: Any) -> Any:
            with use_kernels(self.kernels), use_fast_layers(self.is_fast):
                return function(*arguments)

        return on_mesh(mesh, with_kernels)


FLOAT32 = Compute()
"""Float32 and XLA's kernels, available on every device."""


def choose_compute(mesh: Mesh | None, dtype: str, shapes: Iterable[AttentionShape], kernels: str = "auto") -> Compute:
    """Choose layers and kernels for `dtype` and the devices of `mesh`, or the first device if None, and log the choice.

    `kernels` is `model.kernels`. The devices need not be attached: a mesh may be of a topology to compile for. Do not
    call it while tracing.
    """
    platform = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform
    if kernels == "fast" or (kernels == "auto" and platform in ("tpu", "cpu")):
        logger.info(
            "compute in %s; the layers of models.fast, with their own attention (model.kernels=%s)", dtype, kernels
        )
        return Compute(dtype, is_fast=True)
    if kernels == "plain":
        logger.info("compute in %s; attention by XLA (model.kernels=plain)", dtype)
        return Compute(dtype)
    shapes = list(shapes)
    logger.info("compute in %s; %s", dtype, describe_kernels(platform, dtype, shapes))
    return Compute(dtype, choose_kernels(platform, dtype, shapes))
