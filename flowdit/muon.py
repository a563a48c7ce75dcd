"""Muon: the momentum of a matrix is made orthogonal before it is a step (Jordan et al. 2024)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from flowdit.diffusion.objective import Parameters
from flowdit.fsdp import on_whole_matrices
from flowdit.sharding import ParameterSpec, parameter_specs

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
GROUP = 2**24
"""Numbers in the matrices that are worked on at the same time; more would take memory and not be faster."""
EPS = 1e-8
"""Added to the norm of a matrix."""
SCALE = 0.2
"""Root mean square of a square matrix's update, about that of AdamW's, so that learning rates carry over (Moonlight)."""


class MuonState(NamedTuple):
    """`mu` is the mean of past gradients, with the parameters' structure."""

    mu: Any


def scale_by_muon(momentum: float, dtype: str, momentum_dtype: str) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal in `dtype`, matrix by matrix, and scaled. All parameters must be matrices.

    `momentum_dtype` is that of the state between updates. The matrices of a stack, and those that are fused in a
    parameter, are each on their own, as `sharding.ParameterSpec` says. A block's matrix whose gradient is all zeros, as of
    a branch that is switched off, has no update: its momentum, however small by then, would be one of full size.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda x: jnp.zeros_like(x, dtype=momentum_dtype), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        mix = lambda mean, new: momentum * mean + (1 - momentum) * new
        mu = jax.tree.map(mix, state.mu, updates)
        ahead = jax.tree.map(mix, mu, updates)
        direction = functools.partial(_direction, dtype)
        updates = jax.tree.map(direction, parameter_specs(updates), updates, ahead)
        return updates, MuonState(jax.tree.map(lambda x: x.astype(momentum_dtype), mu))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _direction(
    dtype: str, spec: ParameterSpec, gradient: Float[Array, "..."], momentum: Float[Array, "..."]
) -> Float[Array, "..."]:
    orthogonal = on_whole_matrices(orthogonalise, spec, momentum.astype(dtype))
    rows, columns = momentum.shape[-2], momentum.shape[-1] // spec.parts
    scaled = SCALE * max(rows, columns) ** 0.5 * orthogonal.astype(momentum.dtype)
    return jnp.where((gradient != 0).any((-2, -1), keepdims=True), scaled, 0)


def orthogonalise(matrices: Float[Array, "matrices rows columns"]) -> Float[Array, "matrices rows columns"]:
    """About the orthogonal factor of each matrix, U V^T of its singular values U S V^T, by Newton-Schulz iterations.

    The new singular values are between about 0.7 and 1.2, not 1: the coefficients are chosen to raise small ones fast. A
    matrix of zeros stays one.
    """
    group = max(GROUP // math.prod(matrices.shape[1:]), 1)
    return jax.lax.platform_dependent(
        matrices,
        # XLA multiplies a batch of matrices on CPUs two to three times slower than one after the other.
        cpu=functools.partial(jax.lax.map, _newton_schulz),
        default=functools.partial(jax.lax.map, _newton_schulz, batch_size=group),
    )


def _newton_schulz(matrix: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    if matrix.shape[0] > matrix.shape[1]:
        return _newton_schulz(matrix.T).T
    wide = matrix.astype(jnp.float32)
    x = (wide / (jnp.linalg.norm(wide) + EPS)).astype(matrix.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def hidden_matrices(parameters: Any, modulation: bool) -> Any:
    """True for the parameters that Muon updates: matrices inside the network, which are in a stack of blocks or split over
    devices. With `modulation` false, not for projections to shifts, scales and gates.

    Embeddings and final layers, where rows or columns stand for patches, classes or words, are not such matrices. Of
    `Parameters` only the network has some: projectors of auxiliary losses are final layers.
    """
    if isinstance(parameters, Parameters):
        of_auxiliary = jax.tree.map(lambda _: False, parameters.auxiliary)
        return Parameters(hidden_matrices(parameters.model, modulation), of_auxiliary)

    def is_hidden(spec: ParameterSpec, parameter: Any) -> bool:
        is_inside = spec.stacked > 0 or any(spec.axes)
        is_matrix = spec.decay and len(parameter.shape) - spec.stacked == 2
        return is_inside and is_matrix and (modulation or "modulation" not in spec.axes)

    return jax.tree.map(is_hidden, parameter_specs(parameters), parameters)
